"""Write a page of sample images with their boxes, to look at before a student trains on them."""

import random
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ..data.kinds.pseudo import IGNORED_FROM
from ..figures.boxes import draw_box, printable
from ..figures.page import Cell, Section, Table, TableRow, render_page
from ..figures.style import PALETTE, STYLE, as_png
from ..files import written_whole
from .images import ImageFile
from .output import Labels, table_rows
from .part import Found
from .source import Source

HEADERS = ("class", "threshold", "precision", "recall", "F1", "boxes above")
COLUMNS = 4
# Longer side of a drawn image, in pixels.
DRAWN_SIZE = 480


def write_page(labels: Labels, source: Source, path: Path, count: int, seed: int) -> None:
    """Write the page, which needs no other file.

    Args:
        count: number of sample images.
        seed: chooses the images.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    chosen = sorted(random.Random(seed).sample(range(len(labels.images)), min(count, len(labels.images))))
    shown = [labels.images[index] for index in chosen]
    with plt.rc_context(STYLE):
        picture = as_png(_draw(shown, labels))
    caption = (
        "Solid: boxes from the threshold of their class on, with class and score. Dashed: doubtful boxes, with a score "
        f"of at least {IGNORED_FROM:g} times the threshold. Images are chosen at random (seed {seed})."
    )
    section = Section("samples", f"{len(shown)} of {len(labels.images)} images", picture, caption, "png")
    rows = [TableRow([Cell(text) for text in row]) for row in table_rows(labels)]
    page = render_page(
        "Labels to look at", _lead(labels), _setting(labels, source), [section], Table(list(HEADERS), rows)
    )
    with written_whole(str(path)) as file:
        file.write(page)


def _lead(labels: Labels) -> str:
    above = sum(labels.counts_above().values())
    total = sum(len(found.scores) for _, found in labels.images)
    return f"{above} of {total} boxes on {len(labels.images)} images reach the threshold of their class."


def _setting(labels: Labels, source: Source) -> Dict[str, str]:
    return {
        "Source": f"{source.kind}, {', '.join(source.origin().values())}",
        "Thresholds": f"chosen on {labels.chosen_on}" if labels.chosen_on else "given",
        "Left out": f"{labels.left_out} images that DATASETS.TRAIN has, {labels.unreadable} unreadable images, "
        f"{labels.dropped()} boxes of other classes",
    }


def _draw(shown: Sequence[Tuple[ImageFile, Found]], labels: Labels) -> Figure:
    rows = (len(shown) + COLUMNS - 1) // COLUMNS
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3.3 * COLUMNS, 3.5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, found) in zip(axes.flat, shown):
        _draw_image(axis, image, found, labels)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=0.97, wspace=0.02, hspace=0.1)
    return figure


def _draw_image(axis: Axes, image: ImageFile, found: Found, labels: Labels) -> None:
    with Image.open(image.path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    picture.thumbnail((DRAWN_SIZE, DRAWN_SIZE))
    axis.imshow(picture, extent=(0, image.width, image.height, 0))
    axis.set(xlim=(0, image.width), ylim=(image.height, 0))
    axis.set_title(printable(image.name[-40:]), fontsize=8, loc="left", parse_math=False)
    for box, score, label in reversed(list(zip(found.boxes, found.scores, found.classes))):  # the best on top
        name = labels.classes[label]
        if score < IGNORED_FROM * labels.thresholds[name].min_score:
            continue
        draw_box(
            axis, _as_xyxy(box), PALETTE[label % len(PALETTE)], f"{name} {score:.2f}",
            strong=labels.is_above(label, score), dashed=not labels.is_above(label, score),
        )  # fmt: skip


def _as_xyxy(box: Sequence[float]) -> List[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]
