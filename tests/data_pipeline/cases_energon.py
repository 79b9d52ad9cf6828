"""Reads a set with Energon, in a process and, where need be, an environment of its own."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.edataclass import edataclass
from megatron.energon.flavors import Sample


@edataclass
class Raw(Sample):
    """A sample's members as they are."""

    members: dict[str, bytes]


@stateless
def cook(sample: dict[str, Any]) -> Raw:
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    return Raw(**basic_sample_keys(sample), members=members)


class AsTheyAre(DefaultTaskEncoder):
    """Hands the bytes through: no decoding, no batches."""

    cookers = [Cooker(cook)]  # noqa: RUF012
    decoder = None


def main(folder: Path) -> None:
    """Print key -> member -> [size, CRC-32] of every training sample, a JSON object."""
    dataset = get_val_dataset(
        folder,
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=AsTheyAre(),
    )
    found = {}
    for sample in get_loader(dataset):
        key = sample.__key__.rpartition("/")[2]
        found[key] = {name: [len(d), zlib.crc32(d)] for name, d in sample.members.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
