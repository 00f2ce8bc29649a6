"""Teachers from yaml configs of Detectron2."""

from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from torch import nn

from ..config import add_gdetkd_config, plain_config
from ..config_file import merge_config_file, merge_words
from ..data.class_names import class_names
from ..detector_config import needs_proposals, wrong_parts
from ..dotted_keys import flat_config
from ..errors import GDetKDError
from ..trained_with import other_settings
from .base import TeacherFile

# Keys of a yaml that describe the detector, its images and its classes.
CONTENT = (
    "MODEL.",
    "INPUT.FORMAT",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "DATASETS.TRAIN",
    "DATASETS.REGISTER",
)


class YamlTeacher(TeacherFile):
    """Read a teacher's yaml config.

    Attributes:
        cfg: the teacher's config, with DISTILL.TEACHER.OPTS applied.

    Raises:
        GDetKDError: the file is no valid config, names parts that do not exist or do not fit, or asks for precomputed
            proposals.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.path = cfg.DISTILL.TEACHER.CONFIG_FILE
        teacher_cfg = get_cfg()
        add_gdetkd_config(teacher_cfg)
        merge_config_file(teacher_cfg, self.path)
        merge_words(teacher_cfg, list(cfg.DISTILL.TEACHER.OPTS), "DISTILL.TEACHER.OPTS")
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        if cfg.DISTILL.TEACHER.WEIGHTS:
            teacher_cfg.MODEL.WEIGHTS = cfg.DISTILL.TEACHER.WEIGHTS
        if teacher_cfg.MODEL.LOAD_PROPOSALS or needs_proposals(teacher_cfg):
            raise GDetKDError(
                f"The teacher's config {self.path!r} asks for precomputed proposals (MODEL.LOAD_PROPOSALS, "
                "MODEL.PROPOSAL_GENERATOR.NAME). Such a teacher cannot look at the student's regions. Choose a teacher "
                "that makes its own proposals."
            )
        teacher_cfg.freeze()
        self.cfg = plain_config(teacher_cfg)
        if wrong := wrong_parts(self.cfg):
            raise GDetKDError(
                f"The teacher's config {self.path!r} has invalid values: {'; '.join(wrong)}. Correct them in that file "
                "or in DISTILL.TEACHER.OPTS."
            )
        self.weights = self.cfg.MODEL.WEIGHTS
        self.input_format = self.cfg.INPUT.FORMAT

    def build(self) -> nn.Module:
        return build_model(self.cfg)

    def content(self) -> str:
        items = flat_config(self.cfg.dump()).items()
        return str(sorted((key, value) for key, value in items if key.startswith(CONTENT) and key != "MODEL.DEVICE"))

    def other_settings(self, settings: Dict[str, Any]) -> List[str]:
        return other_settings(settings, self.cfg)

    def limits(self) -> Dict[str, Any]:
        return {"TEST.DETECTIONS_PER_IMAGE": self.cfg.TEST.DETECTIONS_PER_IMAGE}

    def class_names(self) -> Optional[Tuple[str, ...]]:
        return class_names(self.cfg)

    def test_loader(self, dataset_name: str) -> Any:
        return build_detection_test_loader(self.cfg, dataset_name)
