"""A run in TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unimoe_mcore.evaluation.routing_picture import Picture
from unimoe_mcore.training.mirror_rows import Row


class TensorBoardMirror:
    """TensorBoard hides what was shown of steps that are done again."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / self.name
        self._writer: Any = None

    def open(self, identity: str, step: int) -> int:
        """Begin another event file, which voids later steps of earlier ones."""
        from torch.utils.tensorboard import SummaryWriter

        again = any(self._folder.glob("events.*"))
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if again else None)
        return step

    def write(self, row: Row) -> None:
        """Show numbers."""
        for name, value in row.values.items():
            self._writer.add_scalar(name, value, row.step)

    def show(self, step: int, name: str, picture: Picture) -> None:
        """Show a picture."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
