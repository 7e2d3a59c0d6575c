"""The losses of a run as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

_LONGEST = 2000
"""Steps that are drawn; of a longer run as many, evenly spread."""


def draw_losses(metrics: Path) -> bytes | None:
    """A PNG of training loss and evaluation loss over steps, in nats a token; None where there is nothing to draw.

    The same metrics give the same bytes, so that a card is not sent again.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if len(trained) + len(held_out) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = trained[:: max(1, len(trained) // _LONGEST)]
    if trained:
        axes.plot(*zip(*trained, strict=True), color="#7c6bd6", linewidth=1.2, label="training")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#d9622b", linewidth=1.6, marker="o", markersize=4, label="held out"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
