"""Media decoded in a process of their own, with limits on its time and its memory.

For files that somebody hands over: whatever a decoder does with them - hang, crash, ask for all
memory - ends that process alone. ``python -m data_pipeline.reading.apart`` is that process. What
comes back is lines of JSON and arrays, never pickle: the process has met hostile bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from data_pipeline.modalities import modality
from data_pipeline.reading.limits import BROKEN, LARGE, LIMITS, BrokenMediumError, DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.pictures import moves
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
    together: float = 120.0,
) -> list[Decoded]:
    """Decode media for their encoders, as ``prepare`` does, in one other process.

    Args:
        media: each with its encoder.
        limits: of each of them.
        seconds: longest that each of them may take.
        together: longest that all of them may take.

    Raises:
        BrokenMediumError: one cannot be decoded, or not within the limits.
    """
    for medium, _ in media:
        if len(medium.data) > limits.max_bytes:
            reason = f"{len(medium.data)} bytes are more than {limits.max_bytes}"
            raise BrokenMediumError(medium.source, reason, LARGE)
    if not media:
        return []
    code, output = _run(_order(media, limits, seconds, together), together)
    found = _results(media, output)
    if len(found) < len(media):  # the one that it was at
        if code is None:
            reason, kind = f"decoding all files took longer than {together:g} s", LARGE
        elif code == -signal.SIGALRM:
            reason, kind = f"decoding it took longer than {seconds:g} s", LARGE
        else:
            reason, kind = f"decoding it ended the process ({_cause(code)})", BROKEN
        raise BrokenMediumError(media[len(found)][0].source, reason, kind)
    return found


def _run(order: Iterator[bytes], seconds: float) -> tuple[int | None, bytes]:
    """Exit code of the process, or None if it took too long, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "data_pipeline.reading.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=reading_environment(),
    )
    given, process.stdin = process.stdin, None  # communicate would close it
    assert given is not None
    writer = threading.Thread(target=_write, args=(order, given), daemon=True)
    writer.start()
    try:
        output, _ = process.communicate(timeout=seconds)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        code = None
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        writer.join()  # nobody reads any more
    return code, output


def _write(order: Iterator[bytes], given: IO[bytes]) -> None:
    """Write the parts one by one: together they would be in memory twice."""
    # The process may be gone, which its exit code says.
    with contextlib.suppress(BrokenPipeError), given:
        for part in order:
            given.write(part)


def _order(
    media: Sequence[tuple[Medium, EncoderConfig]],
    limits: DecodeLimits,
    seconds: float,
    together: float,
) -> Iterator[bytes]:
    settings = {"seconds": seconds, "together": together, "limits": asdict(limits)}
    yield json.dumps(settings).encode() + b"\n"
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
        kind = modality(medium.modality)
        # Only where it decides on the number of tokens.
        length = kind.length if kind.promised is not None else None
        duration_ms = length(medium, limits).duration_ms if length is not None else 0
    except BrokenMediumError as error:
        return {"reason": error.reason, "kind": error.kind}, b""
    file = io.BytesIO()
    np.save(file, content, allow_pickle=False)
    several = medium.modality == "image" and moves(medium.data)
    return {"duration_ms": duration_ms, "moves": several, "bytes": file.tell()}, file.getvalue()


def main() -> None:
    """Decode the media on stdin to stdout; the first that cannot be is the last."""
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    order = json.loads(given.readline())
    processor = int(order["together"]) + 5  # should whoever waits be gone
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while line := given.readline():
        facts = json.loads(line)
        medium = Medium(facts["modality"], given.read(facts["bytes"]), facts["source"])
        encoder, limits = EncoderConfig(**facts["encoder"]), DecodeLimits(**order["limits"])
        # It ends the process, as no handler could that waits for a decoder to come back.
        signal.setitimer(signal.ITIMER_REAL, order["seconds"])
        said, array = _decode(medium, encoder, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        taken.write(json.dumps(said).encode() + b"\n" + array)
        taken.flush()
        if "reason" in said:
            return


if __name__ == "__main__":
    main()
