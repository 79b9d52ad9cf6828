"""``python -m unimoe_mcore.export SOURCE FOLDER --as FORM``: a run's model for others.

SOURCE is a run (``runs/<name>``), one of its checkpoints, or what a stage gave. FORM is ``llama``
(a dense model), ``mixtral`` (a mixture), ``peft`` (the run's adapters, to be loaded onto one of
these) or ``uni-moe`` (experts and mixtures under the names of Uni-MoE's files). What FORM has no
place for is named at the end, and in FOLDER/README.md; what it cannot express is refused.
``docs/checkpoints.md`` has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.exporting.exported import Exported  # noqa: E402
from unimoe_mcore.exporting.folder import check_absent, write_export  # noqa: E402
from unimoe_mcore.exporting.llama_form import as_llama  # noqa: E402
from unimoe_mcore.exporting.mixtral_form import as_mixtral  # noqa: E402
from unimoe_mcore.exporting.peft_form import as_peft  # noqa: E402
from unimoe_mcore.exporting.subject import Subject, open_subject  # noqa: E402
from unimoe_mcore.exporting.unimoe_form import as_unimoe  # noqa: E402
from unimoe_mcore.runtime.precision import DTYPES  # noqa: E402

FORMS: Mapping[str, Callable[[Subject, bool], Exported]] = {
    "llama": as_llama,
    "mixtral": as_mixtral,
    "peft": as_peft,
    "uni-moe": as_unimoe,
}
SHARD_SIZE = 5_000_000_000
"""Bytes of a file of weights, as transformers writes them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_mcore.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a run, a checkpoint, or what a stage gave")
    parser.add_argument("folder", type=Path, help="where to; must not be there yet")
    parser.add_argument("--as", dest="form", choices=FORMS, required=True, help="in which form")
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest (default), best, or step-N"
    )
    parser.add_argument(
        "--adapters",
        choices=("merged", "apart"),
        default="merged",
        help="LoRA: added to the weights (default), or left out (uni-moe: in a file of its own)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights; else the run's")
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE, metavar="BYTES", help="of a file of weights"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Find the model, lay it out, write it, say what was done.

    Raises:
        UserError, DataError, OSError: something that the user can mend.
    """
    given = _parser().parse_args(arguments)
    if given.shard_size < 1:
        raise UserError(f"--shard-size is {given.shard_size}, it must be at least 1 byte.")
    check_absent(given.folder)
    subject = open_subject(given.source, given.checkpoint)
    exported = FORMS[given.form](subject, given.adapters == "merged")
    dtype = DTYPES[given.dtype] if given.dtype else subject.weights.dtype
    done = write_export(given.folder, subject, exported, dtype, given.shard_size)
    print(
        f"{given.folder}: {done.numbers / 1e6:.2f} M parameters in "
        f"{str(dtype).removeprefix('torch.')}, {', '.join(done.files)}"
    )
    for what, why in done.left_out.items():
        print(f"  left out: {what}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
