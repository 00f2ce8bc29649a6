"""Which metrics a data set is evaluated with."""

import json
import logging
import os
from typing import Any, Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm

from .._compat import has_compiled_ops
from ..errors import GDetKDError

logger = logging.getLogger(__name__)

# What TEST.COCO_EVAL may say.
COCO_EVAL = ("", "pycocotools", "faster-coco-eval")


class FasterCOCOEvaluator(COCOEvaluator):
    """COCO's metrics as the package faster-coco-eval computes them.

    Raises:
        GDetKDError: it is not installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            from faster_coco_eval import COCOeval_faster
        except ImportError as e:
            raise GDetKDError(
                "TEST.COCO_EVAL faster-coco-eval needs that package: pip install 'gdetkd[eval]', or set it to ''."
            ) from e
        super().__init__(*args, use_fast_impl=False, **kwargs)
        self._implementation = COCOeval_faster

    def _eval_predictions(self, *args: Any, **kwargs: Any) -> None:
        # Detectron2 names pycocotools' class in its module, and has no place to give it another.
        official = coco_evaluation.COCOeval
        coco_evaluation.COCOeval = self._implementation
        try:
            super()._eval_predictions(*args, **kwargs)
        finally:
            coco_evaluation.COCOeval = official


class VOCMetric(PascalVOCDetectionEvaluator):
    """VOC's metric, under `voc` instead of `bbox`, which is COCO's."""

    def evaluate(self) -> Optional[Dict[str, Any]]:
        results = super().evaluate()
        return None if results is None else {"voc": results["bbox"]}


class DetectionWriter(DatasetEvaluator):
    """Writes detections in COCO's result format, with file names for image ids."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._detections: List[Dict[str, Any]] = []

    def reset(self) -> None:
        self._detections = []

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        for sample, output in zip(inputs, outputs):
            self._detections += instances_to_coco_json(output["instances"].to("cpu"), sample["image_id"])

    def evaluate(self) -> Optional[Dict[str, Any]]:
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return None
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "w") as file:
            json.dump([detection for of_rank in gathered for detection in of_rank], file)
        logger.info("Detections: %s", self._path)
        return {}


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """COCO's metrics for every data set, under `bbox`; for Detectron2's VOC sets also VOC's, under `voc`.

    A set of mere images has none; its detections are written down.
    COCO's count objects that VOC marks as difficult; VOC's does not.

    Raises:
        GDetKDError: TEST.COCO_EVAL names no implementation, or one that is not installed.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "images":
        return DetectionWriter(os.path.join(folder, f"{dataset_name}_detections.json"))
    _forget_converted(folder, dataset_name)
    coco = _coco_evaluator(cfg.TEST.COCO_EVAL, dataset_name, folder)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        return DatasetEvaluators([coco, VOCMetric(dataset_name)])
    return coco


def _coco_evaluator(implementation: str, dataset_name: str, folder: str) -> COCOEvaluator:
    if implementation not in COCO_EVAL:
        raise GDetKDError(f"TEST.COCO_EVAL is {implementation!r}; there are {', '.join(map(repr, COCO_EVAL))}.")
    if implementation == "faster-coco-eval":
        return FasterCOCOEvaluator(dataset_name, output_dir=folder)
    fast = implementation == "" and has_compiled_ops()
    return COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=fast)


def _forget_converted(folder: str, dataset_name: str) -> None:
    """Detectron2 converts a set without a JSON file once and would evaluate against that although the set changes."""
    converted = os.path.join(folder, f"{dataset_name}_coco_format.json")
    # Within a run it is converted once, and its metadata then names the file.
    is_new = MetadataCatalog.get(dataset_name).get("json_file") is None
    if is_new and comm.is_main_process() and os.path.exists(converted):
        os.remove(converted)
    comm.synchronize()
