"""Score the teacher on a few images of a dataset, for `--check`."""

import copy
import math
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T

from ..data.catalog import load_dataset
from ..data.headers import for_evaluation
from ..errors import GDetKDError
from ..teacher import FrozenTeacher
from .config_doubts import sizes_in_training
from .preprocessing import FlippedChannels, Preprocessing, teacher_sees
from .teacher_evaluation import evaluate_on, teachers_classes_in


@dataclass(frozen=True)
class SampleScore:
    """Hold the teacher's score on a sample.

    Attributes:
        ap: COCO's box AP in percent, over the classes that student and teacher both have.
        images: number of images.
        classes: number of classes.
        side: length of the short side of the first image, in pixels.
        side_in_training: the same as the teacher sees the image in training. None if that is not known.
    """

    ap: float
    images: int
    classes: int
    side: int
    side_in_training: Optional[int]


def score_on_sample(
    cfg: CfgNode,
    teacher: FrozenTeacher,
    dataset: str,
    count: int,
    preprocessing: Optional[Preprocessing] = None,
    as_in_training: bool = False,
) -> SampleScore:
    """Return the teacher's AP on images of a registered dataset.

    Args:
        count: number of images, evenly spread over the dataset.
        preprocessing: replaces the teacher's own preprocessing.
        as_in_training: whether the images have the size that the teacher sees in training, and not that of its own
            evaluation.

    Raises:
        GDetKDError: the images have no object, the dataset has none of the teacher's classes, or it does not name its
            classes.
    """
    flip = preprocessing is not None and preprocessing.input_format != teacher.file.input_format
    changed = nullcontext() if preprocessing is None else teacher_sees(teacher, preprocessing)
    with _sample(dataset, count) as sample, changed:
        images = load_dataset(sample)
        if not any(image.get("annotations") for image in images):
            raise GDetKDError(
                f"The {len(images)} images of {dataset!r} that were chosen have no object. Raise --check-images."
            )
        resize = _resize_as_in_training(cfg)
        loader = _loader_of(teacher, images, resize) if as_in_training else teacher.file.test_loader(sample)
        first = loader.dataset[0]  # an iterator would start the loader's processes
        with tempfile.TemporaryDirectory() as folder:
            shown = FlippedChannels(loader) if flip else loader
            results = evaluate_on(cfg, teacher, sample, folder, shown)["bbox"]
    names = MetadataCatalog.get(dataset).thing_classes
    kept = teachers_classes_in(cfg, teacher, dataset)
    shared = names if kept is None else [names[index] for index in kept if index is not None]
    # Detectron2 gives no AP of a class if there is only one class or nothing is found. It gives NaN if the sample has
    # no object of the class.
    values = [results.get(f"AP-{name}", results["AP"]) for name in shared]
    values = [value for value in values if not math.isnan(value)]
    ap, side = sum(values) / max(1, len(values)), min(first["image"].shape[1:])
    return SampleScore(ap, len(images), len(shared), side, _side_after(resize, first))


def _resize_as_in_training(cfg: CfgNode) -> Optional[T.ResizeShortestEdge]:
    """Return how images are resized to the size that a teacher sees in training. Of several sizes it is the middle.

    None: there is no such size (`sizes_in_training`).
    """
    sizes, scale = sizes_in_training(cfg), cfg.DISTILL.TEACHER.SCALE
    if not sizes:
        return None
    return T.ResizeShortestEdge(round(scale * (min(sizes) + max(sizes)) / 2), round(scale * cfg.INPUT.MAX_SIZE_TRAIN))


def _side_after(resize: Optional[T.ResizeShortestEdge], image: Dict[str, Any]) -> Optional[int]:
    if resize is None:
        return None
    return min(resize.get_output_shape(image["height"], image["width"], resize.short_edge_length[0], resize.max_size))


def _loader_of(teacher: FrozenTeacher, images: List[Any], resize: T.ResizeShortestEdge) -> Any:
    mapper = DatasetMapper(is_train=False, augmentations=[resize], image_format=teacher.file.input_format)
    return build_detection_test_loader(images, mapper=mapper)


def evenly_spread(items: Sequence[Any], count: int) -> List[Any]:
    """Return `count` items, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@contextmanager
def _sample(name: str, count: int) -> Iterator[str]:
    """Register evenly spread images of a dataset under another name inside. Yield that name."""
    dicts = load_dataset(name)  # this may also set the names of the classes
    if not MetadataCatalog.get(name).get("thing_classes"):
        raise GDetKDError(
            f"The dataset {name!r} does not name its classes, which an evaluation needs. Give them with "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...])."
        )
    chosen = for_evaluation(evenly_spread(dicts, count))
    sample = f"{name}_{len(chosen)}_images"
    DatasetCatalog.register(sample, lambda: copy.deepcopy(chosen))
    # The JSON file is left out: Detectron2 would evaluate against all of its images.
    known = MetadataCatalog.get(name).as_dict()
    kept = {key: known[key] for key in ("thing_classes", "thing_dataset_id_to_contiguous_id") if key in known}
    MetadataCatalog.get(sample).set(**kept, evaluator_type="coco")
    try:
        yield sample
    finally:
        DatasetCatalog.remove(sample)
        MetadataCatalog.remove(sample)
