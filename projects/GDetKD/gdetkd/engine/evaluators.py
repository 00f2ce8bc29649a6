"""Which metrics a data set is evaluated with."""

import os
from typing import Any, Dict, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm

from .._compat import has_compiled_ops


class VOCMetric(PascalVOCDetectionEvaluator):
    """VOC's metric, under `voc` instead of `bbox`, which is COCO's."""

    def evaluate(self) -> Optional[Dict[str, Any]]:
        results = super().evaluate()
        return None if results is None else {"voc": results["bbox"]}


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """COCO's metrics for every data set, under `bbox`; for Detectron2's VOC sets also VOC's, under `voc`.

    COCO's count objects that VOC marks as difficult; VOC's does not.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    _forget_converted(folder, dataset_name)
    coco = COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=has_compiled_ops())
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        return DatasetEvaluators([coco, VOCMetric(dataset_name)])
    return coco


def _forget_converted(folder: str, dataset_name: str) -> None:
    """Detectron2 converts a set without a JSON file once and would evaluate against that although the set changes."""
    converted = os.path.join(folder, f"{dataset_name}_coco_format.json")
    # Within a run it is converted once, and its metadata then names the file.
    is_new = MetadataCatalog.get(dataset_name).get("json_file") is None
    if is_new and comm.is_main_process() and os.path.exists(converted):
        os.remove(converted)
    comm.synchronize()
