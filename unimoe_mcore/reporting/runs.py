"""One run as it is on disk, and the runs that it stands on.

A report must come out of whatever is there: a run that is under way, was killed, or was moved. So
nothing here is refused but a folder that is no run; what cannot be read is named in ``problems``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipeline.errors import DataError
from data_pipeline.reading.transfer import is_address
from data_pipeline.shards.index import Manifest, load_manifest
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.runtime.run_directory import RunDirectory, given, read_lines

MOST_BYTES = 2**30
"""Largest file that is read; more is no record of a run."""


@dataclass(eq=False)
class Run:
    """What a run recorded.

    Attributes:
        path: its directory.
        title: what the report calls it.
        config: the resolved recipe as plain groups and values.
        config_text: as it is in the file.
        version: code, packages and machine.
        data: digest of its data; empty if it is not known.
        metrics: lines of ``metrics.jsonl``.
        validations: lines of ``validation.jsonl``.
        events: lines of ``events.jsonl``.
        evaluations: (``before`` or ``after``, split) -> one record a question.
        pathways: the same -> the ways of tokens through the experts.
        made: ``gives/manifest.json``, without its tensors; empty if it is not done.
        problems: what could not be read, a sentence each.
        stands_on: the runs that it stands on.
        missing: role and folder of what it stands on and is not there.
    """

    path: Path
    title: str
    config: dict[str, Any]
    config_text: str
    version: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    pathways: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stands_on: list[Run] = field(default_factory=list)
    missing: list[tuple[str, Path]] = field(default_factory=list)

    def setting(self, key: str, default: Any = "") -> Any:
        """A value of the recipe by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def kind(self) -> str:
        """The stage's kind."""
        return str(self.setting("stage.kind", "unknown"))

    @property
    def split(self) -> str:
        """The split that it was judged on."""
        return str(self.setting("trainer.evaluation.split", "test"))

    @property
    def steps(self) -> int:
        """Steps that it is to take."""
        steps = self.setting("trainer.steps", 0)
        return steps if isinstance(steps, int) else 0

    @property
    def taken(self) -> int:
        """Steps that it has taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def records(self, when: str = "after") -> list[dict[str, Any]]:
        """What it answered; empty if it was not asked."""
        return self.evaluations.get((when, self.split), [])

    def event(self, kind: str) -> dict[str, Any]:
        """The newest event of a kind; empty if there is none."""
        return next((e for e in reversed(self.events) if e.get("event") == kind), {})

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.made:
            return "done"
        return f"step {self.taken} of {self.steps}" if self.taken else "no step yet"


def read_run(path: Path) -> Run:
    """All that a run recorded.

    Raises:
        UserError: if the folder is no run.
    """
    directory = RunDirectory(path, writes=False)
    try:
        text = directory.config.read_text(encoding="utf8")
        config: Any = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # PyYAML and OmegaConf raise many kinds
        raise UserError(
            f"{path} is no run: it has no config.yaml that can be read; name folders such as "
            f"runs/stage3."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("stage"), dict):
        raise UserError(
            f"{path} is no run: its config.yaml is no recipe; name folders such as runs/stage3."
        )
    run = Run(path, path.resolve().name, config, text)
    run.version = _object(run, path / "version.json")
    run.data = _read(run, path / "data.txt", lambda p: p.read_text("utf8").strip(), "")
    run.metrics = [line for line in _lines(run, path / "metrics.jsonl") if _has_step(line)]
    run.validations = [line for line in _lines(run, path / "validation.jsonl") if _has_step(line)]
    run.events = _lines(run, path / "events.jsonl")
    for file in sorted((path / "evaluation").glob("*.*.jsonl")):
        when, split = file.name.split(".")[:2]
        run.evaluations[when, split] = _records(run, file)
        ways = directory.pathways(when, split)
        if ways.is_file():
            run.pathways[when, split] = _object(run, ways)
    if given(directory):
        made = _object(run, directory.gives / "manifest.json")
        run.made = {key: value for key, value in made.items() if key != "tensors"}
    return run


def _read[T](run: Run, path: Path, how: Callable[[Path], T], otherwise: T) -> T:
    """What a file holds; a problem of the run if it cannot be read, nothing if it is not there."""
    if not path.is_file():
        return otherwise
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return how(path)
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{path} cannot be read ({error}).")
        return otherwise


def _object(run: Run, path: Path) -> dict[str, Any]:
    def read(path: Path) -> dict[str, Any]:
        found = json.loads(path.read_text("utf8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found

    return _read(run, path, read, {})


def _lines(run: Run, path: Path) -> list[dict[str, Any]]:
    found: list[Any] = _read(run, path, read_lines, [])
    return [line for line in found if isinstance(line, dict)]


def _has_step(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int)


_RECORD = {
    "dataset": str,
    "group": str,
    "key": str,
    "exact": bool,
    "loss": int | float,
    "tokens": int,
}


def _records(run: Run, path: Path) -> list[dict[str, Any]]:
    lines = _lines(run, path)
    good = [
        line
        for line in lines
        if all(isinstance(line.get(name), kind) for name, kind in _RECORD.items())
    ]
    if len(good) < len(lines):
        run.problems.append(f"{path} holds {len(lines) - len(good)} lines that are no answers.")
    return good


def with_ancestors(paths: Sequence[Path]) -> tuple[list[Run], list[Run]]:
    """Runs, and all runs together with those they stand on, in the order in which they were made.

    Returns:
        The given runs in the given order, and all of them, each once, ancestors first.

    Raises:
        UserError: if a folder is no run.
    """
    found: dict[Path, Run] = {}
    order: list[Run] = []

    def visit(path: Path) -> Run:
        place = path.resolve()
        if place in found:
            return found[place]
        run = found[place] = read_run(path)
        for role, folder, digest in _sources(run):
            parent = _find(run, folder, digest)
            if parent is not None:
                ancestor = visit(parent)
                if ancestor not in run.stands_on and run not in family(ancestor):
                    run.stands_on.append(ancestor)
            elif not _is_foreign(run, folder):
                run.missing.append((role, folder))
        order.append(run)
        return run

    given_runs = list(dict.fromkeys(visit(path) for path in paths))
    _tell_apart(order)
    return given_runs, order


def family(run: Run) -> list[Run]:
    """A run and all that it stands on, itself first."""
    found = [run]
    for each in found:
        found += [other for other in each.stands_on if other not in found]
    return found


def _sources(run: Run) -> Iterator[tuple[str, Path, str]]:
    """Role, folder and hash (empty if it is not known) of what the recipe takes from elsewhere."""
    stage, hashes = run.config["stage"], run.made.get("sources", {})

    def text(value: Any) -> str:
        return value if isinstance(value, str) and value != OWN_MLP else ""

    experts = stage.get("experts")
    connectors = stage.get("connectors")
    named = [
        ("base", text(stage.get("base")), "base"),
        ("start", text(stage.get("start")), ""),
        *(
            (f"expert {n}", text(entry), f"expert {n}")
            for n, entry in enumerate(experts if isinstance(experts, list) else [])
        ),
        ("shared expert", text(stage.get("shared_expert")), "shared expert"),
        *(
            (f"connector {name}", text(entry), f"connector {name}")
            for name, entry in (connectors.items() if isinstance(connectors, dict) else [])
        ),
        ("first weights", text(stage.get("init_from")), ""),
    ]
    seen = set()
    for role, folder, key in named:
        if folder and folder not in seen:
            seen.add(folder)
            digest = hashes.get(key, "") if isinstance(hashes, dict) else ""
            yield role, Path(folder), digest


def _run_of(folder: Path) -> Path:
    """The run directory that a folder which a recipe names belongs to."""
    if folder.name == "gives":
        return folder.parent
    if folder.parent.name == "checkpoints":
        return folder.parent.parent
    return folder


def _find(run: Run, folder: Path, digest: str) -> Path | None:
    """The run that gave a folder: beside this one, where it may have been moved to, or there."""
    named = _run_of(folder)
    for place in (run.path.resolve().parent / named.name, named):
        if not (place / "config.yaml").is_file() or place.resolve() == run.path.resolve():
            continue
        if not digest or _hash(place) == digest:
            return place
    return None


def _hash(place: Path) -> str:
    try:
        return str(json.loads((place / "gives" / "manifest.json").read_text("utf8"))["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_foreign(run: Run, folder: Path) -> bool:
    """Whether a folder is there and was not given by a run, such as a base that was imported."""
    named = _run_of(folder)
    beside = run.path.resolve().parent / named.name
    for there, of_run in ((beside / folder.relative_to(named), beside), (folder, named)):
        if there.is_dir():
            return not (of_run / "config.yaml").is_file()
    return False


def _tell_apart(runs: Sequence[Run]) -> None:
    """Other titles for runs in different folders that have the same name."""
    names = [run.title for run in runs]
    for run in runs:
        if names.count(run.path.resolve().name) > 1:
            run.title = "/".join(run.path.resolve().parts[-3:])


def data_of(run: Run) -> tuple[Manifest | None, str]:
    """The run's data set, or a sentence why there is none."""
    named = str(run.setting("data.folder"))
    if is_address(named):
        return None, f"The data of {run.title} are elsewhere ({named}): no media are shown."
    places = [Path(named), run.path.resolve().parent.parent / "data" / Path(named).name]
    for place in places:
        try:
            manifest = load_manifest(place)
        except DataError:
            continue
        if manifest.digest == run.data and not manifest.url:
            return manifest, ""
    return None, (
        f"The data that {run.title} was judged on are not at {named} any more, or are others by "
        f"now: questions and media are not shown."
    )
