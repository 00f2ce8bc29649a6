"""One picture of a comparison: AP over training time, and what the detectors see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import matplotlib
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

COLORS = {"baseline": "#8a8f98", "baseline, equal time": "#4a4f57", "distilled": "#d1495b", "teacher": "#00798c"}
CLASS_COLORS = plt.get_cmap("tab10")


@dataclass
class Curve:
    """A run's AP (percent) over its training time (seconds)."""

    label: str
    seconds: List[float]
    ap: List[float]


def draw_comparison(
    path: Path, curves: Sequence[Curve], teacher_ap: float, detectors: Dict[str, Tuple[nn.Module, Any]], dataset: str
) -> None:
    """Writes the picture.

    Args:
        path: of the PNG.
        curves: the runs.
        teacher_ap: percent.
        detectors: by title, a detector in eval mode and its config; one row of images each, on each of which as many
            detections are drawn as there are objects.
        dataset: a registered set, of which the first images with at least three objects are shown.
    """
    images = [image for image in DatasetCatalog.get(dataset) if len(image.get("annotations", ())) >= 3][:5]
    figure = plt.figure(figsize=(15, 5.5), dpi=110)
    left, right = figure.subfigures(1, 2, width_ratios=(0.78, 1))
    _draw_curves(left.subplots(), curves, teacher_ap)
    left.subplots_adjust(left=0.1, right=0.97, bottom=0.11, top=0.92)
    axes = right.subplots(len(detectors), len(images), squeeze=False)
    right.subplots_adjust(left=0.05, right=0.99, bottom=0.06, top=0.95, wspace=0.04, hspace=0.04)
    for row, (title, (model, cfg)) in zip(axes, detectors.items()):
        row[0].set_ylabel(title, fontsize=11, color=COLORS.get(title, "black"))
        for axis, image in zip(row, images):
            _draw_detections(axis, image, model, cfg)
    _draw_legend(axes[-1][0], MetadataCatalog.get(dataset).thing_classes)
    figure.savefig(path)
    plt.close(figure)


def _draw_curves(axis: Axes, curves: Sequence[Curve], teacher_ap: float) -> None:
    axis.axhline(teacher_ap, color=COLORS["teacher"], linestyle="--", linewidth=1.2)
    end = max(curve.seconds[-1] for curve in curves)
    axis.text(0, teacher_ap + 0.8, f"teacher {teacher_ap:.1f}", color=COLORS["teacher"], fontsize=11)
    for curve in curves:
        color = COLORS[curve.label]
        axis.plot([0, *curve.seconds], [0, *curve.ap], color=color, linewidth=2, marker="o", markersize=4)
        axis.annotate(
            f"{curve.label} {curve.ap[-1]:.1f}",
            (curve.seconds[-1], curve.ap[-1]),
            textcoords="offset points",
            xytext=(2, -18) if curve.label == "baseline" else (2, 9),
            ha="right",
            color=color,
            fontsize=11,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axis.set(xlim=(0, end * 1.03), ylim=(0, max(teacher_ap, 1) * 1.12))
    axis.set_xlabel("training time, seconds", fontsize=11)
    axis.set_ylabel("box AP on the validation images", fontsize=11)
    axis.set_title("The same student, seed and data order", fontsize=12, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


def detect(model: nn.Module, cfg: Any, pixels: np.ndarray) -> Any:
    """A detector's `Instances` for one image (H, W, 3) in the channel order of its config."""
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(pixels).apply_image(pixels).astype("float32").transpose(2, 0, 1)
    height, width = pixels.shape[:2]
    with torch.no_grad():
        return model([{"image": torch.as_tensor(image), "height": height, "width": width}])[0]["instances"].to("cpu")


def _draw_detections(axis: Axes, image: Dict[str, Any], model: nn.Module, cfg: Any) -> None:
    axis.imshow(utils.read_image(image["file_name"], "RGB"))
    found = detect(model, cfg, utils.read_image(image["file_name"], cfg.INPUT.FORMAT))
    # The best ones, not those above a score: a dense detector's scores are lower than a two-stage one's.
    best = found[found.scores.argsort(descending=True)[: len(image["annotations"])]]
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
