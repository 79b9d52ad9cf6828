"""The packages that mirrors of a run need; nothing else imports them."""

from __future__ import annotations

import importlib.util

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.trainer import LoggingConfig


def check_mirrors(logging: LoggingConfig) -> None:
    """Refuse mirrors whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    chosen = {"wandb": logging.wandb.enabled, "tensorboard": logging.tensorboard.enabled}
    lacking = [name for name, enabled in chosen.items() if enabled and not _installed(name)]
    if lacking:
        settings = " and ".join(f"logging.{name}.enabled=true" for name in lacking)
        raise UserError(
            f"{settings} cannot be had, the package is not installed: type "
            f"'pip install {' '.join(lacking)}' in the project's environment."
        )


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # not a mere folder of that name
