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
    coco = COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=has_compiled_ops())
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        return DatasetEvaluators([coco, VOCMetric(dataset_name)])
    return coco
