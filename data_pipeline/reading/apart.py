"""Media decoded in a process of their own, with limits on its time and its memory.

For files that somebody hands over: whatever a decoder does with them - hang, crash, ask for all
memory - ends that process alone. ``python -m data_pipeline.reading.apart`` is that process. What
comes back is lines of JSON and arrays, never pickle: the process has met hostile bytes.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.reading.decode import probe_sound
from data_pipeline.reading.limits import BROKEN, LARGE, LIMITS, BrokenMediumError, DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from data_pipeline.reading.process import reading_environment
from unimoe_mcore.config.towers import EncoderConfig

MEMORY = 3 * 2**30
"""Bytes of address space that the process may take; the libraries themselves take half of one."""


@dataclass(frozen=True)
class Decoded:
    """A medium as its encoder is fed.

    Attributes:
        content: see ``prepare``.
        duration_ms: length of a recording, milliseconds; 0 for pictures and videos.
        moves: whether it is a picture with several frames, of which this is the first.
    """

    content: np.ndarray
    duration_ms: int
    moves: bool


def decode_apart(
    media: Sequence[tuple[Medium, EncoderConfig]],
    limits: DecodeLimits = LIMITS,
    seconds: float = 60.0,
) -> list[Decoded]:
    """Decode media for their encoders, as ``prepare`` does, in one other process.

    Args:
        media: each with its encoder.
        limits: of each of them.
        seconds: longest that it may take for each of them.

    Raises:
        BrokenMediumError: one cannot be decoded, or not within the limits.
    """
    for medium, _ in media:
        if len(medium.data) > limits.max_bytes:
            reason = f"{len(medium.data)} bytes are more than {limits.max_bytes}"
            raise BrokenMediumError(medium.source, reason, LARGE)
    if not media:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "data_pipeline.reading.apart"],
            input=b"".join(_order(media, limits, seconds * len(media))),
            env=reading_environment(),
            capture_output=True,
            timeout=seconds * len(media),
        )
    except subprocess.TimeoutExpired as error:
        found = _results(media, error.stdout or b"")
        reason, kind = f"decoding it took longer than {seconds:g} s", LARGE
    else:
        found = _results(media, done.stdout)
        reason, kind = f"decoding it ended the process ({_cause(done.returncode)})", BROKEN
    if len(found) < len(media):  # the one that it was at
        raise BrokenMediumError(media[len(found)][0].source, reason, kind)
    return found


def _order(
    media: Sequence[tuple[Medium, EncoderConfig]], limits: DecodeLimits, seconds: float
) -> Iterator[bytes]:
    yield json.dumps({"seconds": seconds, "limits": asdict(limits)}).encode() + b"\n"
    for medium, encoder in media:
        facts = {
            "modality": medium.modality,
            "source": medium.source,
            "encoder": asdict(encoder),
            "bytes": len(medium.data),
        }
        yield json.dumps(facts).encode() + b"\n"
        yield medium.data


def _results(media: Sequence[tuple[Medium, EncoderConfig]], output: bytes) -> list[Decoded]:
    """What came of the media as far as there is a whole result of each.

    Raises:
        BrokenMediumError: the process refused one.
    """
    found: list[Decoded] = []
    file = io.BytesIO(output)
    for medium, _ in media:
        head = file.readline()
        if not head.endswith(b"\n"):
            break
        said = json.loads(head)
        if "reason" in said:
            raise BrokenMediumError(medium.source, said["reason"], said["kind"])
        array = file.read(said["bytes"])
        if len(array) < said["bytes"]:
            break
        content = np.load(io.BytesIO(array), allow_pickle=False)
        found.append(Decoded(content, int(said["duration_ms"]), bool(said["moves"])))
    return found


def _cause(code: int) -> str:
    names = {member.value: member.name for member in signal.Signals}
    return f"exit status {code}" if code >= 0 else str(names.get(-code, -code))


def _decode(
    medium: Medium, encoder: EncoderConfig, limits: DecodeLimits
) -> tuple[dict[str, Any], bytes]:
    """What to say of a medium, and its array."""
    try:
        content = prepare(medium, encoder, limits)
        sound = medium.modality in ("speech", "audio")
        duration_ms = probe_sound(medium, limits).duration_ms if sound else 0
    except BrokenMediumError as error:
        return {"reason": error.reason, "kind": error.kind}, b""
    file = io.BytesIO()
    np.save(file, content, allow_pickle=False)
    moves = medium.modality == "image" and _moves(medium.data)
    return {"duration_ms": duration_ms, "moves": moves, "bytes": file.tell()}, file.getvalue()


def _moves(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as picture:
        return bool(getattr(picture, "is_animated", False))


def main() -> None:
    """Decode the media on stdin to stdout; the first that cannot be is the last."""
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    order = json.loads(given.readline())
    processor = int(order["seconds"]) + 5  # should whoever waits be gone
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
    while line := given.readline():
        facts = json.loads(line)
        medium = Medium(facts["modality"], given.read(facts["bytes"]), facts["source"])
        encoder, limits = EncoderConfig(**facts["encoder"]), DecodeLimits(**order["limits"])
        said, array = _decode(medium, encoder, limits)
        taken.write(json.dumps(said).encode() + b"\n" + array)
        taken.flush()
        if "reason" in said:
            return


if __name__ == "__main__":
    main()
