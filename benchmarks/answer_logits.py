"""A training step with logits at the answers only, against logits at every token.

Needs the quickstart's base and data: ``python -m benchmarks.answer_logits [paths.runs=...]``.
"""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from benchmarks.side_by_side import compare, write  # noqa: E402
from data_pipeline.reading.collate import MicroBatch  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.model.unimoe import UniMoEModel  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.run_directory import RunDirectory  # noqa: E402
from unimoe_mcore.training.stage import StageRun  # noqa: E402
from unimoe_mcore.training.step import train_step  # noqa: E402


def everywhere(self: UniMoEModel, batch: MicroBatch) -> torch.Tensor:
    return torch.arange(batch.input_ids.shape[1])


def main() -> None:
    recipe = compose_recipe("stage1", ["parallel.processes=1", *sys.argv[1:]], world_size=1)
    collection = groups.initialise(recipe.parallel)
    stage = StageRun(recipe, RunDirectory(Path(tempfile.mkdtemp())), collection)
    batches = stage.feed(stage.pool(stage.samples)).read(0)
    answers = UniMoEModel.answer_places

    def step(places: object) -> None:
        UniMoEModel.answer_places = places  # type: ignore[method-assign, assignment]
        train_step(stage.module, batches, 0)

    row = compare(
        f"stage 1, {batches[0].tokens} tokens, {batches[0].label_tokens} of them answers",
        ("answers", lambda: step(answers)),
        ("all tokens", lambda: step(everywhere)),
    )
    write("answer_logits", "Logits at the answers only, one process, one thread", [row])
    groups.destroy()


if __name__ == "__main__":
    main()
