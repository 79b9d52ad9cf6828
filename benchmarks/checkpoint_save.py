"""One checkpoint of the quickstart's base: our storage against Megatron's torch_dist format."""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from megatron.core import dist_checkpointing  # noqa: E402

from benchmarks.side_by_side import compare, write  # noqa: E402
from unimoe_mcore.checkpoints.sources import Sources  # noqa: E402
from unimoe_mcore.checkpoints.training import CheckpointFolder, RunState  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.training.module import TrainModule  # noqa: E402


def main() -> None:
    recipe = compose_recipe("base", ["parallel.processes=1"])
    collection = groups.initialise(recipe.parallel)
    markers = {"image": 4, "video": 5, "speech": 6, "audio": 7}
    module = TrainModule(
        recipe, collection, markers, transformer_flags(detect()), Sources(), "fp32"
    )
    folder = Path(tempfile.mkdtemp())
    ours = CheckpointFolder(folder / "ours", keep=1)

    def save_ours() -> None:
        ours.save(module.chunks, module.optimizer, RunState(1, {}, {}, "fp32"))

    def save_theirs() -> None:
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        (folder / "theirs").mkdir(parents=True)
        state = {"model": module.chunks[0].sharded_state_dict()}
        state["optimizer"] = module.optimizer.sharded_state_dict(state)
        dist_checkpointing.save(state, str(folder / "theirs"))

    row = compare(
        "3.64 M weights with Adam's moments, one process",
        ("safetensors + index", save_ours),
        ("torch_dist", save_theirs),
        rounds=5,
    )
    write("checkpoint_save", "Writing one checkpoint", [row])
    groups.destroy()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
