"""The losses of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from qwen_tune.disk import parse_json

CURVE = "loss.png"
"""The picture's file name next to the card."""

_LONGEST = 2000
"""Points that are drawn; those of a longer run are thinned out evenly."""


def draw_losses(metrics: Path) -> bytes | None:
    """Returns a PNG of training loss and held-out loss over steps, in nats/token; None if there are too few points.

    The same metrics give the same bytes, so that an unchanged picture is not sent again.
    """
    lines = _read(metrics) if metrics.exists() else []
    trained = _points(lines, "loss")
    held_out = _points(lines, "eval_loss")
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
    axes.set_ylabel("loss (nats/token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _read(metrics: Path) -> list[dict[str, Any]]:
    """Returns the readable lines: a full disk may have cut off the last one."""
    lines = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(parse_json(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    numbers = [(line.get("step"), line.get(key)) for line in lines]
    return [(step, loss) for step, loss in numbers if isinstance(step, (int, float)) and isinstance(loss, (int, float))]
