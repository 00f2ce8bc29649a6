"""Set the colors and fonts of every figure, and save figures as files."""

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

TEACHER, PLAIN, METHOD = "#00798c", "#7b818a", "#d1495b"
# Colors of all other curves, in this order.
PALETTE = "#3d5a80 #edae49 #66a182 #8d5a97 #b5651d #2e4057 #c97b84 #5c8001 #e07a1f #0081a7 #a8577e #4f772d".split()
MARKERS = "sD^vP*Xhp<>"
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # keep text as text, which is smaller and can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "svg.hashsalt": "gdetkd",  # the same figure gives the same file
}


def finish_legend(axis: Axes, title: str = "") -> None:
    """Put the legend on the right of the axis."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, title=title or None)


def as_svg(figure: Figure) -> str:
    """Return the figure as text, and close it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file, and close it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
