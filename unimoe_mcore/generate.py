"""``python -m unimoe_mcore.generate runs/<name> [--image FILE ...] "question"``: ask a trained run.

Media come before the question in the order in which they are given, or where the question says so:
``--image a.png --image b.png "<image> then <image>: which is larger?"``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from unimoe_mcore.runtime.parent import die_with_parent

die_with_parent()  # before torch, whose import takes seconds

from data_pipeline.modalities import MODALITIES, modality  # noqa: E402
from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.generation.asked_run import AskedRun, open_run  # noqa: E402
from unimoe_mcore.generation.prompt import Prompt, make_prompt, read_attachment  # noqa: E402
from unimoe_mcore.generation.sampling import Sampling  # noqa: E402
from unimoe_mcore.runtime.failure import INTERRUPTED, leave  # noqa: E402

if TYPE_CHECKING:
    from unimoe_mcore.generation.answering import Answer


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as everything else here."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message} ({self.prog} --help shows what there is).")


class _Attach(argparse.Action):
    """Keeps files in the order of the command line, whatever they are given as."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.media = [*namespace.media, (self.dest, Path(values))]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The run and how it is loaded."""
    parser.add_argument("run", type=Path, help="folder of the run, runs/<name>")
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest (default), best, or step-N"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="divide the experts among N processes"
    )


def _parser() -> Parser:
    parser = Parser("python -m unimoe_mcore.generate", description=__doc__)
    add_model_options(parser)
    parser.add_argument("question", help="may hold <image>, <video>, <speech>, <audio>")
    for name in MODALITIES:
        parser.add_argument(
            f"--{name}",
            action=_Attach,
            metavar="FILE",
            help=f"{modality(name).about}; may be given again",
        )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of the answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest only"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    parser.add_argument("--no-cache", action="store_true", help="run all tokens again each time")
    parser.add_argument(
        "--json", action="store_true", help="print tokens and experts too, at the end"
    )
    parser.set_defaults(media=[])
    return parser


def main(arguments: Sequence[str]) -> int:
    """Check everything that can be checked without the model, then ask it.

    Raises:
        UserError, DataError, OSError: something that the user can mend.
    """
    given = _parser().parse_args(arguments)
    processes = joined() or given.processes
    run = open_run(given.run, given.checkpoint, at_least_one(processes))
    sampling = Sampling(given.temperature, given.top_p, given.seed)
    sampling.check()
    prompt = _prompt(run, given) if is_first() else None
    if processes > 1 and not joined():
        again = "the same command asks again"
        return launch_again("unimoe_mcore.generate", arguments, processes, given.run.name, again)
    try:
        return _ask(run, prompt, sampling, given)
    except KeyboardInterrupt:
        return INTERRUPTED


def joined() -> int:
    """Processes that torchrun has started; 0 without it."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def is_first() -> bool:
    """Whether this is the process that answers."""
    return os.environ.get("RANK", "0") == "0"


def at_least_one(processes: int) -> int:
    """A number of processes.

    Raises:
        UserError: if it is none.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}, it must be at least 1.")
    return processes


def _prompt(run: AskedRun, given: argparse.Namespace) -> Prompt:
    if given.max_tokens < 1:
        raise UserError(f"--max-tokens is {given.max_tokens}, it must be at least 1.")
    attachments = [read_attachment(modality, path) for modality, path in given.media]
    return make_prompt(run, given.question, attachments, given.max_tokens)


def launch_again(
    module: str, arguments: Sequence[str], processes: int, run: str, advice: str
) -> int:
    """Start the same command line in several processes, and wait for their end.

    Args:
        module: what ``python -m`` runs.
        advice: what to do where it was interrupted.

    Returns:
        The exit code.
    """
    from unimoe_mcore.launch import Place, run_processes

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_processes([module, *arguments], Place(processes), run, advice)


def _ask(
    run: AskedRun, prompt: Prompt | None, sampling: Sampling, given: argparse.Namespace
) -> int:
    """Answer, or without a prompt run along with the process that does."""
    from unimoe_mcore.runtime.devices import prepare_device

    prepare_device()  # before anything of Megatron is imported

    from unimoe_mcore.generation.answering import Answerer, load_model
    from unimoe_mcore.generation.lockstep import STEP_TIMEOUT, run_along
    from unimoe_mcore.runtime import groups

    model = load_model(run, groups.initialise(run.recipe.parallel, timeout=STEP_TIMEOUT))
    if prompt is None:
        run_along(model, run.tokenizer.pad)
    else:
        for note in prompt.notes:
            print(f"note: {note}", file=sys.stderr)
        answerer = Answerer(run, model)
        try:
            answer = _print(answerer.answer(prompt, sampling, not given.no_cache), given.json)
        finally:
            answerer.end()
        if given.json:
            print(json.dumps(_facts(run, prompt, answer), ensure_ascii=False))
    groups.destroy()
    return 0


def _print(pieces: Any, silent: bool) -> Answer:
    """Print an answer as it comes; the answer."""
    from unimoe_mcore.generation.answering import Answer

    for piece in pieces:
        if isinstance(piece, Answer):
            if not silent:
                print(flush=True)
            return piece
        if not silent:
            print(piece, end="", flush=True)
    raise RuntimeError("an answer without an end")


def _facts(run: AskedRun, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
        "question": prompt.text,
        "question_tokens": len(prompt.sample.tokens.ids),
        "step": run.state.step,
        "experts": {"question": answer.question_experts, "answer": answer.answer_experts},
        "notes": list(prompt.notes),
    }


def under_torchrun(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """An entry point of which, under torchrun, the process that fails first says why."""

    def entry(arguments: Sequence[str]) -> int:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        if not joined():
            return main(arguments)
        try:
            return main(arguments)
        except (Exception, KeyboardInterrupt) as error:
            leave(error)

    return entry


if __name__ == "__main__":
    sys.exit(speak(under_torchrun(main)))
