"""Write the page that shows what distillation does during one run."""

import io
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from ..errors import some
from ..figures.page import Section, render_page
from ..figures.style import STYLE, as_png, as_svg
from ..files import written_whole
from . import charts
from .detections import DetectorComparison, MatchedDetections, compare_detectors, reference_among
from .drawing import draw_detections, pick
from .measures import correlation_gap
from .probe import Probe, match_student
from .records import RecordFile, as_lists
from .references import Baseline, References
from .run import read_curve, read_teacher_ap, read_terms

PAGE = "index.html"
# Number of images whose detections the page shows.
SHOWN = 6


def write_page(
    file: RecordFile, cfg: CfgNode, student: nn.Module, probe: Probe, references: References
) -> Dict[str, np.ndarray]:
    """Write `index.html`, which needs no other file, and each figure as a file. Older files are replaced.

    Args:
        file: the run's records. All files are written to the same folder.
        cfg: the run's config, whose OUTPUT_DIR holds metrics.json.
        student: the student with the weights of the last record.
        references: what the probe shows of the teacher and the baseline.

    Returns:
        the figure of the detections as (3, H, W) uint8, under "detections".

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    records, baseline = file.read(), references.baseline
    with plt.rc_context(STYLE):
        detections, headline = _detection_section(cfg, student, probe, references)
        sections = [
            *_score_sections(cfg, baseline),
            detections,
            *_level_sections(records),
            *_class_sections(records, baseline),
            *_term_sections(cfg, records),
        ]
    file.folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        ending = "svg" if section.kind == "svg+xml" else section.kind
        with written_whole(str(file.folder / f"{section.name}.{ending}"), "wb") as image:
            image.write(section.image)
    with written_whole(str(file.folder / PAGE)) as page:
        page.write(_page(cfg, records, headline, sections))
    return {"detections": np.asarray(Image.open(io.BytesIO(detections.image)).convert("RGB")).transpose(2, 0, 1)}


def _page(cfg: CfgNode, records: Sequence[Dict[str, Any]], headline: str, sections: Sequence[Section]) -> str:
    setting = {
        "Student": cfg.DISTILL.STUDENT_META_ARCHITECTURE,
        "Teacher": cfg.DISTILL.TEACHER.CONFIG_FILE,
        "Terms": ", ".join(cfg.DISTILL.LOSSES) + (", head transfer" if cfg.DISTILL.HEAD_TRANSFER else ""),
        "Run": cfg.OUTPUT_DIR,
        "Iterations": f"{records[-1]['iterations']} of {cfg.SOLVER.MAX_ITER}",
        "Objects": f"{records[-1]['objects']} on images of {cfg.DATASETS.TEST[0]}",
        "Baseline": cfg.DISTILL.INSIGHT.BASELINE or "none; name a run in DISTILL.INSIGHT.BASELINE to compare with",
    }
    return render_page("What distillation did to the student", headline, setting, sections)


def _score_sections(cfg: CfgNode, baseline: Optional[Baseline]) -> List[Section]:
    curve = read_curve(cfg)
    if not curve[0]:
        return []
    teacher_ap = read_teacher_ap(cfg)
    missing = "" if teacher_ap is not None else " The teacher's AP is not known, because DISTILL.EVAL_TEACHER was off."
    figure = charts.draw_ap(curve, baseline.curve if baseline else None, teacher_ap)
    caption = f"Box AP on {cfg.DATASETS.TEST[0]} at each evaluation.{missing}"
    return [Section("ap", "AP during training", as_svg(figure).encode(), caption)]


def _level_sections(records: Sequence[Dict[str, Any]]) -> List[Section]:
    """Return the figures of SGFI's levels, or nothing if the run does not use SGFI."""
    if "levels" not in records[-1]:
        return []
    matching = Section(
        "levels",
        "Which levels match",
        as_svg(charts.draw_level_matching(records[-1])).encode(),
        "Mean of SGFI's alpha over the ground-truth boxes. It shows which student levels look like the level that the "
        "teacher assigns to the box. A row sums to 1. The sizes are COCO's, by the area of the box in the file.",
    )
    if len(records) == 1:
        return [matching]
    caption = "Mean alpha over training, for each teacher level, and tau, the learned temperature of the softmax."
    figure = charts.draw_level_history(records)
    return [matching, Section("levels_over_training", "Matching over training", as_svg(figure).encode(), caption)]


