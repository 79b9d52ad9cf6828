"""Measured costs: a file that a run deals by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.planning.cost import CostModel
from tests.conftest import World
from tests.workspace import branch, overrides
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.training.costs import costs_of, estimated_costs


def test_measured_costs_are_what_a_recipe_then_deals_by(world: World, tmp_path: Path) -> None:
    place = branch(world.folder, tmp_path / "world")
    (place / "cache").unlink()  # the world's, which nobody may change
    given = overrides(place)
    command = [sys.executable, "-m", "unimoe_mcore.calibrate", "stage1", *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file = place / "cache" / "costs" / "stage1.json"
    assert f"data.costs={file}" in done.stdout
    costs = costs_of(compose_recipe("stage1", [*given, f"data.costs={file}"]))
    assert costs == CostModel.load(file)
    assert costs.linear > 0
    assert set(costs.encoder) == {"image", "video", "speech", "audio"}
    assert all(seconds > 0 for seconds in costs.encoder.values())
    assert "measured on" in costs.source
    # Without the file they are counted.
    assert costs_of(compose_recipe("stage1", given)) != costs


def test_counted_costs_follow_the_sizes() -> None:
    """A quarter more width costs a quarter more squared; a mixture costs one more MLP a block."""
    small = estimated_costs(compose_recipe("stage1", ["model.language.hidden=256"]))
    large = estimated_costs(
        compose_recipe("stage1", ["model.language.hidden=512", "model.language.ffn=1344"])
    )
    assert large.linear == 4 * small.linear
    assert large.quadratic == 2 * small.quadratic
    mixture = estimated_costs(compose_recipe("stage3", []))
    mlp = 3 * 256 * 672
    assert mixture.linear - small.linear == 4 * 2 * mlp  # two of four blocks, forward and input
    assert small.encoder["image"] == 2 * 407e6 * (160 / 224) ** 2
    assert small.encoder["image"] == small.encoder["video"]
