"""One run of a stage from start to gift: sources, model, data, loop, evaluation, artefact."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.timeline import PlanState, Timeline
from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.in_progress import left_in_progress
from data_pipeline.reading.loader import RowLoader, StepLoader, broken_at, step_of
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.quarantine import Quarantine
from data_pipeline.reading.sample import Sample
from data_pipeline.shards.index import Manifest
from data_pipeline.shards.schema import MIXED
from unimoe_mcore.checkpoints.artefact import TOKENIZER
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.checkpoints.giving import give
from unimoe_mcore.checkpoints.saving import Saved, Saver
from unimoe_mcore.checkpoints.sources import Sources, find_sources
from unimoe_mcore.checkpoints.starting import Start, find_start
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.trained import checkpoint_pieces
from unimoe_mcore.checkpoints.training import (
    CheckpointFolder,
    RunState,
    load_checkpoint,
    read_state,
)
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.parallel import lockstep_ranks, microbatch_multiple
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.evaluation.questions import Asked, ask, write_answers
from unimoe_mcore.evaluation.summary import held_out_losses, words
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.peak import Peak, matrix_peak
from unimoe_mcore.runtime.precision import choose_precision
from unimoe_mcore.runtime.run_directory import RunDirectory, given
from unimoe_mcore.training.agreement import decided_by_first_rank
from unimoe_mcore.training.announcement import announce
from unimoe_mcore.training.callbacks import Callback, Checkpoints, Metrics, Progress
from unimoe_mcore.training.costs import costs_of
from unimoe_mcore.training.data import (
    announce_samples,
    held_out_catalogue,
    open_data,
    phases,
    reading_job,
    train_tokenizer,
    training_catalogue,
)
from unimoe_mcore.training.feed import Feed
from unimoe_mcore.training.loop import train
from unimoe_mcore.training.mirrors import Mirrors
from unimoe_mcore.training.module import TrainModule
from unimoe_mcore.training.profile import Profile
from unimoe_mcore.training.step import train_step
from unimoe_mcore.training.validation import Validation, spread_rows

QUESTIONS = "questions-"
"""How the names of notes begin that are left while held-out questions are read."""


class StageRun:
    """A stage on this rank. Everything that can be refused is refused before the first step."""

    def __init__(self, recipe: Recipe, run: RunDirectory, groups: ProcessGroupCollection) -> None:
        self.recipe = recipe
        self.directory = run
        self.first_rank = dist.get_rank() == 0
        self.sources: Sources = find_sources(recipe)
        self.manifest: Manifest = open_data(recipe)
        decided_by_first_rank(self._forget_other_data)
        self.tokenizer = self._tokenizer()
        self.samples = training_catalogue(recipe, self.manifest, self.tokenizer)
        self.questions = self._held_out(recipe.trainer.evaluation.split, "evaluation")
        validates = recipe.trainer.validation
        self.validation_questions = (
            self._held_out(validates.split, "validation") if validates.every else None
        )
        self.costs = decided_by_first_rank(lambda: costs_of(recipe))
        self.precision = decided_by_first_rank(
            lambda: choose_precision(recipe.trainer.precision).value
        )
        self.peak: Peak = decided_by_first_rank(
            lambda: matrix_peak(self.precision, Path(recipe.paths.cache))
        )
        self.module = TrainModule(
            recipe,
            groups,
            dict(self.tokenizer.markers),
            transformer_flags(detect()),
            self.sources,
            self.precision,
            decided_by_first_rank(self._start),
        )
        self.checkpoints = CheckpointFolder(
            run.checkpoints, recipe.trainer.keep, recipe.trainer.keep_every
        )
        start = decided_by_first_rank(self._begin_saving)
        self.saver = Saver(self.checkpoints, dist.get_rank(), dist.get_world_size(), start)
        self.ranks = Ranks(
            self.module.data_ranks,
            lockstep_ranks(recipe.parallel),
            recipe.data.tokens_per_microbatch,
            microbatch_multiple(recipe.parallel),
        )
        decided_by_first_rank(self._quarantine_what_killed)
        self.quarantine = Quarantine(run.quarantine, writes=self.first_rank)
        known = decided_by_first_rank(self.quarantine.state)
        self.quarantine.restore(known)
        self.timeline = Timeline(self.samples.sources, phases(recipe, self.manifest))
        self.validation = self._validation()
        self._saving = 0

    def _held_out(self, split: str, purpose: str) -> Catalogue | None:
        return held_out_catalogue(self.recipe, self.manifest, self.tokenizer, split, purpose)

    def _validation(self) -> Validation | None:
        """What measures held-out losses, if the recipe asks for it and there are questions."""
        questions, trainer = self.validation_questions, self.recipe.trainer
        if questions is None and trainer.validation.give == "best":
            raise UserError(
                f"{self.manifest.folder} has no text questions in {trainer.validation.split} to "
                f"choose the best weights by: set trainer.validation.give=last."
            )
        if questions is None:
            return None
        rows = spread_rows(questions, trainer.validation.most)
        return Validation(
            trainer.validation,
            trainer.steps,
            self.recipe.name,
            self.directory,
            self.checkpoints,
            lambda: held_out_losses(self._ask(questions, self._records_routing, rows=rows).records),
            lambda step: self._save(step, best=True),
            len(rows),
        )

    @property
    def _records_routing(self) -> bool:
        """Whether it is looked where the tokens of held-out questions go."""
        return self.recipe.trainer.evaluation.routing and self.recipe.stage.kind == "moe"

    def _start(self) -> Start | None:
        """What ``stage.init_from`` names; once there are checkpoints, they hold what trains."""
        return None if self.directory.started else find_start(self.recipe, self.sources)

    def _forget_other_data(self) -> None:
        """Start afresh where the data have changed since and nothing was trained on them.

        A run with checkpoints goes on to see whether its plan allows the change.

        Raises:
            UserError: if the finished run was made from other data.
        """
        stamp, digest = self.directory.path / "data.txt", self.manifest.digest
        if stamp.is_file() and stamp.read_text(encoding="utf8") != digest:
            if given(self.directory):
                raise UserError(
                    f"{self.directory.path} was trained on other data than {self.manifest.folder} "
                    f"now holds: give this run another name (name=...) or delete that folder."
                )
            if not self.directory.started:
                self.directory.forget()
        write_text(stamp, digest)

    def _quarantine_what_killed(self) -> None:
        """Put the samples in quarantine at which processes of an earlier start died."""
        for note in sorted(self.directory.notes.glob("*")):
            left = left_in_progress(note)
            if left is not None and note.name.startswith(QUESTIONS):
                Quarantine(self.directory.left_out).add([broken_at(0, left.sample)])
            elif left is not None:
                found = broken_at(step_of(left.task), left.sample)
                Quarantine(self.directory.quarantine).add([found])
            note.unlink()

    def _tokenizer(self) -> TextTokenizer:
        """The base's tokenizer; a base stage trains its own, once."""
        if self.sources.base is not None:
            return TextTokenizer.load(self.sources.base_folder / TOKENIZER)
        path = self.directory.tokenizer

        def train_once() -> None:
            if not path.is_file():
                trained = train_tokenizer(self.recipe, self.manifest)
                write_text(path, trained.serialised())

        decided_by_first_rank(train_once)
        return TextTokenizer.load(path)

    def run(self) -> None:
        """Resume or start, train, evaluate, give; what is done already is not done again."""
        self.directory.write_version()
        announce(self.recipe, self.directory, self.module, self.precision, self.peak)
        catalogues = {
            "training": self.samples,
            "evaluation": self.questions,
            "validation": self.validation_questions,
        }
        read = {purpose: each for purpose, each in catalogues.items() if each is not None}
        announce_samples(self.directory, read)
        first = self._resume()
        decided_by_first_rank(self._forget_outdated)
        trainer = self.recipe.trainer
        if first == 0 and trainer.evaluation.before:
            self.evaluate("before")
        mirrors = Mirrors(self.directory, self.recipe)
        callbacks: list[Callback] = [
            Metrics(self.directory, self.peak.operations * dist.get_world_size()),
            Profile(trainer.profile, self.directory.path / "profile"),
            Progress(self.recipe.name, trainer.steps, trainer.log_every, self.first_rank),
            *([self.validation] if self.validation else []),
            mirrors,
            Checkpoints(
                trainer.checkpoint_every,
                trainer.steps,
                self._save,
                lambda: self._note(self.saver.poll()),
                lambda: self._note(self.saver.wait()),
            ),
        ]
        with self.pool(self.samples, self.directory.notes / f"rank-{dist.get_rank()}") as pool:
            feed = self.feed(pool)
            self._release_encoders(feed.loader.dealer, first)
            train(trainer, first, feed.read, partial(train_step, self.module), callbacks)
        if trainer.validation.give == "best" and not decided_by_first_rank(self._concluded):
            self._take_best()
        if trainer.evaluation.after:
            self.evaluate("after")
        if not decided_by_first_rank(lambda: given(self.directory, trainer.steps)):
            give(
                self.directory.gives,
                self.recipe,
                self.module.chunks,
                self.sources,
                self.manifest.digest,
                self.tokenizer,
            )
            self.directory.event("done", step=trainer.steps)
        mirrors.close()

    def _concluded(self) -> bool:
        """Whether nothing is left to do with the weights."""
        trainer = self.recipe.trainer
        judged = self.directory.evaluation("after", trainer.evaluation.split).is_file()
        return given(self.directory, trainer.steps) and (judged or not trainer.evaluation.after)

    def _take_best(self) -> None:
        """Put the weights of the best checkpoint into the model.

        Raises:
            UserError: if it is not there, or damaged.
        """

        def find() -> Path:
            best = self.checkpoints.best()
            if best is None:
                raise UserError(
                    f"{self.checkpoints.folder} has no best checkpoint to give: set "
                    f"trainer.validation.give=last and "
                    f"trainer.resume_changes=[validation.give]."
                )
            ShardReader(best, verify=True)
            return best

        best = decided_by_first_rank(find)
        load_checkpoint(best, self.module.chunks, self.module.optimizer)
        self.directory.event("takes the best", step=read_state(best).step)

    def _forget_outdated(self) -> None:
        """Forget the answers of a run that was done and now goes on."""
        trainer = self.recipe.trainer
        if given(self.directory) and not given(self.directory, trainer.steps):
            self.directory.evaluation("after", trainer.evaluation.split).unlink(missing_ok=True)

    def pool(self, catalogue: Catalogue, note: Path | None = None) -> ReaderPool:
        """Reads a catalogue's samples, decoded for the towers of this rank."""
        features = self.module.feature_folders()
        job = reading_job(self.recipe, catalogue, self.tokenizer, features, note)
        return ReaderPool(job, self.recipe.data.workers, self.recipe.data.sample_seconds)

    def feed(self, pool: ReaderPool) -> Feed:
        """This rank's micro-batches of the plan's steps."""
        data, module = self.recipe.data, self.module
        dealer = Dealer(self.samples, self.timeline, self.costs, self.ranks, data.deal)
        loader = StepLoader(
            dealer,
            pool,
            self.quarantine,
            module.data_rank,
            self.recipe.trainer.steps,
            data.prefetch if data.workers else 0,
        )
        copies = dist.get_world_size() // module.data_ranks
        return Feed(loader, self.quarantine, data, copies, self.tokenizer.pad)

    def _release_encoders(self, dealer: Dealer, step: int) -> None:
        """Keep only those encoders whose media the dealing gives to this rank."""
        given = "+".join(dealer.combinations_of(self.module.data_rank, step)).split("+")
        for tower in self.module.towers():
            if not {*tower.modalities, MIXED} & set(given):
                tower.features.release()

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            sources=self.sources.hashes,
            plan=self.timeline.state(step, self.quarantine.state()).to_json(),
            precision=self.precision,
        )

    def _begin_saving(self) -> str:
        """Remove what a killed start left half written; a name for what this start writes."""
        self.checkpoints.clear()
        return secrets.token_hex(4)

    def _save(self, step: int, best: bool = False) -> None:
        """Begin to save, unless this step's checkpoint is being saved already."""
        if step == self._saving:
            return
        self._saving = step
        pieces = checkpoint_pieces(self.module.chunks, self.module.optimizer)
        self.saver.save(pieces, self._state(step), best)

    def _note(self, saved: Sequence[Saved]) -> None:
        """Record the checkpoints that have become visible."""
        for each in saved:
            self.directory.event(
                "saved",
                step=each.step,
                stopped=round(each.stopped, 4),
                writing=round(each.writing, 4),
                bytes=each.bytes,
            )

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one.

        Returns:
            Steps that are done.

        Raises:
            UserError: if it stands on other sources, another plan or another number format.
        """

        def tell(folder: Path, reason: str) -> None:
            self.directory.event("damaged checkpoint", folder=str(folder), reason=reason)
            print(f"{self.recipe.name}: {reason} Going back to the one before.", flush=True)

        latest = decided_by_first_rank(lambda: self.checkpoints.newest_whole(tell))
        if latest is None:
            return 0
        state = read_state(latest)
        self._check_continues(state, latest)
        self._take_up_plan(state, latest)
        load_checkpoint(latest, self.module.chunks, self.module.optimizer)
        self.directory.event("resume", step=state.step)
        if self.first_rank and state.step < self.recipe.trainer.steps:
            print(f"{self.recipe.name}: continues from step {state.step}", flush=True)
        return state.step

    def _take_up_plan(self, state: RunState, folder: Path) -> None:
        """Go on in the plan where it was left; the number of ranks and the dealing may differ."""
        try:
            position = PlanState.from_json(state.plan)
            mixtures = phases(self.recipe, self.manifest)
            self.timeline = Timeline(self.samples.sources, mixtures, position)
            self.quarantine.restore(position.quarantine)
        except DataError as error:
            raise UserError(
                f"{folder}: {error}; or give this run another name (name=...), or delete "
                f"{folder.parent.parent}."
            ) from error

    def _check_continues(self, state: RunState, folder: Path) -> None:
        cure = f"give this run another name (name=...) or delete {folder.parent.parent}."
        for part in sorted({*state.sources, *self.sources.hashes}):
            before, after = state.sources.get(part, ""), self.sources.hashes.get(part, "")
            if before != after:
                raise UserError(
                    f"{folder} was trained with {part} {before[:12] or 'absent'}, the recipe's is "
                    f"{after[:12] or 'absent'}: {cure}"
                )
        if state.precision != self.precision:
            raise UserError(
                f"{folder} was computed in {state.precision}, this run would go on in "
                f"{self.precision}: set trainer.precision={state.precision}."
            )

    def evaluate(self, name: str) -> None:
        """Ask the held-out questions and record the answers, unless that is done."""
        settings = self.recipe.trainer.evaluation
        path = self.directory.evaluation(name, settings.split)
        if decided_by_first_rank(path.is_file):
            return
        if self.questions is None:
            if self.first_rank:
                write_answers(self.directory, name, settings.split, Asked([]), {})
                print(f"{self.recipe.name}: the data have no held-out text questions", flush=True)
            return
        shown = f"{self.recipe.name} {name}" if self.first_rank else ""
        asked = self._ask(self.questions, self._records_routing, shown)
        if self.first_rank:
            facts = self.manifest.datasets.get(settings.split, {})
            exact = write_answers(self.directory, name, settings.split, asked, facts)
            print(f"{self.recipe.name}: {name} training, {words(exact)}", flush=True)

    def _ask(
        self,
        questions: Catalogue,
        routing: bool = False,
        shown: str = "",
        rows: Sequence[int] | None = None,
    ) -> Asked:
        """Held-out questions' answers, on rank 0 (``evaluation/questions.py``)."""
        note = self.directory.notes / f"{QUESTIONS}{dist.get_rank()}"
        with self.pool(questions, note) as pool:
            loader = RowLoader(questions, pool, self.costs, self._left_out())
            return ask(
                self.module,
                loader,
                self.ranks,
                self._collate,
                self.tokenizer,
                routing,
                shown,
                rows,
            )

    def _left_out(self) -> Quarantine:
        """Held-out questions at which processes of an earlier start died."""
        left_out = Quarantine(self.directory.left_out, writes=self.first_rank)
        left_out.restore(decided_by_first_rank(left_out.state))
        return left_out

    def _collate(self, samples: Sequence[Sample]) -> MicroBatch:
        return collate(samples, self.tokenizer.pad, self.recipe.data.pad_to)
