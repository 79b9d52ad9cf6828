"""Plans one after another, and the small state by which any of them is taken up again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.planning.plan import ORDER, Draws, GlobalPlan, Mixture, Source, fingerprint_of


@dataclass(frozen=True)
class PlanState:
    """Where a run is in its plan; a small JSON object, the same for all ranks.

    It holds no number of ranks or workers and no dealing: those may differ when it is read.

    Attributes:
        step: steps done.
        fingerprint: of the plan that made the last of them.
        description: what that plan was decided by, for a message when it differs.
        cursors: how often each source has been drawn, by its name.
        quarantine: places that were left empty, as ``Quarantine.state`` gives them.
    """

    step: int
    fingerprint: str
    description: dict[str, Any]
    cursors: dict[str, int]
    quarantine: list[Any] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> PlanState:
        """Read what ``to_json`` gave.

        Raises:
            DataError: it is something else.
        """
        kinds: tuple[tuple[str, type], ...] = (
            ("step", int),
            ("fingerprint", str),
            ("description", dict),
            ("cursors", dict),
            ("quarantine", list),
        )
        if not isinstance(record, dict) or set(record) != {name for name, _ in kinds}:
            raise DataError(
                "This is not the state of a data plan of this version: go back to an earlier "
                "checkpoint, or to the version that wrote it."
            )
        state = cls(**record)
        damaged = [name for name, kind in kinds if not isinstance(record[name], kind)]
        if not damaged:
            numbers = [("step", state.step), *(("cursors", n) for n in state.cursors.values())]
            damaged = [name for name, n in numbers if type(n) is not int or n < 0]
        if not damaged and fingerprint_of(state.description) != state.fingerprint:
            damaged = ["description or fingerprint"]
        if damaged:
            raise DataError(
                f"The data plan's state has a damaged {damaged[0]}: go back to an earlier "
                "checkpoint."
            )
        return state


class Timeline:
    """The plan of every step of a run; more than one if the recipe changes it on the way.

    Every plan begins with the cursors at which the one before it stopped, so that a changed
    mixture neither repeats nor loses a sample of the epochs that are under way. What orders the
    samples inside an epoch, seed and shuffle, is the same for all.

    Args:
        sources: what there is to draw from, for all plans.
        phases: first step -> mixture from then on; one of them is step 0's.
        state: where an earlier process stopped; None to begin.

    Raises:
        DataError: the phases differ in seed or shuffle; or the state was made by another plan, and
            the recipe does not say that the plan changes at its step. The message spells out the
            differences.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Mapping[int, Mixture],
        state: PlanState | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self._phases = dict(sorted(phases.items()))
        if not self._phases or min(self._phases) != 0:
            raise DataError("A plan begins at step 0: data.changes holds later steps only.")
        first = self._phases[0]
        if any((m.seed, m.shuffle) != (first.seed, first.shuffle) for m in self._phases.values()):
            raise DataError("data.seed and data.shuffle hold for a whole run: they cannot change.")
        self._state = state if state is not None and state.step else None
        self._plans: list[GlobalPlan] = [self._first(self._state)]

    def _first(self, state: PlanState | None) -> GlobalPlan:
        """The plan at the state's step; those before it are past and need not be known."""
        if state is None:
            return GlobalPlan(self.sources, self._phases[0])
        begin = max(step for step in self._phases if step <= state.step)
        _check_order(state, self._phases[begin])
        if begin == state.step:
            return GlobalPlan(self.sources, self._phases[begin], begin, state.cursors)
        origin = state.description.get("origin", {})
        plan = GlobalPlan(self.sources, self._phases[begin], begin, origin)
        if plan.fingerprint() != state.fingerprint:
            changes = "; ".join(differences(state.description, plan.description()))
            raise DataError(
                f"the data plan changed at step {state.step} and the recipe does not say so: "
                f"{changes}. Undo that, or declare it with data.changes, a mixture with "
                f"step: {state.step}"
            )
        return plan

    def at(self, step: int) -> GlobalPlan:
        """The plan that holds at a step.

        Raises:
            DataError: the step lies before the state that the run was taken up from.
        """
        begins = [begin for begin in self._phases if begin > self._plans[-1].first_step]
        for begin in begins:
            if begin > step:
                break
            cursors = self._plans[-1].cursors(begin)
            self._plans.append(GlobalPlan(self.sources, self._phases[begin], begin, cursors))
        for plan in reversed(self._plans):
            if plan.first_step <= step:
                return plan
        raise DataError(f"step {step} lies before the plan of this run begins")

    def mixtures(self, step: int) -> list[Mixture]:
        """The mixtures of the recipe up to a step, the present one last."""
        return [mixture for begin, mixture in self._phases.items() if begin <= step]

    def step(self, step: int) -> Draws:
        """The samples of a step."""
        return self.at(step).step(step)

    def state(self, step: int, quarantine: Sequence[Any] = ()) -> PlanState:
        """What to save when ``step`` steps are done."""
        if self._state is not None and step == self._state.step:
            # Nothing was done since; the plan that made the last step may not be known here.
            return replace(self._state, quarantine=list(quarantine))
        plan = self.at(max(0, step - 1))
        return PlanState(
            step=step,
            fingerprint=plan.fingerprint(),
            description=plan.description(),
            cursors=plan.cursors(step),
            quarantine=list(quarantine),
        )


