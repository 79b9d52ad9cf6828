"""One run of a stage from start to gift: sources, model, data, loop, evaluation, artefact."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.plan import plan_difference
from data_pipeline.shards.index import Manifest, load_manifest
from data_pipeline.shards.integrity import verify
from unimoe_mcore.checkpoints.artefact import TOKENIZER
from unimoe_mcore.checkpoints.giving import give
from unimoe_mcore.checkpoints.loading import Sources, find_sources
from unimoe_mcore.checkpoints.training import (
    CheckpointFolder,
    RunState,
    load_checkpoint,
    read_state,
)
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.evaluation.questions import ask, write_records
from unimoe_mcore.model.unimoe import count_parameters
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.callbacks import Callback, Checkpoints, Metrics, Progress
from unimoe_mcore.training.data import split_reader, train_tokenizer, training_reader
from unimoe_mcore.training.loop import train
from unimoe_mcore.training.module import TrainModule


class StageRun:
    """A stage on this rank. Everything that can be refused is refused before the first step."""

    def __init__(self, recipe: Recipe, run: RunDirectory, groups: ProcessGroupCollection) -> None:
        self.recipe = recipe
        self.directory = run
        self.first_rank = dist.get_rank() == 0
        self.sources: Sources = find_sources(recipe)
        self.manifest: Manifest = self._verified_data()
        self.tokenizer = self._tokenizer()
        self.reader, self.plan = training_reader(recipe, self.manifest, self.tokenizer)
        self.module = TrainModule(
            recipe,
            groups,
            dict(self.tokenizer.markers),
            transformer_flags(detect()),
            self.sources,
        )
        self.checkpoints = CheckpointFolder(run.checkpoints, recipe.trainer.keep)

    @property
    def base_hash(self) -> str:
        """Hash of the base this run stands on; empty for the base stage."""
        return self.sources.base.hash if self.sources.base else ""

    def _verified_data(self) -> Manifest:
        """The data's manifest, once one process of this node has checked the shards."""
        folder = Path(self.recipe.data.folder)
        if self.first_rank:
            verify(folder)
        dist.barrier()
        return load_manifest(folder)

    def _tokenizer(self) -> TextTokenizer:
        """The base's tokenizer; a base stage trains its own, once."""
        if self.sources.base is not None:
            return TextTokenizer.load(self.sources.base_folder / TOKENIZER)
        if self.first_rank and not self.directory.tokenizer.is_file():
            trained = train_tokenizer(self.manifest, self.recipe.model.language.vocabulary)
            partial = self.directory.tokenizer.with_name(".tokenizer.json.partial")
            trained.save(partial)
            partial.replace(self.directory.tokenizer)
        dist.barrier()
        return TextTokenizer.load(self.directory.tokenizer)

    def run(self) -> None:
        """Resume or start, train, evaluate, give. Does nothing that is already done."""
        self.directory.write_version()
        self._announce()
        first = self._resume()
        trainer = self.recipe.trainer
        if first == 0 and trainer.evaluation.before:
            self.evaluate("before")
        callbacks: list[Callback] = [
            Metrics(self.directory, self.recipe),
            Progress(self.recipe.name, trainer.steps, trainer.log_every, self.first_rank),
            Checkpoints(trainer.checkpoint_every, trainer.steps, self._save),
        ]
        module, reader = self.module, self.reader
        train(
            trainer,
            first,
            lambda step: reader.step(self.plan, step, module.data_rank, module.data_ranks),
            module.train_step,
            callbacks,
        )
        if trainer.evaluation.after:
            self.evaluate("after")
        give(self.directory.gives, self.recipe, module.chunks, self.base_hash, self.tokenizer)
        self.directory.event("done", step=trainer.steps)

    def _announce(self) -> None:
        total, trained = count_parameters(self.module.chunks[0])
        parts = dict(sorted(self.module.trained.items()))
        self.directory.event(
            "start", parameters=total, trained=trained, parts=parts, ranks=dist.get_world_size()
        )
        if self.first_rank:
            listed = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items())
            print(
                f"{self.recipe.name}: {total / 1e6:.2f} M parameters on rank 0, "
                f"{trained / 1e6:.2f} M train ({listed}), {dist.get_world_size()} processes, "
                f"EP={self.recipe.parallel.expert}",
                flush=True,
            )

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            base=self.base_hash,
            plan=self.plan.fingerprint(),
            datasets=[share.name for share in self.plan.datasets],
            recipe=_fingerprint(self.recipe),
        )

    def _save(self, step: int) -> None:
        self.checkpoints.save(self.module.chunks, self.module.optimizer, self._state(step))

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one.

        Returns:
            Steps that are done.

        Raises:
            UserError: if it stands on another base or plan.
        """
        latest = self.checkpoints.latest()
        if latest is None:
            return 0
        state = read_state(latest)
        now = self._state(state.step)
        if state.base != now.base:
            raise UserError(
                f"{latest} stands on base {state.base[:12]}, the recipe's base is "
                f"{now.base[:12]}: give this run another name (name=...) or delete {latest.parent}."
            )
        if state.plan != now.plan:
            difference = plan_difference(state.datasets, now.datasets)
            raise UserError(
                f"{latest} was trained on another data plan: the recipe now draws {difference}; "
                f"give this run another name (name=...) or delete {latest.parent}."
            )
        load_checkpoint(latest, self.module.chunks, self.module.optimizer, state.step)
        self.directory.event("resume", step=state.step)
        if self.first_rank:
            print(f"{self.recipe.name}: continues from step {state.step}", flush=True)
        return state.step

    def evaluate(self, name: str) -> None:
        """Ask the held-out questions and record the answers under ``evaluation/<name>.jsonl``."""
        if self.directory.evaluation(name).is_file():
            return
        settings = self.recipe.trainer.evaluation
        wanted = self._held_out(settings.split)
        reader = split_reader(
            self.recipe, self.manifest, self.tokenizer, settings.split, dict.fromkeys(wanted, 1.0)
        )
        routing = settings.routing and self.recipe.stage.kind == "moe"
        records = ask(self.module, reader, routing)
        if self.first_rank:
            write_records(self.directory.evaluation(name), records)
            self.directory.event(f"evaluated {name}", **summary(records))
            exact = summary(records)["exact"]
            print(f"{self.recipe.name}: {name} training, {_words(exact)}", flush=True)

    def _held_out(self, split: str) -> list[str]:
        """Datasets of the split that this stage is asked: text for a base, else all it can take."""
        chosen = self.recipe.data.evaluation_datasets
        return [
            name
            for name, facts in self.manifest.datasets.get(split, {}).items()
            if (not chosen or name in chosen)
            and (self.recipe.stage.kind != "base" or facts.combination == "text")
        ]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of exact answers per dataset, and loss per label token per group."""
    exact: dict[str, list[bool]] = {}
    losses: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        exact.setdefault(record["dataset"], []).append(record["exact"])
        losses.setdefault(record["group"], []).append((record["loss"], record["tokens"]))
    return {
        "exact": {name: sum(hits) / len(hits) for name, hits in exact.items()},
        "loss": {
            name: sum(loss for loss, _ in pairs) / max(1, sum(tokens for _, tokens in pairs))
            for name, pairs in losses.items()
        },
    }


def _words(exact: dict[str, float]) -> str:
    mean = sum(exact.values()) / max(1, len(exact))
    each = ", ".join(f"{name} {share:.2f}" for name, share in exact.items())
    return f"held-out questions right: {each}; mean {mean:.3f}"


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()
