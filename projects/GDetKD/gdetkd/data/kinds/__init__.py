from .base import DATASET_KIND_REGISTRY, Counts, DatasetKind, Keys, dataset_kinds, describe, find_kind
from .coco import Coco
from .images import Images
from .pseudo import Pseudo
from .voc import Voc
from .yolo import Yolo

__all__ = [
    "Coco",
    "Counts",
    "DATASET_KIND_REGISTRY",
    "DatasetKind",
    "Images",
    "Keys",
    "Pseudo",
    "Voc",
    "Yolo",
    "dataset_kinds",
    "describe",
    "find_kind",
]
