"""A run's model, answering questions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from data_pipeline.reading.collate import collate
from unimoe_mcore.checkpoints.loading import load_sources
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.trained import load_weights
from unimoe_mcore.generation.asked_run import AskedRun
from unimoe_mcore.generation.choosing import Chooser
from unimoe_mcore.generation.lockstep import Lockstep
from unimoe_mcore.generation.prompt import Prompt
from unimoe_mcore.generation.sampling import Sampling
from unimoe_mcore.generation.shares import ExpertShares, Shares
from unimoe_mcore.generation.text_stream import TextStream
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.towers.feature_cache import FeatureCache
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.runtime.precision import DTYPES


@dataclass(frozen=True)
class Answer:
    """What a run answered.

    Attributes:
        text: the answer.
        tokens: its token ids, without the end token.
        ended: ``end``: the model said its end token; ``length``: it had said as many tokens as it
            may; ``marker``: it said a token that is no text.
        question_experts: share of each expert by block, over the question's tokens.
        answer_experts: the same over the places at which the answer's tokens were said.
    """

    text: str
    tokens: list[int]
    ended: str
    question_experts: Shares
    answer_experts: Shares


def load_model(run: AskedRun, groups: ProcessGroupCollection) -> UniMoEModel:
    """The model of a run with the weights of its checkpoint, ready to answer.

    Raises:
        UserError: a file is damaged, or lacks what the model needs.
    """
    recipe = run.recipe
    checkpoint = ShardReader(run.checkpoint, verify=True)
    dtype, kernels = DTYPES[run.state.precision], transformer_flags(detect())
    model = build_model(recipe, groups, dict(run.tokenizer.markers), dtype, kernels)
    load_sources(model, run.sources, recipe)
    train_only(model, recipe.stage)  # what trains is what the checkpoint holds
    load_weights(checkpoint, [model])
    model.requires_grad_(False)
    for tower in model.modality_submodules.values():
        if isinstance(tower.features, FeatureCache):
            tower.features.stores = False  # files of people who ask are nobody's to keep
    return model.eval()


class Answerer:
    """Answers one question at a time, in the first of the processes that hold the model."""

    def __init__(self, run: AskedRun, model: UniMoEModel) -> None:
        self._run = run
        self._model = model
        self._lockstep = Lockstep(model)

    def answer(
        self, prompt: Prompt, sampling: Sampling, cached: bool = True
    ) -> Generator[str | Answer]:
        """The answer's text in pieces as they come, and last the whole answer.

        There is a piece after every token, often empty, so that it may be left at any token.
        Encoders run once.

        Args:
            cached: keep keys and values of earlier tokens instead of running them again.
        """
        tokenizer, chooser = self._run.tokenizer, Chooser(sampling)
        stream, tokens, ended = TextStream(tokenizer), list[int](), "length"
        with ExpertShares(self._model) as shares:
            for logits in self._steps(prompt, tokens, cached):
                token = chooser.choose(logits)
                if token == tokenizer.end or not tokenizer.is_text(token):
                    ended = "end" if token == tokenizer.end else "marker"
                    break
                tokens.append(token)
                shares.count_answer()
                yield stream.push(token)
        if piece := stream.rest():
            yield piece
        text = tokenizer.decode(tokens)
        yield Answer(text, tokens, ended, shares.question, shares.answer)

    @property
    def broken(self) -> bool:
        """Whether nothing can be asked any more, because this process must end."""
        return self._lockstep.broken

    def end(self) -> None:
        """Let the other processes end; nothing can be asked any more."""
        self._lockstep.end()

    @torch.no_grad()
    def _steps(self, prompt: Prompt, tokens: list[int], cached: bool) -> Iterator[Tensor]:
        """Logits of the next token, until there are as many as there may be.

        Args:
            tokens: of the answer so far; whoever takes logits adds one before the next.
        """
        hidden = self._embedded(prompt)
        room = len(hidden) + prompt.most
        cache = StaticInferenceContext(1, room) if cached else None
        for said in range(prompt.most):
            if said:
                latest = torch.tensor([[tokens[-1]]], device=device())
                new = self._model.get_text_embeddings(latest, torch.zeros_like(latest), {})[:, None]
                hidden = new if cached else torch.cat([hidden, new])
            yield self._lockstep.next_logits(hidden, cache)

    def _embedded(self, prompt: Prompt) -> Tensor:
        """The question's tokens, media in their places, ``[tokens, 1, hidden]``."""
        batch = collate([prompt.sample], self._run.tokenizer.pad, 1).to(device())
        return self._model.embed(batch)
