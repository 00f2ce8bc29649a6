"""Map the images of a training set to training samples."""

import copy
from typing import Any, Callable, Dict

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from .class_names import class_names
from .instaboost import InstaBoostMapper
from .task_labels import has_keypoint_head, has_mask, objects_of
from .teacher_view import CacheKeyMapper, TeacherViewMapper
from .unlabeled import UnlabeledMapper

Sample = Dict[str, Any]


class TrainMapper(DatasetMapper):
    """Map training images as Detectron2 does, but leave out the masks of an image in which an object has none.

    Detectron2 reads masks whenever MODEL.MASK_ON is True, and with INPUT.CROP it fits the boxes to them. It fails on
    images without objects, and for a detector of boxes alone on objects without masks.
    """

    def __call__(self, dataset_dict: Sample) -> Sample:
        objects = objects_of(dataset_dict)
        if not self.use_instance_mask or (objects and all(map(has_mask, objects))):
            return super().__call__(dataset_dict)
        mapper = copy.copy(self)
        mapper.use_instance_mask = mapper.recompute_boxes = False
        return mapper(dataset_dict)


def build_mapper(cfg: CfgNode) -> Callable[[Sample], Sample]:
    """Build the mapper of a training loader: Detectron2's, with what INPUT.INSTABOOST and DISTILL.TEACHER ask for."""
    plain = TrainMapper(cfg, is_train=True)
    plain.use_keypoint = has_keypoint_head(cfg)  # otherwise the dataset may have keypoints for some objects only
    has_view = cfg.DISTILL.TEACHER.SCALE != 1 and cfg.DISTILL.LOSSES
    mapper = TeacherViewMapper(plain, cfg.DISTILL.TEACHER.SCALE) if has_view else plain
    labeled = InstaBoostMapper(cfg, mapper) if cfg.INPUT.INSTABOOST.ENABLED else mapper
    whole = UnlabeledMapper(labeled, mapper, len(class_names(cfg))) if cfg.DATASETS.UNLABELED else labeled
    has_cache = cfg.DISTILL.TEACHER.CACHE_MB > 0 and cfg.DISTILL.LOSSES
    return CacheKeyMapper(whole) if has_cache else whole
