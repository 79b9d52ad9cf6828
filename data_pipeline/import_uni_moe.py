"""Brings Uni-MoE's released JSON into shards.

``python -m data_pipeline.import_uni_moe FILE.json FOLDER --media ROOT --voice speech`` reads a list
of records as it is, takes their media from the folders (``--media``) and zip files (``--zip``) that
are given, and adds a dataset to FOLDER. ``--voice audio`` where recordings are other sounds than
speech. Paths of another machine are exchanged by their beginnings: ``--map /path/to/=/data/``.
Records that cannot be used are named and left out; more than ``--leave-out`` stop it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from data_pipeline.conversation.original import learnt_otherwise
from data_pipeline.errors import DataError
from data_pipeline.importers.json_list import read_list
from data_pipeline.importers.media_places import MediaPlaces
from data_pipeline.importers.uni_moe_json import VOICES, BadRecordError, RecordReader
from data_pipeline.progress import progress
from data_pipeline.shards.index import MANIFEST_NAME, SPLITS, Manifest, load_manifest
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.schema import DATASET_NAME, Sample
from data_pipeline.shards.writer import ShardWriter

BUILDER = "uni_moe_json/1"
LEAVE_OUT = 100
"""Records that may be left out unless another number is given."""

Say = Callable[[str], None]


@dataclass
class _Report:
    """What was taken and what was not."""

    file: str
    most: int
    say: Say
    taken: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    otherwise: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, number: int, error: BadRecordError) -> None:
        note = f"{self.file} record {number}: {error}"
        self.say(f"left out: {note}")
        self.notes.append(note)
        self.bad[error.kind] += 1
        if self.bad.total() > self.most:
            raise DataError(
                f"{self.file}: more than {self.most} records cannot be used ({_listed(self.bad)}), "
                f"the last: record {number}: {error}; mend them, or allow more with --leave-out"
            )

    def take(self, sample: Sample) -> None:
        self.taken += 1
        turns = [{"from": turn.speaker, "value": turn.text} for turn in sample.turns]
        if why := learnt_otherwise(turns):
            self.otherwise[why] += 1

    def summary(self) -> list[str]:
        said = [f"{self.file}: {self.taken} records taken, {self.bad.total()} left out"]
        said[0] += f" ({_listed(self.bad)})" if self.bad else ""
        if self.otherwise:
            said.append(
                f"{self.file}: {self.otherwise.total()} of them Uni-MoE's published code masks, or "
                f"finds other answers in ({_listed(self.otherwise)}); under vicuna_v1 they are "
                "learnt as all others are"
            )
        return said


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.most_common())


def import_uni_moe(
    file: Path,
    folder: Path,
    reader: RecordReader,
    split: str = "train",
    leave_out: int = LEAVE_OUT,
    say: Say = print,
) -> Manifest:
    """Add the records of a JSON list to a data set as a dataset.

    The dataset appears by one rename when all of it is written; one shard holds one combination.

    Args:
        file: the list.
        folder: of the data set; made if it is not there.
        reader: makes samples of records.
        split: that they go to.
        leave_out: records that may be left out.
        say: where one-line messages go.

    Raises:
        DataError: the list cannot be read, too many records cannot be used, or the folder has the
            dataset already or was made by something else.
    """
    folder, place = folder.absolute(), folder.absolute() / split / reader.dataset
    expected = sum(1 for _ in read_list(file))  # whole JSON, or nothing is begun
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        before = _manifest(folder)
        if place.exists():
            raise DataError(f"{place} exists: choose another --dataset, or remove it")
        partial = folder / f".{reader.dataset}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        report = _Report(file.name, leave_out, say)
        try:
            _write(file, partial, reader, report, expected)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(place)
        options = dict(before.options) if before else {}
        options[f"{split}/{reader.dataset}"] = {"file": file.name, "voice": reader.voice}
        notes = (*(before.notes if before else ()), *report.summary(), *report.notes)
        manifest = write_manifest(folder, BUILDER, options=options, notes=notes)
    for line in report.summary():
        say(line)
    return manifest


def _manifest(folder: Path) -> Manifest | None:
    """The manifest of the data set that is added to, if there is one.

    Raises:
        DataError: something else than this command made it.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = load_manifest(folder)
    if manifest.builder.split("/")[0] not in (BUILDER.split("/")[0], "index"):
        raise DataError(f"{folder} was made by {manifest.builder}; choose another folder")
    return manifest


def _write(file: Path, place: Path, reader: RecordReader, report: _Report, expected: int) -> None:
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        records = progress(read_list(file), reader.dataset, expected)
        for number, record in enumerate(records):
            try:
                sample, media = reader.sample(record, number)
            except BadRecordError as error:
                report.leave_out(number, error)
                continue
            kind = sample.combination
            if kind not in writers:
                below = place / kind.replace("+", "-")
                writers[kind] = stack.enter_context(ShardWriter(below, reader.dataset, kind))
            writers[kind].write(sample, media)
            report.take(sample)
    if not report.taken:
        raise DataError(f"{file} has no record that can be used ({_listed(report.bad) or 'empty'})")


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not FROM=TO")
    return old, new


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.import_uni_moe", description=__doc__
    )
    parser.add_argument("file", type=Path, help="JSON list of records")
    parser.add_argument("folder", type=Path, help="data set that the dataset is added to")
    parser.add_argument(
        "--media", type=Path, action="append", default=[], help="folder of media (repeatable)"
    )
    parser.add_argument("--zip", type=Path, action="append", default=[], help="zip file of media")
    parser.add_argument(
        "--map",
        type=_pair,
        action="append",
        default=[],
        metavar="FROM=TO",
        help="exchange the beginning of paths (repeatable)",
    )
    parser.add_argument(
        "--voice", choices=VOICES, required=True, help="what voice and <audio> stand for"
    )
    parser.add_argument("--dataset", help="its name (default: that of the file)")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--leave-out", type=int, default=LEAVE_OUT, metavar="N", help="records that may be left out"
    )
    given = parser.parse_args(arguments)
    name = given.dataset or re.sub(r"[^A-Za-z0-9_-]", "_", given.file.stem)[:40]
    try:
        if not DATASET_NAME.fullmatch(name):
            raise DataError(f"dataset '{name}' is not 1-40 letters, digits, '_' or '-'")
        reader = RecordReader(name, given.voice, MediaPlaces(given.media, given.map, given.zip))
        import_uni_moe(given.file, given.folder, reader, given.split, given.leave_out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
