"""``python -m unimoe_mcore.chat runs/<name>``: a page in the browser on which a run is asked.

The page listens on this machine only, unless ``--host`` says otherwise: it has no password. It may
be called by number, by this machine's names, and by those that ``--allow-host`` adds.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unimoe_mcore.runtime.parent import die_with_parent

die_with_parent()  # before torch, whose import takes seconds

from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.generate import (  # noqa: E402
    Parser,
    add_model_options,
    at_least_one,
    is_first,
    joined,
    launch_again,
    under_torchrun,
)
from unimoe_mcore.generation.asked_run import AskedRun, open_run  # noqa: E402

if TYPE_CHECKING:
    from unimoe_mcore.generation.answering import Answerer

HERE = "127.0.0.1"


def _parser() -> Parser:
    parser = Parser("python -m unimoe_mcore.chat", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--host", default=HERE, help=f"address to listen on (default {HERE})")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which browsers may call it, such as a proxy's; may be given again",
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Load a run and answer until Ctrl-C.

    Raises:
        UserError, DataError, OSError: something that the user can mend.
    """
    given = _parser().parse_args(arguments)
    processes = joined() or given.processes
    run = open_run(given.run, given.checkpoint, at_least_one(processes))
    if processes > 1 and not joined():
        again = "start it again"
        return launch_again("unimoe_mcore.chat", arguments, processes, given.run.name, again)
    listening = _listening(given.host, given.port) if is_first() else None
    from unimoe_mcore.runtime.devices import prepare_device

    prepare_device()  # before anything of Megatron is imported

    from unimoe_mcore.generation.answering import Answerer, load_model
    from unimoe_mcore.generation.lockstep import STEP_TIMEOUT, run_along
    from unimoe_mcore.runtime import groups

    model = load_model(run, groups.initialise(run.recipe.parallel, timeout=STEP_TIMEOUT))
    if listening is None:
        run_along(model, run.tokenizer.pad)
    else:
        answerer = Answerer(run, model)
        try:
            _serve(run, answerer, listening, given.host, given.allow_host)
        finally:
            answerer.end()
    groups.destroy()
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is refused before the model is loaded."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, it must be between 0 and 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"Port {port} of {host} cannot be listened on ({error.strerror}): choose others with "
            f"--host and --port."
        ) from error
    return listening


def _serve(
    run: AskedRun, answerer: Answerer, listening: socket.socket, host: str, more: list[str]
) -> None:
    """Answer until Ctrl-C.

    Raises:
        Exception: what went wrong, if nothing can be asked any more.
    """
    import uvicorn

    from unimoe_mcore.serving.app import build_app

    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    config = uvicorn.Config(
        build_app(run, answerer, [*_names(host), *more], fail),
        log_level="warning",
        access_log=False,
        limit_concurrency=64,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    server = uvicorn.Server(config)
    listening.listen(64)  # whoever reads the next line may call at once
    shown = f"[{host}]" if ":" in host else host
    port = listening.getsockname()[1]
    print(f"{run.recipe.name}: ask at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if failures:
        raise failures[0]


def _names(host: str) -> list[str]:
    """Names of this machine, as far as it listens beyond itself."""
    if host in (HERE, "localhost", "::1"):
        return ["localhost"]
    return ["localhost", host, socket.gethostname(), socket.getfqdn()]


if __name__ == "__main__":
    sys.exit(speak(under_torchrun(main)))
