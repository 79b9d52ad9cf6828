"""With the distributed optimizer and without, saved in one layout and continued in any other.

The checkpoint holds the same bits whichever layout writes it after reading it. Losses and gradient
norms: 1e-5 (relative, fp32), because layouts add the same numbers in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.cases_layouts import contents
from tests.conftest import World
from tests.distributed import run_distributed

CASES = "tests.checkpoints.cases_layouts:runs"
TOLERANCE = 1e-5
ON = "parallel.distributed_optimizer=true"
NO_ROUTING = "trainer.evaluation.routing=false"
EP1, EP2, EP4 = (f"parallel.expert={size}" for size in (1, 2, 4))
PP2 = "parallel.pipeline=2"
BF16 = "trainer.precision=bf16"


def case(recipe: str, *extra: str, steps: tuple[int, int] = (0, 3), **more: str) -> dict[str, Any]:
    return {"recipe": recipe, "extra": [*extra, NO_ROUTING], "steps": steps, **more}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def four(world: World, saved: Path) -> dict[str, Any]:
    """Four processes: what is compared with one, and all ways to go on, in one launch."""
    first, half = str(saved / "first"), str(saved / "bf16")
    cases = {
        "stage1 PP2": case("stage1", ON, PP2),
        "stage3": case("stage3", ON, EP2, steps=(0, 2), save=first),
        "EP4 off": case("stage3", EP4, steps=(2, 4), load=first, save=f"{first} EP4 off"),
        "PP2 EP2 on": case(
            "stage3", ON, PP2, EP2, steps=(2, 4), load=first, save=f"{first} PP2 EP2 on"
        ),
        "bf16": case("stage3", ON, EP2, BF16, steps=(0, 2), save=half),
        "bf16 EP4 off": case(
            "stage3", EP4, BF16, steps=(2, 3), load=half, save=f"{half} EP4 off"
        ),
    }  # fmt: skip
    ranks = run_distributed(CASES, 4, timeout=280, folder=str(world.folder), cases=cases)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.fixture(scope="module")
def one(world: World, saved: Path, four: dict[str, Any]) -> dict[str, Any]:
    """One process: the reference, and going on from what four have saved."""
    first, half = str(saved / "first"), str(saved / "bf16")
    cases = {
        "stage1": case("stage1"),
        "stage3": case("stage3", EP1, steps=(0, 4)),
        "EP1 off": case("stage3", EP1, steps=(2, 4), load=first, save=f"{first} EP1 off"),
        "bf16 EP1 on": case("stage3", EP1, ON, BF16, steps=(2, 3), load=half, save=f"{half} on"),
    }
    return run_distributed(CASES, 1, timeout=200, folder=str(world.folder), cases=cases)[0]


def same(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert len(found) == len(wanted) > 0
    for pair, expected in zip(found, wanted, strict=True):
        assert pair == pytest.approx(expected, rel=TOLERANCE)
        assert pair[1] > 0


@pytest.mark.parametrize("name", ["stage1 PP2", "stage3"])
def test_the_distributed_optimizer_trains_like_one_process(
    name: str, four: dict[str, Any], one: dict[str, Any]
) -> None:
    assert four[name]["optimizers"] == ["DistributedOptimizer"]
    log = four[name]["log"]
    same(log, one[name.split()[0]]["log"][: len(log)])


@pytest.mark.parametrize("name", ["EP4 off", "PP2 EP2 on", "EP1 off"])
def test_any_layout_goes_on_with_the_same_bits(
    name: str, four: dict[str, Any], one: dict[str, Any], saved: Path
) -> None:
    run = (four | {n: r for n, r in one.items() if " " in n})[name]
    assert run["optimizers"] == ["DistributedOptimizer" if name.endswith("on") else "FP32Optimizer"]
    same(run["log"], one["stage3"]["log"][2 : 2 + len(run["log"])])
    same_contents(saved / "first", saved / f"first {name}")


def same_contents(first: Path, second: Path) -> None:
    before, after = contents(first), contents(second)
    assert before.keys() == after.keys()
    for name, (step, value) in before.items():
        assert step == (2 if name.startswith("optimizer.") else None)
        assert after[name][0] == step
        assert torch.equal(after[name][1], value), name


def test_sixteen_bit_weights_keep_their_fp32_copies(one: dict[str, Any], saved: Path) -> None:
    for name in ("EP4 off", "on"):
        same_contents(saved / "bf16", saved / f"bf16 {name}")
    (name,) = [n for n in contents(saved / "bf16") if n.endswith("image.project.0.weight")][:1]
    value = contents(saved / "bf16")[name][1]
    assert not torch.equal(value, value.bfloat16().float())
    assert one["bf16 EP1 on"]["optimizers"] == ["DistributedOptimizer"]


def test_only_what_trains_is_saved(saved: Path) -> None:
    names = contents(saved / "first")
    parts = (".lora_a.", ".lora_b.", ".router.", "connector.")
    assert [name for name in names if not any(part in name for part in parts)] == []
    for part in parts:
        assert any(part in name for name in names)
    moments = [name for name in names if name.startswith("optimizer.")]
    assert len(moments) * 3 == len(names) * 2
