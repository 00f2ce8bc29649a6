"""Draw a picture of the quickstart's comparison: AP over training time, and the detections on some images."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import nn

from ..figures.style import METHOD, PLAIN, TEACHER
from ..insight.probe import read_at_test_size
from .comparison import Comparison
from .methods import BASELINE, CONFIGURED, WITH_UNLABELED
from .summary import mean_curve

LABELS = {CONFIGURED: "distilled", WITH_UNLABELED: "distilled, with unlabelled images"}
COLORS = {
    "baseline": PLAIN,
    "baseline, equal time": "#4a4f57",
    LABELS[CONFIGURED]: METHOD,
    LABELS[WITH_UNLABELED]: "#8f2d56",
    "teacher": TEACHER,
}
LABEL_WIDTH = 16  # characters in a line beside a row of images
CLASS_COLORS = plt.get_cmap("tab10")


@dataclass
class Curve:
    """Hold the AP (percent) over the training time (seconds), as a mean over the seeds."""

    label: str
    seconds: List[float]
    ap: List[float]


def curves_of(comparison: Comparison) -> List[Curve]:
    """Return the curves of the baseline, of the longest baseline at equal time, and of the methods in `LABELS`.

    The time is iterations times the measured time of a step. The iterations of a baseline at equal time are rounded up,
    so it ends where its method ends, or up to a tenth of the baseline's time later.
    """
    schedule = comparison.schedules[0]
    baseline = comparison.runs[BASELINE, schedule]
    methods = [method for method in LABELS if method in comparison.methods]
    shown = [("baseline", baseline, BASELINE)]
    longer = [comparison.equal_time_runs.get((method, schedule), baseline) for method in methods]
    longest = max(longer, key=lambda runs: runs[0].max_iter)
    if longest is not baseline:  # they are equal if a step of the method costs no more
        shown.append(("baseline, equal time", longest, BASELINE))
    shown += [(LABELS[method], comparison.runs[method, schedule], method) for method in methods]
    return [Curve(label, *mean_curve(runs, comparison.step_seconds(name))) for label, runs, name in shown]


def draw_comparison(
    path: Path, comparison: Comparison, teacher_ap: Optional[float], detectors: Dict[str, Tuple[nn.Module, Any]]
) -> None:
    """Write the picture.

    Args:
        path: file of the PNG.
        comparison: a comparison with complete runs and a method in `LABELS`.
        teacher_ap: percent; None if it is not known.
        detectors: by title, a detector in eval mode and its config. Each detector has a row of images, the first images
            of the test set with at least three objects. Every image shows as many detections as it has objects.
    """
    dataset = comparison.cfg.DATASETS.TEST[0]
    images = [image for image in DatasetCatalog.get(dataset) if len(image.get("annotations", ())) >= 3][:5]
    figure = plt.figure(figsize=(15, 5.5), dpi=110)
    left, right = figure.subfigures(1, 2, width_ratios=(0.78, 1))
    _draw_curves(left.subplots(), curves_of(comparison), teacher_ap)
    left.subplots_adjust(left=0.1, right=0.97, bottom=0.11, top=0.92)
    axes = right.subplots(len(detectors), len(images), squeeze=False)
    right.subplots_adjust(left=0.07, right=0.99, bottom=0.06, top=0.95, wspace=0.04, hspace=0.04)
    for row, (title, (model, cfg)) in zip(axes, detectors.items()):
        row[0].set_ylabel(textwrap.fill(title, LABEL_WIDTH), fontsize=10, color=COLORS.get(title, "black"))
        for axis, image in zip(row, images):
            _draw_detections(axis, image, model, cfg)
    _draw_legend(axes[-1][0], MetadataCatalog.get(dataset).thing_classes)
    figure.savefig(path)
    plt.close(figure)


def _draw_curves(axis: Axes, curves: Sequence[Curve], teacher_ap: Optional[float]) -> None:
    end, top = max(curve.seconds[-1] for curve in curves), max(max(curve.ap) for curve in curves)
    if teacher_ap is not None:
        axis.axhline(teacher_ap, color=COLORS["teacher"], linestyle="--", linewidth=1.2)
        axis.text(0, teacher_ap + 0.8, f"teacher {teacher_ap:.1f}", color=COLORS["teacher"], fontsize=11)
    for curve in curves:
        color = COLORS[curve.label]
        # The label of a short curve fits on its right. The labels of long curves are above or below their ends.
        is_short = curve.seconds[-1] < 0.8 * end
        is_below = curve.label == "baseline" or (curve.label == LABELS[CONFIGURED] and curve is not curves[-1])
        offset = (8, -11) if is_short else (2, -18) if is_below else (2, 9)
        axis.plot([0, *curve.seconds], [0, *curve.ap], color=color, linewidth=2, marker="o", markersize=4)
        axis.annotate(
            f"{curve.label} {curve.ap[-1]:.1f}",
            (curve.seconds[-1], curve.ap[-1]),
            textcoords="offset points",
            xytext=offset,
            ha="left" if is_short else "right",
            color=color,
            fontsize=11,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axis.set(xlim=(0, end * 1.03), ylim=(0, max(teacher_ap or 0, top, 1) * 1.12))
    axis.set_xlabel("training time (iterations x measured time of a step), seconds", fontsize=11)
    axis.set_ylabel("box AP on the validation images", fontsize=11)
    axis.set_title("The same student, seed and data order", fontsize=12, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


def _draw_detections(axis: Axes, image: Dict[str, Any], model: nn.Module, cfg: Any) -> None:
    axis.imshow(utils.read_image(image["file_name"], "RGB"))
    inputs = read_at_test_size(image["file_name"], cfg)
    with torch.no_grad():
        instances = model([inputs])[0]["instances"].to("cpu")
    # A score threshold would not suit all: a dense detector scores lower than a two-stage detector.
    best = instances[instances.scores.argsort(descending=True)[: len(image["annotations"])]]
    for (x1, y1, x2, y2), label in zip(best.pred_boxes.tensor.tolist(), best.pred_classes.tolist()):
        color = CLASS_COLORS(label % 10)
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=3.2))
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8))
    axis.set(xticks=[], yticks=[])


def _draw_legend(axis: Axes, classes: Sequence[str]) -> None:
    patches = [Rectangle((0, 0), 1, 1, color=CLASS_COLORS(i % 10)) for i in range(len(classes))]
    axis.legend(
        patches,
        classes,
        ncol=len(classes),
        loc="upper left",
        bbox_to_anchor=(-0.05, -0.02),
        frameon=False,
        fontsize=10,
        handlelength=1,
        columnspacing=1.2,
    )
