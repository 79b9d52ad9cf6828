"""A picture of routing while a run trains: which experts the tokens of each modality go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.collate import GROUPS

Picture = NDArray[np.uint8]
"""``[height, width, 3]``, RGB."""

COLUMNS = 4


def draw_routing(
    shares: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str], title: str
) -> Picture:
    """One panel per block: share of every expert (column) in a modality's tokens (row).

    Draws without pyplot, whose state threads would share.

    Args:
        shares: block -> modality -> share of every expert.
        experts: their names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(shares))
    rows = -(-len(shares) // columns)
    figure = Figure((1.2 + 2.8 * columns, 0.5 + 2.4 * rows), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, block in zip(panels, sorted(shares, key=int), strict=False):
        groups = sorted(shares[block], key=lambda g: GROUPS.index(g) if g in GROUPS else 99)
        values = np.array([shares[block][group] for group in groups])
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
        axes.set_xticks(range(len(experts)), experts, fontsize=8)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        axes.set_title(f"block {block}", fontsize=9)
    for axes in panels[len(shares) :]:
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
