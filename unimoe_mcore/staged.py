"""A staged schedule: runs that build on each other, each done once, continued where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.shards.index import Manifest
from unimoe_mcore.compose import up_to_date
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.launch import launch

EXPERTS = ("image", "speech", "audio")
"""Towers that get an expert of their own, in the order of the experts."""

_DATASETS = {
    "stage1": "data.datasets",
    "stage2": "stage.expert_datasets.image",
    "stage3": "data.datasets",
    "dense": "data.datasets",
}
"""Recipe -> where it names the picture tasks."""


@dataclass(frozen=True)
class Run:
    """One run of a schedule.

    Attributes:
        title: what it is for.
        recipe: composed.
    """

    title: str
    recipe: Recipe


class Stages:
    """Composes a schedule's runs, without the towers that the built data have nothing for.

    Attributes:
        towers: names of the towers that there are data for.
    """

    def __init__(self, manifest: Manifest, overrides: Sequence[str]) -> None:
        """Look at what the data hold.

        Args:
            overrides: Hydra overrides of every run; they win over those of the schedule, but for
                what it computes and what ``refuse_own`` refuses.

        Raises:
            UserError: if the data hold nothing but text.
        """
        self.towers = available(manifest)
        if not self.towers:
            raise UserError(f"{manifest.folder} holds neither pictures nor sounds to train on.")
        self._absent = [f"~model.towers.{name}" for name in EXPERTS if name not in self.towers]
        # Handwritten digits stand in where there are no emoji.
        self._digits = "img_digit" in manifest.datasets["train"]
        self._overrides = overrides

    def composed(self, name: str, *extra: str, computed: Sequence[str] = ()) -> Recipe:
        """A recipe for these data.

        Args:
            extra: overrides of the schedule.
            computed: overrides that win over the user's.
        """
        where = _DATASETS.get(name)
        added = [f"+{where}.img_digit=1.0"] if self._digits and where else []
        ours = ["data.missing=skip", *self._absent, *added, *extra]
        return compose_recipe(name, [*ours, *self._overrides, *computed])

    def experts(self, *extra: str) -> list[Run]:
        """Stage 2: one run for every tower."""
        return [
            Run(
                f"Stage 2: an expert for {tower}",
                self.composed("stage2", f"stage.expert={tower}", *extra),
            )
            for tower in self.towers
        ]

    def mixture(self, *extra: str) -> Recipe:
        """Stage 3: the base's own MLP beside the experts of stage 2."""
        given = (f"${{paths.runs}}/stage2-{tower}/gives" for tower in self.towers)
        return self._mixture([OWN_MLP, *given], extra)

    def identical(self, *extra: str) -> Recipe:
        """Stage 3 with as many experts, all of them the base's own MLP."""
        return self._mixture([OWN_MLP] * (len(self.towers) + 1), extra)

    def _mixture(self, experts: list[str], extra: Sequence[str]) -> Recipe:
        if len(experts) % 2:  # two processes share the experts evenly
            experts.append(OWN_MLP)
        listed = ",".join(f"'{entry}'" for entry in experts)
        return self.composed("stage3", f"stage.experts=[{listed}]", *extra)


OWN = ("name", "experts", "stage.expert", "stage.experts")
"""What every schedule sets by itself, for each run another value."""


def refuse_own(overrides: Sequence[str], more: Sequence[str] = ()) -> None:
    """Refuse overrides of what tells the runs of a schedule apart.

    Args:
        more: what this schedule sets besides ``OWN``.

    Raises:
        UserError: naming them.
    """
    names = [override.partition("=")[0].strip("+~ ") for override in overrides]
    if refused := [name for name in names if name in (*OWN, *more)]:
        raise UserError(
            f"{', '.join(refused)} cannot be set for all runs: the schedule sets it for each; "
            "leave it out, or start a run by itself with python -m unimoe_mcore.launch."
        )


def available(manifest: Manifest) -> list[str]:
    """Towers for which the built data has something to learn."""
    found = {m for e in manifest.entries for m in e.combination.split("+")}
    return [name for name in EXPERTS if name in found or (name == "image" and "video" in found)]


def encode_for(runs: Sequence[Run], manifest: Manifest) -> None:
    """Fill the feature cache, unless every run that needs it is done."""
    from unimoe_mcore.encode import encode

    heading("Frozen encoders: every picture, clip and recording once")
    if all(up_to_date(run.recipe, manifest.digest) for run in runs):
        print("done before", flush=True)
    else:
        encode(runs[-1].recipe)


def follow(runs: Sequence[Run], manifest: Manifest) -> int:
    """Train what is not done yet, one run after another.

    Returns:
        0, or the exit code of the run that failed.
    """
    for run in runs:
        heading(run.title)
        if up_to_date(run.recipe, manifest.digest):
            print(f"{run.recipe.name}: done before", flush=True)
        elif code := launch(run.recipe):
            return code
    return 0


def heading(text: str) -> None:
    """A line that says what comes now."""
    print(f"\n== {text}", flush=True)