def _check_order(state: PlanState, mixture: Mixture) -> None:
    """Refuse to go on in another order inside epochs that are under way."""
    saved, now = state.description, {"seed": mixture.seed, "shuffle": asdict(mixture.shuffle)}
    changes = [
        f"{key} was {_short(saved.get(key))}, now {_short(now[key])}"
        for key in now
        if saved.get(key) != now[key]
    ]
    if saved.get("order") != ORDER:
        changes.append(f"the rules of the order were version {saved.get('order')}, now {ORDER}")
    if changes:
        raise DataError(
            f"the data plan cannot go on at step {state.step}: {'; '.join(changes)}. In the epochs "
            "under way samples would come twice or not at all: undo that, or begin a new run."
        )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What tells two plans' descriptions apart but for what ``_check_order`` names, in words."""
    found: list[str] = []
    for key in ("global_samples", "temperature", "compose"):
        if saved.get(key) != now.get(key):
            found.append(f"{key} was {_short(saved.get(key))}, now {_short(now.get(key))}")
    for key in ("datasets", "combinations"):
        found += _weights(key, saved.get(key) or {}, now.get(key) or {})
    found += _contents(saved.get("sources") or [], now.get("sources") or [])
    if saved.get("first_step") != now.get("first_step"):
        found.append(
            f"the plan began at step {saved.get('first_step')}, now at {now.get('first_step')}"
        )
    return found or ["an earlier change of the plan is missing from data.changes"]


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _weights(key: str, saved: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    found = [f"{name} is no longer in data.{key}" for name in sorted(set(saved) - set(now))]
    found += [f"{name} is new in data.{key}" for name in sorted(set(now) - set(saved))]
    return found + [
        f"data.{key}.{name} was {saved[name]:g}, now {now[name]:g}"
        for name in sorted(set(saved) & set(now))
        if saved[name] != now[name]
    ]


def _contents(saved: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> list[str]:
    """Sources whose samples are others, that are gone, new, or in another place."""
    before = {(name, combination): tuple(rest) for name, combination, *rest in saved}
    after = {(name, combination): tuple(rest) for name, combination, *rest in now}
    found = [
        f"{name} ({combination}) has other content: {before[name, combination][0]} samples were "
        f"{before[name, combination][1][:8]}, {after[name, combination][0]} are now "
        f"{after[name, combination][1][:8]}"
        for name, combination in sorted(set(before) & set(after))
        if before[name, combination] != after[name, combination]
    ]
    for gone, how in ((set(before) - set(after), "no longer"), (set(after) - set(before), "newly")):
        found += [f"{name} ({combination}) is {how} drawn" for name, combination in sorted(gone)]
    if not found and list(before) != list(after):
        found = [f"the sources came in the order {_names(before)}, now {_names(after)}"]
    return found


def _names(sources: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({combination})" for name, combination in sources)
