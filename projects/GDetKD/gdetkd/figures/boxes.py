"""Draw boxes on images."""

from typing import Any, Dict, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

# Room that a text needs above a box, as a share of the axis.
TEXT_HEIGHT = 0.06


def printable(text: str) -> str:
    """Return a text that can be drawn. A file name may have bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def draw_box(
    axis: Axes, box: Sequence[float], color: str, text: str, strong: bool = False, dashed: bool = False
) -> None:
    """Draw a box, with a text above its upper left corner, or inside of the box if there is no room above.

    Args:
        box: x1, y1, x2, y2 in pixels of the axis.
        text: empty for none.
        strong: whether to draw a thick line.
    """
    x1, y1, x2, y2 = box
    style: Dict[str, Any] = {"fill": False, "linewidth": 2.6 if strong else 1.5, "linestyle": "--" if dashed else "-"}
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, edgecolor=color, **style))
    if text:
        top, bottom = sorted(axis.get_ylim())
        place = "top" if y1 - top < TEXT_HEIGHT * (bottom - top) else "bottom"
        axis.text(
            x1, y1, printable(text), parse_math=False, fontsize=7, va=place, clip_on=True,
            color="#222222" if color == "white" else "white",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )  # fmt: skip
