"""The page that shows what distillation does during one run."""

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
from .detections import DetectorComparison, Found, compare_detectors
from .drawing import draw_detections, pick
from .measures import correlation_gap
from .probe import Probe, detect
from .records import RecordFile, as_lists
from .references import Baseline, References
from .run import read_curve, read_teacher_ap, read_terms

PAGE = "index.html"
# Images whose detections are shown.
SHOWN = 6


def write_page(
    file: RecordFile, cfg: CfgNode, student: nn.Module, probe: Probe, references: References
) -> Dict[str, np.ndarray]:
    """Writes `index.html`, which needs nothing beside it, and its figures as files; over older ones.

    Args:
        file: the run's records, beside which all is written.
        cfg: the run's; its OUTPUT_DIR holds metrics.json.
        student: with the weights of the last record.
        references: what it is compared with.

    Returns:
        the detections, by name, as (3, H, W) uint8.

    Raises:
        OSError: the disk does not take it.
    """
    records, baseline = file.read(), references.baseline
    with plt.rc_context(STYLE):
        detections, headline = _of_detections(cfg, student, probe, references)
        sections = [
            *_of_scores(cfg, baseline),
            detections,
            *_of_levels(records),
            *_of_classes(records, baseline),
            *_of_terms(cfg, records),
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
        "Looked at": f"{records[-1]['objects']} objects on images of {cfg.DATASETS.TEST[0]}",
        "Baseline": cfg.DISTILL.VIS_BASELINE or "none given (DISTILL.VIS_BASELINE)",
    }
    return render_page("What distillation did to the student", headline, setting, sections)


def _of_scores(cfg: CfgNode, baseline: Optional[Baseline]) -> List[Section]:
    curve = read_curve(cfg)
    if not curve[0]:
        return []
    teacher_ap = read_teacher_ap(cfg)
    known = "" if teacher_ap is not None else " The teacher's is not known: DISTILL.EVAL_TEACHER was off."
    figure = charts.draw_ap(curve, baseline.curve if baseline else None, teacher_ap)
    caption = f"Box AP on {cfg.DATASETS.TEST[0]} at each evaluation.{known}"
    return [Section("ap", "AP during training", as_svg(figure).encode(), caption)]


def _of_levels(records: Sequence[Dict[str, Any]]) -> List[Section]:
    """Where SGFI is among the losses."""
    if "levels" not in records[-1]:
        return []
    matching = Section(
        "levels",
        "Which levels match",
        as_svg(charts.draw_level_matching(records[-1])).encode(),
        "Mean of SGFI's alpha over objects, within their ground-truth boxes: which of the student's levels look like "
        "what the teacher's assigned level sees. A row sums to 1. Sizes are COCO's, by area of the box in the file.",
    )
    if len(records) == 1:
        return [matching]
    caption = "The same over training, for each level of the teacher; and tau, the softmax's learned temperature."
    figure = charts.draw_level_history(records)
    return [matching, Section("levels_over_training", "Matching over training", as_svg(figure).encode(), caption)]


def _of_classes(records: Sequence[Dict[str, Any]], baseline: Optional[Baseline]) -> List[Section]:
    record = records[-1]
    if record["correlation_gap"] is None:
        return []
    matrices = {name: record["correlation"][name] for name in ("teacher", "student")}
    gap = None
    if baseline is not None:
        matrices["baseline"] = as_lists(baseline.correlation)
        gap = correlation_gap(torch.tensor(np.array(matrices["teacher"], dtype=float)), baseline.correlation)
    differences = f"The student's differ from the teacher's by {record['correlation_gap']:.3f} on average"
    differences += "." if gap is None else f", the baseline's by {gap:.3f}."
    now = Section(
        "classes",
        "How alike classes look",
        as_svg(charts.draw_correlation(matrices, record["classes"])).encode(),
        f"Correlation of the classes' mean embeddings, within ground-truth boxes. {differences}",
    )
    if len(records) == 1:
        return [now]
    figure = charts.draw_correlation_history(records, gap)
    caption = "Mean absolute difference of the two matrices, over pairs of classes."
    return [now, Section("classes_over_training", "Likeness over training", as_svg(figure).encode(), caption)]


def _of_terms(cfg: CfgNode, records: Sequence[Dict[str, Any]]) -> List[Section]:
    sections = []
    if any(record.get("gradients") for record in records):
        caption = (
            "Left: norm of each weighted term's gradient in the backbone, as a share of their sum. Right: its cosine "
            "with the gradient of the student's own losses; below 0 they pull in opposite directions. One batch each."
        )
        figure = charts.draw_gradients(records)
        sections.append(Section("gradients", "What pulls at the student", as_svg(figure).encode(), caption))
    terms = read_terms(cfg.OUTPUT_DIR)
    if terms:
        caption = "As they enter the total, weights included, smoothed as Detectron2 does. Dashed: the student's own."
        sections.append(Section("terms", "Loss terms", as_svg(charts.draw_terms(terms)).encode(), caption))
    return sections


def _of_detections(cfg: CfgNode, student: nn.Module, probe: Probe, references: References) -> Tuple[Section, str]:
    """The section, and the page's headline."""
    baseline = references.baseline
    found: Dict[str, List[Found]] = {"teacher": references.teacher}
    if baseline is not None:
        found["baseline"] = baseline.found
    found["student"] = detect(student, probe)
    counts = [len(each["instances"]) for each in probe.inputs]
    alone = found.get("baseline", [None] * len(counts))
    rows = zip(counts, found["student"], found["teacher"], alone)
    compared: List[DetectorComparison] = [compare_detectors(*row) for row in rows]
    shown = pick(compared, SHOWN)
    figure = draw_detections(
        [probe.inputs[index] for index in shown],
        {name: [its[index] for index in shown] for name, its in found.items()},
        [compared[index] for index in shown],
        probe.class_names,
        cfg.INPUT.FORMAT,
    )
    gained, lost, copied = (sum(int(vars(c)[what].sum()) for c in compared) for what in ("gained", "lost", "copied"))
    than = "the teacher" if baseline is None else "the baseline"
    finds = {name: sum(int(f.finds(n).sum()) for f, n in zip(its, counts)) for name, its in found.items()}
    headline = (
        f"Of {sum(counts)} objects on {len(counts)} images {some([f'the {k} finds {v}' for k, v in finds.items()])}. "
        f"The student finds {gained} that {than} does not, misses {lost} that {than} finds, and makes {copied} of the "
        f"teacher's mistakes{'' if baseline is None else ' that the baseline does not make'}."
    )
    caption = (
        "Each detector from the score of its best F1 on these images on, which it sees at the student's test size. The "
        f"{len(shown)} images of {len(counts)} on which most is to be seen."
    )
    return Section("detections", "Who finds what", as_png(figure), caption, "png"), headline
