"""Build the evaluators of a dataset."""

import importlib
import json
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm

from .._compat import has_compiled_ops
from .._compat.evaluation import CocoSteps, coco_eval_made_by
from ..errors import GDetKDError, first_line
from ..files import written_whole

logger = logging.getLogger(__name__)

# The values of TEST.COCO_EVAL.
COCO_EVAL = ("", "pycocotools", "faster-coco-eval")
# COCO's metrics count so many detections of an image.
COCOS_DETECTIONS = 100


class CocoMetrics(CocoSteps):
    """Compute COCO's metrics, and write the detections afterwards, once and as a whole file.

    Detectron2 writes them before, and a second time in torch's format, whose writer hides errors of the disk.

    Args:
        output_dir: folder of the detections.

    Attributes:
        metrics: results of the last evaluation, even if its detections could not be written.
    """

    def __init__(self, *args: Any, output_dir: str, **kwargs: Any) -> None:
        super().__init__(*args, output_dir=output_dir, **kwargs)
        self._folder = output_dir
        self._detections: Optional[str] = None
        self.metrics: Dict[str, Any] = {}

    def evaluate(self, img_ids: Optional[List[int]] = None) -> Dict[str, Any]:
        """
        Raises:
            OSError: the main process cannot write the detections. No other process waits for it then.
        """
        self.metrics, self._detections = {}, None
        self.metrics = super().evaluate(img_ids)
        if self._detections is not None:
            os.makedirs(self._folder, exist_ok=True)
            path = os.path.join(self._folder, "coco_instances_results.json")
            logger.info("Detections: %s", path)
            with written_whole(path) as file:
                file.write(self._detections)
        return self.metrics

    def choose_tasks(self, predictions: List[Dict[str, Any]]) -> List[str]:
        """Leave out masks and keypoints if the dataset has no labels of them."""
        truth = self.annotations()
        lacking = {
            task
            for task, key in (("segm", "segmentation"), ("keypoints", "keypoints"))
            if truth and not any(annotation.get(key) for annotation in truth)
        }
        return [task for task in super().choose_tasks(predictions) if task not in lacking]

    def compute(self, predictions: List[Dict[str, Any]], img_ids: Optional[List[int]] = None) -> None:
        found = [detection for prediction in predictions for detection in prediction["instances"]]
        # Detectron2 replaces the category ids by those of the file, and pycocotools adds keys.
        keys = list(found[0]) if found else []
        super().compute(predictions, img_ids)
        self._detections = json.dumps([{key: detection[key] for key in keys} for detection in found])


class FasterCOCOEvaluator(CocoMetrics):
    """Compute COCO's metrics with the package faster-coco-eval, or with pycocotools if the package cannot.

    The package takes keypoints only with its own class of ground truth, which Detectron2 does not use. It does not take
    image ids that are text, such as those of VOC.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from faster_coco_eval import COCOeval_faster

        super().__init__(*args, use_fast_impl=False, **kwargs)
        self._faster = COCOeval_faster

    def compute(self, predictions: List[Dict[str, Any]], img_ids: Optional[List[int]] = None) -> None:
        with coco_eval_made_by(lambda truth, task: self._faster if _is_fast(truth, task) else None):
            super().compute(predictions, img_ids)


def _is_fast(truth: Any, task: str) -> bool:
    """Return whether faster-coco-eval can compute a task's metrics against pycocotools' ground truth."""
    return task != "keypoints" and all(isinstance(image_id, int) for image_id in truth.imgs)


class VOCMetric(PascalVOCDetectionEvaluator):
    """Compute VOC's metric, and name it `voc`: COCO's metric is already named `bbox`."""

    def evaluate(self) -> Optional[Dict[str, Any]]:
        results = super().evaluate()
        return None if results is None else {"voc": results["bbox"]}


class DetectionWriter(DatasetEvaluator):
    """Write detections in COCO's result format, with file names as image ids.

    Args:
        path: file to write.
    """

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
        with written_whole(self._path) as file:
            json.dump([detection for detections in gathered for detection in detections], file)
        logger.info("Detections: %s", self._path)
        return {}


def wrong_implementation(cfg: CfgNode) -> List[str]:
    """Return what is wrong with TEST.COCO_EVAL, and what to do. The list is empty if nothing is wrong."""
    implementation = cfg.TEST.COCO_EVAL
    if implementation not in COCO_EVAL:
        return [f"TEST.COCO_EVAL is {implementation!r} and must be one of {', '.join(map(repr, COCO_EVAL))}"]
    if implementation == "faster-coco-eval":
        try:
            importlib.import_module("faster_coco_eval")
        except ImportError as e:
            return [
                f"TEST.COCO_EVAL is 'faster-coco-eval', but that package cannot be imported ({first_line(e)}): install "
                "it with pip install faster-coco-eval, or set TEST.COCO_EVAL to ''"
            ]
    return []


def build_evaluator(cfg: CfgNode, dataset_name: str, tasks: Optional[Tuple[str, ...]] = None) -> DatasetEvaluator:
    """Build the evaluator of a dataset.

    - Every dataset with labels gets COCO's metrics, under `bbox`.
    - Detectron2's VOC datasets also get VOC's metric, under `voc`. It leaves out objects that VOC marks as difficult,
      and COCO's metrics count them.
    - A dataset without labels has no metrics. Its detections are written to a file.

    Args:
        tasks: any of COCO's "bbox", "segm" and "keypoints". None stands for all that the detector predicts.

    Raises:
        GDetKDError: TEST.COCO_EVAL names an unknown implementation, or one that is not installed.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "images":
        return DetectionWriter(os.path.join(folder, f"{dataset_name}_detections.json"))
    _forget_converted(folder, dataset_name)
    coco = _coco_evaluator(cfg, dataset_name, tasks, folder)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        return DatasetEvaluators([coco, VOCMetric(dataset_name)])
    return coco


def _coco_evaluator(cfg: CfgNode, dataset_name: str, tasks: Optional[Tuple[str, ...]], folder: str) -> CocoMetrics:
    implementation, options = cfg.TEST.COCO_EVAL, {"kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS}
    if cfg.TEST.DETECTIONS_PER_IMAGE > COCOS_DETECTIONS:
        # Objects that a detector finds beyond COCO's 100 detections would count as missed.
        options["max_dets_per_image"] = cfg.TEST.DETECTIONS_PER_IMAGE
        logger.info(
            "AP on %s counts up to %d detections an image (TEST.DETECTIONS_PER_IMAGE). COCO's own AP counts 100.",
            dataset_name,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    for wrong in wrong_implementation(cfg):
        raise GDetKDError(f"{wrong}.")
    if implementation == "faster-coco-eval":
        return FasterCOCOEvaluator(dataset_name, tasks, output_dir=folder, **options)
    fast = implementation == "" and has_compiled_ops()
    return CocoMetrics(dataset_name, tasks, output_dir=folder, use_fast_impl=fast, **options)


def _forget_converted(folder: str, dataset_name: str) -> None:
    """Remove the JSON file that Detectron2 made of a dataset in an earlier run: the dataset may have changed.

    Detectron2 converts a dataset once in a run. Then the metadata name the file. If somebody has removed it since, its
    name is forgotten, so that Detectron2 writes it again.
    """
    converted = os.path.join(folder, f"{dataset_name}_coco_format.json")
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") == converted and not os.path.exists(converted):
        del metadata.json_file
    is_new = metadata.get("json_file") is None
    try:
        if is_new and comm.is_main_process() and os.path.exists(converted):
            os.remove(converted)
    finally:
        comm.synchronize()
