"""Draw images with the detections of several detectors side by side."""

from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..figures.boxes import draw_box
from ..figures.style import METHOD, PLAIN, TEACHER
from .detections import DetectorComparison, MatchedDetections, reference_among

RIGHT, WRONG, MISSED = "#5aa469", "#e9a23b", "#9aa0a6"
GAINED, LOST, COPIED = "#1d6fd1", "#d1495b", "#b5179e"
TITLES = {"teacher": TEACHER, "baseline": PLAIN, "student": METHOD}


def pick(compared: Sequence[DetectorComparison], count: int) -> List[int]:
    """Return the indices of the images with the most changes, most first. On a tie the earlier image is first."""
    return sorted(range(len(compared)), key=lambda index: -len(compared[index]))[:count]


def draw_detections(
    inputs: Sequence[Dict[str, Any]],
    detectors: Dict[str, Sequence[MatchedDetections]],
    compared: Sequence[DetectorComparison],
    class_names: Sequence[str],
    input_format: str,
) -> Figure:
    """Draw a row for each image: the objects, then the detections of each detector.

    Args:
        inputs: images and objects as in `Probe.inputs`.
        detectors: detections by image, by the name of the detector: "teacher", "baseline", "student".
        compared: what distillation changed on each image.
        input_format: channel order of the pixels, Detectron2's INPUT.FORMAT.
    """
    columns = ["objects", *detectors]
    figure, axes = plt.subplots(
        len(inputs), len(columns), figsize=(3.3 * len(columns), 3.3 * len(inputs) + 0.5), squeeze=False
    )
    for row, image, comparison, *detections in zip(axes, inputs, compared, *detectors.values()):
        pixels = _as_rgb(image["image"], input_format)
        objects = image["instances"]
        for axis, name, matched in zip(row, columns, [None, *detections]):
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[], xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))
            if matched is None:
                _draw_objects(axis, objects, comparison, class_names)
            else:
                _draw_matched(axis, matched, objects, comparison if name == "student" else None, class_names)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, color=TITLES.get(name, "#222222"), fontsize=12, loc="left")
    _legend(figure, detectors)
    return figure


def _draw_objects(axis: Axes, objects: Any, comparison: DetectorComparison, class_names: Sequence[str]) -> None:
    for index, (box, label) in enumerate(zip(objects.gt_boxes.tensor.tolist(), objects.gt_classes.tolist())):
        color = GAINED if comparison.gained[index] else LOST if comparison.lost[index] else "white"
        draw_box(axis, box, color, class_names[label], strong=color != "white")


def _draw_matched(
    axis: Axes,
    matched: MatchedDetections,
    objects: Any,
    comparison: Optional[DetectorComparison],
    class_names: Sequence[str],
) -> None:
    missed = ~matched.finds(len(objects))
    for index in missed.nonzero().flatten().tolist():
        lost = comparison is not None and bool(comparison.lost[index])
        draw_box(axis, objects.gt_boxes.tensor[index].tolist(), LOST if lost else MISSED, "", strong=lost, dashed=True)
    columns = (matched.boxes.tolist(), matched.classes.tolist(), matched.objects.tolist())
    for index, (box, label, object_index) in enumerate(zip(*columns)):
        color, strong = (RIGHT, False) if object_index >= 0 else (WRONG, False)
        if comparison is not None and object_index >= 0 and comparison.gained[object_index]:
            color, strong = GAINED, True
        if comparison is not None and comparison.copied[index]:
            color, strong = COPIED, True
        draw_box(axis, box, color, class_names[label], strong)


def _legend(figure: Figure, detectors: Collection[str]) -> None:
    reference = reference_among(detectors)
    entries: List[Tuple[str, str, str]] = [
        (RIGHT, "-", "found"),
        (WRONG, "-", "a mistake"),
        (MISSED, "--", "missed"),
    ]
    if reference is not None:
        entries.append((GAINED, "-", f"found by the student, not by the {reference}"))
        entries.append((LOST, "--", f"found by the {reference}, not by the student"))
    if "teacher" in detectors:
        but = ", but not the baseline" if reference == "baseline" else ""
        entries.append((COPIED, "-", f"a mistake that the teacher makes too{but}"))
    handles = [
        Line2D([], [], color=color, linestyle=style, linewidth=2.4, label=text) for color, style, text in entries
    ]
    bottom = 0.5 / figure.get_figheight()
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=bottom, top=1 - 0.3 / figure.get_figheight(), wspace=0.02, hspace=0.02
    )
    figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False, fontsize=8.5)


def _as_rgb(image: torch.Tensor, input_format: str) -> np.ndarray:
    """Return a (3, H, W) image, whose channels are in the order INPUT.FORMAT, as (H, W, 3) uint8."""
    pixels = image.numpy().transpose(1, 2, 0)
    return pixels[:, :, ::-1] if input_format == "BGR" else pixels
