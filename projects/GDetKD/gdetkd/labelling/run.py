"""Label images: from the options of `tools/label.py` to the files."""

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data import register_datasets
from ..data.folders import resolve
from ..errors import GDetKDError, some
from ..safe_load import sha256_of_file
from .class_names import find_among_students, student_classes, warn_of_classes_without_labels
from .detect import Kept, detect_all
from .images import Candidates, find_in_annotations, find_in_dataset, find_in_folder, name_faults, read_images
from .onnx_source import OnnxModel, OnnxSource
from .output import Labels, check_any_above, table_rows, threshold_texts, write_labels
from .page import HEADERS, write_page
from .part import Found, Part, check_output
from .results_source import Annotations, ResultsSource, read_annotations
from .source import Source
from .splits import without_labelled
from .teacher_source import TeacherSource
from .thresholds import (
    ClassThreshold,
    Validation,
    choose_thresholds,
    fill_gaps,
    load_validation,
    validation_name,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Say what to label, by what, and where to write the labels.

    Attributes:
        output: the COCO JSON to write. The page has the same name and the ending .html.
        images: folder of the images, or "".
        dataset: registered dataset of the images, or "". Either this or `images` is given.
        floor: the lowest score of a box that is written, from 0 to 1.
        min_score: the threshold of all classes, from 0 to 1; None to choose it on labelled images.
        thresholds: thresholds of single classes, by name. They count before `min_score`.
        validation: registered dataset on which thresholds are chosen. Empty: the first of DATASETS.TEST.
        results: COCO results of another program, in place of the teacher's boxes, or "".
        annotations: the COCO JSON whose image and category ids `results` uses.
        validation_results: results of the same program on the validation dataset, or "".
        onnx: a model of onnxruntime in place of the teacher, or None.
        page_images: number of images on the page.
        seed: chooses the images of the page.
    """

    output: Path
    images: str = ""
    dataset: str = ""
    floor: float = 0.05
    min_score: Optional[float] = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    validation: str = ""
    results: str = ""
    annotations: str = ""
    validation_results: str = ""
    onnx: Optional[OnnxModel] = None
    page_images: int = 24
    seed: int = 0


def label_images(cfg: CfgNode, options: Options) -> None:
    """Label images, and write the COCO JSON and the page. All processes must call this function.

    Args:
        cfg: the config of the distillation.

    Raises:
        GDetKDError: the options, the images, the datasets or the source of boxes are wrong, or no box reaches its
            threshold.
    """
    check_output(options.output)
    register_datasets(_without_later_datasets(cfg, options))
    student = student_classes(cfg)
    _check_options(options, student)
    dataset = "" if _gives_all_thresholds(options, student) else validation_name(cfg, options.validation)
    annotations = read_annotations(options.annotations) if options.results else None
    candidates = _find(options, annotations)
    images, faults = read_images(candidates)
    if faults:
        logger.warning("%d images cannot be read, and are left out: %s.", len(faults), name_faults(faults))
    images, left_out = without_labelled(cfg, images, options.validation or dataset)
    validation = load_validation(dataset, student) if dataset else None
    source, validation_source = _sources(cfg, options, student, annotations, validation)
    is_teacher = source.kind == "teacher"
    classes = find_among_students(cfg, student, source.class_names, source.num_classes, is_teacher)
    if comm.is_main_process():
        warn_of_classes_without_labels(student, classes)
    kept = Kept(options.floor, classes)
    part = Part(options.output, _settings(options, kept, student, source))
    lacking = [name for index, name in enumerate(student) if index not in classes]
    thresholds = _given_thresholds(options, student)
    if validation is not None:
        kind = _validation_kind(source, validation_source)
        found = detect_all(validation_source, validation.images, part, kind, kept)
        chosen, error = _choose_on_main(found, validation, student, lacking)
        if error := comm.all_gather(error)[0]:
            raise GDetKDError(error)
        thresholds = {**chosen, **thresholds}
        if comm.is_main_process():
            _print_table(HEADERS[:-1], [[name, *threshold_texts(item)] for name, item in thresholds.items()])
    boxes = detect_all(source, images, part, "labels", kept)
    if comm.is_main_process():
        pairs = [(image, boxes[image.name]) for image in images]
        thresholds = {name: thresholds[name] for name in student}
        labels = Labels(pairs, student, thresholds, dataset, len(faults), left_out)
        check_any_above(labels, part.folder)
        _write(labels, source, options)
        print(f"For DATASETS.REGISTER: {_entry(options.output, candidates.folder)}")
        part.remove()


def _without_later_datasets(cfg: CfgNode, options: Options) -> CfgNode:
    """Leave out entries of DATASETS.REGISTER whose JSON does not exist yet, unless this run reads the dataset.

    The config may already name the labels that are to be written.
    """
    needed = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, options.dataset, options.validation}
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.REGISTER = [entry for entry in cfg.DATASETS.REGISTER if not _is_later(entry, needed)]
    return cfg


def _is_later(entry: Any, needed: Collection[str]) -> bool:
    if not isinstance(entry, Mapping) or entry.get("name") in needed:
        return False
    return isinstance(entry.get("json"), str) and not os.path.exists(resolve(entry["json"]))


def _choose_on_main(
    found: Mapping[str, Found], validation: Validation, student: Sequence[str], lacking: Sequence[str]
) -> Tuple[Dict[str, ClassThreshold], str]:
    """Return the thresholds of the main process, and why they cannot be chosen; empty if they can."""
    if not comm.is_main_process():
        return {}, ""
    pairs = [(found[image.name], validation.objects[image.path]) for image in validation.images]
    try:
        return fill_gaps(choose_thresholds(pairs, len(student)), student, lacking, validation.dataset), ""
    except GDetKDError as e:
        return {}, str(e)


def _write(labels: Labels, source: Source, options: Options) -> None:
    write_labels(labels, source, options.output)
    page = options.output.with_suffix(".html")
    write_page(labels, source, page, options.page_images, options.seed)
    _print_table(HEADERS, table_rows(labels))
    above = sum(labels.counts_above().values())
    print(
        f"{above} boxes on {len(labels.images)} images reach the threshold of their class. Left out: "
        f"{labels.left_out} images of DATASETS.TRAIN, {labels.unreadable} unreadable images, {labels.dropped()} boxes "
        f"of classes that the student lacks.\nLabels: {options.output}\nPage: {page}"
    )


def _entry(output: Path, folder: str) -> str:
    """Return the entry of DATASETS.REGISTER for the labels of images in a folder."""
    entry = {"name": output.stem, "kind": "pseudo", "json": str(output.resolve()), "images": os.path.abspath(folder)}
    return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def _check_options(options: Options, student: Sequence[str]) -> None:
    if bool(options.images) == bool(options.dataset):
        raise GDetKDError("Name the images either with --images FOLDER or with --dataset NAME.")
    if options.results and options.onnx:
        raise GDetKDError("--results and --onnx both replace the teacher. Give one of them.")
    if options.results and not (options.annotations and options.images):
        raise GDetKDError(
            "--results needs --annotations FILE.json, which gives the image and category ids, and --images FOLDER, "
            "which holds the images that this file names."
        )
    if options.results and not options.validation_results and not _gives_all_thresholds(options, student):
        raise GDetKDError(
            "The thresholds of --results are not known. Give --min-score, or --validation-results FILE.json with the "
            "results of the same program on the validation dataset."
        )
    unknown = [name for name in options.thresholds if name not in student]
    if unknown:
        raise GDetKDError(
            f"--thresholds names {some(unknown)}, which is no class of the student. The classes are {some(student)}."
        )
    if options.page_images < 1:
        raise GDetKDError(f"--page-images is {options.page_images}. Give at least 1.")
    if not 0 <= options.floor < 1:
        raise GDetKDError(f"--floor is {options.floor:g}. Give a score from 0 on, and below 1.")
    given = [*options.thresholds.values(), *([] if options.min_score is None else [options.min_score])]
    for value in given:
        if not options.floor <= value < 1:
            raise GDetKDError(
                f"The threshold {value:g} is not between --floor ({options.floor:g}) and 1. Boxes below the floor are "
                "not kept, and no box has a score of 1. Give another threshold, or a lower --floor."
            )


def _gives_all_thresholds(options: Options, student: Sequence[str]) -> bool:
    return options.min_score is not None or set(student) <= set(options.thresholds)


def _given_thresholds(options: Options, student: Sequence[str]) -> Dict[str, ClassThreshold]:
    given = {} if options.min_score is None else dict.fromkeys(student, options.min_score)
    return {name: ClassThreshold(value) for name, value in {**given, **options.thresholds}.items()}


def _find(options: Options, annotations: Optional[Annotations]) -> Candidates:
    if options.dataset:
        return find_in_dataset(options.dataset)
    candidates = find_in_folder(options.images)
    return candidates if annotations is None else find_in_annotations(annotations.images, options.images)


def _sources(
    cfg: CfgNode,
    options: Options,
    student: Tuple[str, ...],
    annotations: Optional[Annotations],
    validation: Optional[Validation],
) -> Tuple[Source, Source]:
    """Return the source of the labels, and the source of the boxes on the validation dataset."""
    if annotations is not None:
        ids = [image["id"] for image in annotations.images]
        source = ResultsSource(options.results, "--results", ids, annotations.categories)
        if validation is None:
            return source, source
        ids = [image.identity for image in validation.images]
        flag = "--validation-results"
        return source, ResultsSource(options.validation_results, flag, ids, annotations.categories)
    chosen = TeacherSource(cfg) if options.onnx is None else OnnxSource(cfg, options.onnx, student)
    return chosen, chosen


def _settings(options: Options, kept: Kept, student: Sequence[str], source: Source) -> Dict[str, Any]:
    """Return everything that changes the boxes of the labels. Thresholds are not among it."""
    settings = {
        "source": source.kind,
        **source.settings(),
        "--floor": kept.floor,
        "student's classes": list(student),
        "matched classes": list(kept.classes),
    }
    if options.results:
        settings["annotations' SHA-256"] = sha256_of_file(options.annotations)
    return settings


def _validation_kind(source: Source, validation_source: Source) -> str:
    """Return the kind of the boxes on the validation dataset. Other results have a kind of their own.

    So a run without these results, or with corrected ones, keeps the boxes of the labels.
    """
    if validation_source is source:
        return "validation"
    return f"validation-{validation_source.origin()['sha256']}"


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines: List[Sequence[str]] = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
