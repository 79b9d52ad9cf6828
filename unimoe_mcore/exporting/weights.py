"""The weights of a run by our names, wherever they lie, read one at a time.

A run keeps what it trained; everything else is in what it stands on. What is looked for is found in
the order in which ``unimoe_mcore.checkpoints.loading`` fills a model, without building one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.model.initialise import initial_value

LANGUAGE = "language_model."
_MLP = re.compile(r"\.mlp\.(linear_fc[12]\.weight)$")


@dataclass(frozen=True)
class Held:
    """Tensors that a run keeps itself.

    Attributes:
        reader: of its checkpoint, or of what it gave.
        prefix: what their names begin with there.
    """

    reader: ShardReader
    prefix: str = ""

    def stored(self, name: str) -> str | None:
        """What a tensor is called there; None if it is not."""
        full = self.prefix + name
        return full if full in self.reader.tensors else None


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: ``W x + scale * B A x``.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scale: of their product.
    """

    a: Deferred
    b: Deferred
    scale: float


@dataclass(frozen=True)
class Weights:
    """Where a model's tensors are. Names are those on disk, of experts those of a dense MLP.

    Attributes:
        own: what the run keeps itself; None for a base.
        base: of the base; None where it is not known, and nothing but ``own`` is asked for.
        experts: of every expert's artefact, in order; the base's for its own MLP.
        connectors: tower -> where its connector lies if the run did not train it.
        dtype: in which the run computes; every tensor is rounded to it.
        scale: of adapters.
        seed: of what no file holds, because the run never trained it.
        language: shape of the model.
    """

    own: Held | None
    base: ShardReader | None
    experts: Sequence[ShardReader]
    connectors: dict[str, ShardReader]
    dtype: torch.dtype
    scale: float
    seed: int
    language: LanguageConfig

    def weight(self, name: str, expert: int | None = None) -> Deferred:
        """A tensor without its adapter.

        Args:
            name: on disk; an expert's as that of a dense MLP.
            expert: its number; None where the block is dense.

        Raises:
            UserError: if it is nowhere.
        """
        own = self._own(name if expert is None else _stacked(name), expert)
        if own is not None:
            return own
        reader = self.base if expert is None else self.experts[expert]
        if reader is None or name not in reader.tensors:
            where = "" if reader is None else f" in {reader.folder}"
            raise UserError(f"There is no tensor {name}{where}: the model cannot be exported.")
        return self._deferred(reader, name, None)

    def router(self, name: str, experts: int) -> Deferred:
        """A router's weight, ``[experts, hidden]``; its initial value if it never trained."""
        own = self._own(name, None)
        if own is not None:
            return own
        shape = (experts, self.language.hidden)

        def read() -> Tensor:
            return initial_value(name, shape, self.seed, self.language).to(self.dtype)

        return Deferred(shape, read)

    def adapter(self, name: str, expert: int | None = None) -> Adapter | None:
        """The adapter on a weight, if the run has one there."""
        stem = (name if expert is None else _stacked(name)).removesuffix("weight")
        a, b = (self._own(f"{stem}lora_{half}.weight", expert) for half in "ab")
        return None if a is None or b is None else Adapter(a, b, self.scale)

    def merged(self, name: str, expert: int | None = None) -> Deferred:
        """A weight with its adapter added, in fp32 if it has one (``model.lora.merge_lora``)."""
        weight, adapter = self.weight(name, expert), self.adapter(name, expert)
        if adapter is None:
            return weight

        def read() -> Tensor:
            product = adapter.b.read().float() @ adapter.a.read().float()
            return weight.read().float() + adapter.scale * product

        return Deferred(weight.shape, read)

    def tower(self, tower: str) -> dict[str, Deferred]:
        """All of a connector, and of its encoder if a run has trained that."""
        beginnings = (f"connector.{tower}.", f"encoder.{tower}.")
        found: dict[str, Deferred] = {}
        if tower in self.connectors:
            reader = self.connectors[tower]
            for name in reader.tensors:
                if name.startswith(beginnings):
                    found[name] = self._deferred(reader, name, None)
        for name in self._own_names():
            if name.startswith(beginnings):
                own = self._own(name, None)
                assert own is not None
                found[name] = own
        return dict(sorted(found.items()))

    @property
    def adapted(self) -> bool:
        """Whether the run has adapters."""
        return any(".lora_a." in name for name in self._own_names())

    def _own_names(self) -> Iterator[str]:
        if self.own is not None:
            for name in self.own.reader.tensors:
                if name.startswith(self.own.prefix):
                    yield name.removeprefix(self.own.prefix)

    def _own(self, name: str, expert: int | None) -> Deferred | None:
        stored = None if self.own is None else self.own.stored(name)
        if stored is None:
            return None
        assert self.own is not None
        return self._deferred(self.own.reader, stored, expert)

    def _deferred(self, reader: ShardReader, name: str, expert: int | None) -> Deferred:
        """A tensor, or an expert's slice of a stack ``[experts, ...]``."""
        shape = reader.tensors[name].shape
        if expert is None:
            return Deferred(shape, lambda: reader.read(name).to(self.dtype))
        offset = (expert, *[0] * (len(shape) - 1))

        def read() -> Tensor:
            return reader.read(name, offset, (1, *shape[1:]))[0].to(self.dtype)

        return Deferred(shape[1:], read)


def _stacked(name: str) -> str:
    """The stack of experts that a dense MLP's weight has become a slice of."""
    return _MLP.sub(r".mlp.experts.experts.\1", name)


def readers_of(folders: Sequence[Path | None], base: ShardReader) -> list[ShardReader]:
    """A reader for every folder, each folder read once; the base's for None."""
    opened = {folder: ShardReader(folder) for folder in set(folders) if folder is not None}
    return [base if folder is None else opened[folder] for folder in folders]