def _class_sections(records: Sequence[Dict[str, Any]], baseline: Optional[Baseline]) -> List[Section]:
    record = records[-1]
    if record["correlation_gap"] is None:
        return []
    matrices = {name: record["correlation"][name] for name in ("teacher", "student")}
    gap = None
    if baseline is not None:
        matrices["baseline"] = as_lists(baseline.correlation)
        gap = correlation_gap(torch.tensor(np.array(matrices["teacher"], dtype=float)), baseline.correlation)
    differences = f"The student differs from the teacher by {record['correlation_gap']:.3f} on average"
    differences += "." if gap is None else f", the baseline by {gap:.3f}."
    matrix_section = Section(
        "classes",
        "How alike classes look",
        as_svg(charts.draw_correlation(matrices, record["classes"])).encode(),
        f"Correlation between the classes' mean embeddings inside ground-truth boxes. {differences}",
    )
    if len(records) == 1:
        return [matrix_section]
    figure = charts.draw_correlation_history(records, gap)
    caption = "Mean absolute difference between the teacher's and the student's matrix, over pairs of classes."
    return [
        matrix_section,
        Section("classes_over_training", "Likeness over training", as_svg(figure).encode(), caption),
    ]


def _term_sections(cfg: CfgNode, records: Sequence[Dict[str, Any]]) -> List[Section]:
    sections = []
    if any(record.get("gradients") for record in records):
        caption = (
            "Left: the norm of each weighted term's gradient in the backbone, as a share of the sum of all norms. "
            "Right: the cosine of that gradient with the gradient of the student's own losses. Below 0 the two pull in "
            "opposite directions. Every point is measured on one batch."
        )
        figure = charts.draw_gradients(records)
        sections.append(Section("gradients", "What pulls at the student", as_svg(figure).encode(), caption))
    terms = read_terms(cfg.OUTPUT_DIR)
    if terms:
        caption = "Every loss with its weight, smoothed as Detectron2 does. The student's own losses are dashed."
        sections.append(Section("terms", "Loss terms", as_svg(charts.draw_terms(terms)).encode(), caption))
    return sections


def _detection_section(cfg: CfgNode, student: nn.Module, probe: Probe, references: References) -> Tuple[Section, str]:
    """Return the figure of the detections and the headline of the page."""
    baseline = references.baseline
    detections: Dict[str, List[MatchedDetections]] = {}
    if references.teacher is not None:
        detections["teacher"] = references.teacher
    if baseline is not None:
        detections["baseline"] = baseline.detections
    detections["student"] = match_student(student, probe)
    counts = [len(inputs["instances"]) for inputs in probe.inputs]
    absent = [None] * len(counts)
    columns = (detections["student"], detections.get("teacher", absent), detections.get("baseline", absent))
    compared: List[DetectorComparison] = [compare_detectors(*row) for row in zip(counts, *columns)]
    shown = pick(compared, SHOWN)
    figure = draw_detections(
        [probe.inputs[index] for index in shown],
        {name: [matched[index] for index in shown] for name, matched in detections.items()},
        [compared[index] for index in shown],
        probe.class_names,
        cfg.INPUT.FORMAT,
    )
    most_changed = ", those on which distillation changed most" if len(detections) > 1 else ""
    caption = (
        f"{len(shown)} of {len(counts)} images{most_changed}. All detectors see the images at "
        "the student's test size. Each detector is shown from the score that gives its best F1 on these images."
    )
    section = Section("detections", "Who finds what", as_png(figure), caption, "png")
    return section, _headline(counts, detections, compared)


def _headline(
    counts: Sequence[int],
    detections: Dict[str, List[MatchedDetections]],
    compared: Sequence[DetectorComparison],
) -> str:
    totals = [
        f"the {name} finds {sum(int(matched.finds(count).sum()) for matched, count in zip(images, counts))}"
        for name, images in detections.items()
    ]
    gained = sum(int(comparison.gained.sum()) for comparison in compared)
    lost = sum(int(comparison.lost.sum()) for comparison in compared)
    copied = sum(int(comparison.copied.sum()) for comparison in compared)
    found = f"Of {sum(counts)} objects on {len(counts)} images {some(totals)}."
    reference = reference_among(detections)
    if reference is None:
        return f"{found} The teacher's detections are not shown; the log says why."
    changes = f"The student finds {gained} that the {reference} does not find, misses {lost} that the {reference} finds"
    if "teacher" not in detections:
        return f"{found} {changes}. The teacher's detections are not shown; the log says why."
    which = " that the baseline does not make" if "baseline" in detections else ""
    return f"{found} {changes}, and makes {copied} of the teacher's mistakes{which}."
