"""The demo's schedule, composed for a tiny world; nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.shards.index import Manifest, load_manifest
from tests.workspace import build_data, overrides
from unimoe_mcore import demo, quickstart
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.demo import main, plan_runs
from unimoe_mcore.demo_comparison import DENSE, IDENTICAL, MIXTURES, described
from unimoe_mcore.reporting.comparison import Arm, comparison_tables, modality_means, spread
from unimoe_mcore.reporting.comparison_figures import answers, experts
from unimoe_mcore.reporting.results import Judged
from unimoe_mcore.reporting.runs import Run as RecordedRun
from unimoe_mcore.reporting.shares import Routing
from unimoe_mcore.staged import Run, Stages, available
from unimoe_mcore.training.planned import planned_tokens, tokens_by_step


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(build_data(tmp_path_factory.mktemp("demo") / "data" / "tiny"))


@pytest.fixture(scope="module")
def runs(manifest: Manifest) -> dict[str, Run]:
    """Every run by its name; the base is no more than its tokenizer."""
    return planned(manifest)


def planned(manifest: Manifest, *more: str, group: str = "demo") -> dict[str, Run]:
    folder = manifest.folder.parent.parent
    base = folder / "runs" / "base" / "gives"
    TextTokenizer.train(["Which colour? red green blue"] * 5, 300).save(base / "tokenizer.json")
    towers = {f"model.towers.{name}." for name in {"speech", "audio"} - set(available(manifest))}
    left_out = ("trainer.steps", *towers)
    tiny = [each for each in overrides(folder) if not each.startswith(left_out)]
    stages = Stages(manifest, [*tiny, "trainer.warmup=0", *more])
    runs = plan_runs(stages, manifest, group)
    return {run.recipe.name: run for run in runs}


def test_the_schedule_trains_every_arm(runs: dict[str, Run]) -> None:
    experts = ["stage2-image", "stage2-speech", "stage2-audio"]
    assert set(runs) == {"stage1", *experts, *MIXTURES, *DENSE, IDENTICAL}
    first, *others = runs[MIXTURES[0]].recipe.stage.experts
    assert first == "base"
    assert [Path(each).parent.name for each in others] == experts
    assert runs[IDENTICAL].recipe.stage.experts == ["base"] * 4
    for name in (*MIXTURES, IDENTICAL):
        assert runs[name].recipe.parallel.expert == 2
    assert not any(runs[name].recipe.stage.experts for name in DENSE)


def test_the_longer_run_of_the_tiny_model_has_the_same_arms(
    runs: dict[str, Run], manifest: Manifest
) -> None:
    longer = planned(manifest, group="demo_tiny")
    assert list(longer) == list(runs)
    steps = [each["stage2-speech"].recipe.stage.expert_steps["speech"] for each in (longer, runs)]
    assert steps[0] > steps[1]
    test_the_dense_model_sees_as_many_tokens(longer, manifest)


def test_an_arm_s_two_runs_differ_in_nothing_but_the_seed(runs: dict[str, Run]) -> None:
    for first, second in (MIXTURES, DENSE):
        one, other = runs[first].recipe, runs[second].recipe
        assert (one.trainer.seed, one.data.seed) == (0, 0)
        assert (other.trainer.seed, other.data.seed) == (1, 1)
        assert one.data.datasets == other.data.datasets
        assert one.stage == other.stage


def test_the_dense_model_sees_as_many_tokens(runs: dict[str, Run], manifest: Manifest) -> None:
    """At least as many as stages 2 and 3, and not a step more than that takes."""
    wanted = sum(
        planned_tokens(run.recipe, manifest)
        for name, run in runs.items()
        if name.startswith("stage2-") or name == MIXTURES[0]
    )
    for name in DENSE:
        recipe = runs[name].recipe
        steps = tokens_by_step(recipe, manifest)
        drawn = [next(steps) for _ in range(recipe.trainer.steps)]
        assert wanted <= sum(drawn) < wanted + drawn[-1]
        assert recipe.data.datasets == runs[MIXTURES[0]].recipe.data.datasets


def test_shortened_runs_are_compared_with_as_many_tokens(
    runs: dict[str, Run], manifest: Manifest
) -> None:
    short = planned(manifest, "trainer.steps=3")
    assert short["stage1"].recipe.trainer.steps == short[MIXTURES[0]].recipe.trainer.steps == 3
    for name in DENSE:
        assert 3 < short[name].recipe.trainer.steps < runs[name].recipe.trainer.steps
    test_the_dense_model_sees_as_many_tokens(short, manifest)


@pytest.mark.parametrize("entry", [demo, quickstart])
def test_what_tells_the_runs_apart_is_refused_before_anything(
    entry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "build_quickstart", lambda *_, **__: pytest.fail("built"))
    for name in ("name", "+stage.experts", "experts"):
        with pytest.raises(UserError, match=rf"^{name.strip('+')} cannot be set for all runs"):
            entry.main([f"{name}=x"])
    with pytest.raises(UserError, match=r"^trainer.seed, data.seed cannot be set"):
        main(["trainer.seed=3", "trainer.lr=1e-3", "++data.seed=3"])


def test_the_text_counts_the_experts_that_there_are(
    runs: dict[str, Run], manifest: Manifest
) -> None:
    text = described({name: run.recipe for name, run in runs.items()}, "Base: X.")
    assert text.startswith("Base: X. All models begin")
    assert "(experts trained: image, speech, audio) and stage 3 (4 experts, 1 of them" in text
    assert "The 4 equal experts take" in text
    silent = [
        e for e in manifest.entries if not {"audio", "speech"} & set(e.combination.split("+"))
    ]
    left = {each.dataset for each in silent}
    datasets = {
        split: {name: facts for name, facts in found.items() if name in left}
        for split, found in manifest.datasets.items()
    }
    fewer = planned(replace(manifest, entries=tuple(silent), datasets=datasets))
    text = described({name: run.recipe for name, run in fewer.items()}, "Base: X.")
    assert "(experts trained: image) and stage 3 (2 experts, 1 of them" in text
    assert "The 2 equal experts take" in text


def judged(title: str, right: dict[tuple[str, str], tuple[int, int]]) -> Judged:
    """An evaluation with so many right of so many, by (modality, task)."""
    records = [
        {"group": group, "dataset": task, "key": str(n), "exact": n < hits}
        for (group, task), (hits, total) in right.items()
        for n in range(total)
    ]
    return Judged(RecordedRun(Path(title), title, {}, ""), title, records)


def test_the_comparison_is_by_task_and_by_modality() -> None:
    arm = judged("MoE", {("image", "a"): (5, 10), ("image", "b"): (9, 10), ("text", "c"): (1, 10)})
    even = judged(
        "dense", {("image", "a"): (5, 10), ("image", "b"): (5, 10), ("text", "c"): (5, 10)}
    )
    assert modality_means(arm) == pytest.approx({"image": 0.7, "text": 0.1})
    assert spread(arm) == pytest.approx(0.3)
    assert spread(even) == 0
    table = comparison_tables([Arm(even, 1000, 2_000_000), Arm(arm, 1500, 10)], {"c": 0.2})
    assert "| `a` | 10 | unknown | 0.50 (0.24 to 0.76) | 0.50 (0.24 to 0.76) |" in table
    assert "| `c` | 10 | 0.20 | 0.50 (0.24 to 0.76) | 0.10 (0.02 to 0.40) * |" in table
    assert "| **spread** | 0.000 | 0.300 |" in table
    assert "| tokens after stage 1 | 1,000 | 1,500 |" in table


def test_the_pictures_show_every_model_and_every_expert() -> None:
    arms = [
        Arm(judged(f"{kind}, seed {seed}", {("image", "a"): (5, 10), ("text", "c"): (1, 10)}), 1, 1)
        for kind in ("MoE", "dense")
        for seed in (0, 1)
    ]
    shown = answers(arms, {"a": 0.2})
    for words in ("image: a", "text: c", "MoE, 2 seeds", "dense, 2 seeds", "majority answer"):
        assert words in shown.svg
    counts = np.ones((5, 2, 3))
    run = RecordedRun(Path("stage3"), "stage3", {}, "")
    names = ["base", "image", "x<y"]
    routing = Routing(run, names, ["image", "text"], [0, 2, 4, 6, 8], counts, [0.0] * 5, [(0, 0)])
    shown = experts(routing)
    for words in ("block 0", "block 4", "block 8", "x&lt;y"):
        assert words in shown.svg
    assert "block 2" not in shown.svg
