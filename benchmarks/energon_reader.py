"""Energon's reading: ``python -m benchmarks.energon_reader`` in an environment that has Energon.

It takes the same commands as ``benchmarks.readers``. What it does follows Energon's guide: a cooker
hands a sample's bytes on, the task encoder decodes and packs, the savable loader keeps its own
snapshots as often as by default.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Batch,
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.edataclass import edataclass
from megatron.energon.flavors import Sample

from benchmarks.children import serve
from benchmarks.reading_work import BATCH, SHUFFLED, Work, timed
from data_pipeline.reading.collate import MicroBatch
from data_pipeline.reading.sample import Sample as OurSample


@edataclass
class Raw(Sample):
    """A sample's members as they are."""

    members: dict[str, bytes]


@edataclass
class Decoded(Sample):
    """A sample ready to be packed."""

    sample: OurSample


@edataclass
class Packed(Batch):
    """A packed batch."""

    packed: MicroBatch


@stateless
def cook(sample: dict[str, Any]) -> Raw:
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    return Raw(**basic_sample_keys(sample), members=members)


class Encoder(DefaultTaskEncoder):
    """Does the common work."""

    cookers = [Cooker(cook)]  # noqa: RUF012
    decoder = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._work = Work(folder)

    @stateless
    def encode_sample(self, sample: Raw) -> Decoded:
        key = sample.__key__.rpartition("/")[2]
        return Decoded.derive_from(sample, sample=self._work.sample(key, sample.members))

    @stateless
    def batch(self, samples: list[Decoded]) -> Packed:
        packed = self._work.batch([each.sample for each in samples])
        return Packed.from_samples(samples, packed=packed)


def _loader(folder: Path, workers: int) -> Any:
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=SHUFFLED,
        task_encoder=Encoder(folder),
    )
    return get_savable_loader(dataset)


def _packed(loader: Any) -> Iterator[MicroBatch]:
    return (batch.packed for batch in loader)


def energon(folder: str, workers: int, samples: int) -> dict[str, Any]:
    """A pass: its stream has no end, so that it stops after so many samples."""
    return timed(_packed(_loader(Path(folder), workers)), samples)


def _state(folder: Path, workers: int) -> Path:
    return folder / f"energon-{workers}.pt"


def save(folder: str, step: int, workers: int) -> dict[str, Any]:
    """Go to a step and write the state there."""
    loader = _loader(Path(folder), workers)
    began = time.perf_counter()
    for _ in islice(iter(loader), step):
        pass
    torch.save(loader.save_state_rank(), _state(Path(folder), workers))
    return {"seconds": time.perf_counter() - began}


def restart(folder: str, workers: int) -> dict[str, Any]:
    """Seconds from nothing but imported modules to the first batch at the saved state."""
    began = time.perf_counter()
    loader = _loader(Path(folder), workers)
    state = torch.load(_state(Path(folder), workers), weights_only=False)
    loader.restore_state_rank(state)
    batch = next(_packed(loader))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "keys": [sample.key for sample in batch.samples]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"energon": energon, "save": save, "restart": restart})
