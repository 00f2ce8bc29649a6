"""Which metrics a data set is evaluated with."""

import json
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Tuple

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
from ..files import written_whole

logger = logging.getLogger(__name__)

# What TEST.COCO_EVAL may say.
COCO_EVAL = ("", "pycocotools", "faster-coco-eval")
# How many detections of an image COCO's metrics count.
COCOS_DETECTIONS = 100


class CocoMetrics(COCOEvaluator):
    """Detectron2's, but the detections are written when the metrics are known, whole, and once.

    Detectron2 writes them before, and a second time in torch's format, whose writer hides the errors of the disk.

    Attributes:
        metrics: of the last evaluation, also where its detections could not be written.
    """

    def __init__(self, *args: Any, output_dir: str, **kwargs: Any) -> None:
        super().__init__(*args, output_dir=output_dir, **kwargs)
        self._folder, self._output_dir = output_dir, None
        self._detections: Optional[str] = None
        self.metrics: Dict[str, Any] = {}

    def evaluate(self, img_ids: Optional[List[int]] = None) -> Dict[str, Any]:
        """
        Raises:
            OSError: on the main process, when no other waits for it: the detections cannot be written.
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

    def _tasks_from_predictions(self, predictions: List[Dict[str, Any]]) -> List[str]:
        """Leave out masks and keypoints that the dataset has no labels of."""
        truth = list(self._coco_api.anns.values())
        lacking = {
            task
            for task, key in (("segm", "segmentation"), ("keypoints", "keypoints"))
            if truth and not any(annotation.get(key) for annotation in truth)
        }
        return [task for task in super()._tasks_from_predictions(predictions) if task not in lacking]

    def _eval_predictions(self, predictions: List[Dict[str, Any]], img_ids: Optional[List[int]] = None) -> None:
        found = [detection for of_image in predictions for detection in of_image["instances"]]
        # Meanwhile Detectron2 gives them the file's category ids, and pycocotools keys of its own.
        own_keys = list(found[0]) if found else []
        super()._eval_predictions(predictions, img_ids=img_ids)
        self._detections = json.dumps([{key: detection[key] for key in own_keys} for detection in found])


class FasterCOCOEvaluator(CocoMetrics):
    """COCO's metrics as the package faster-coco-eval computes them, where it can, else as pycocotools does.

    The package takes keypoints only from its own class of ground truth, which Detectron2 does not use. It does not take
    image ids that are text, such as VOC's.

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
        self._faster = COCOeval_faster

    def _eval_predictions(self, *args: Any, **kwargs: Any) -> None:
        # Detectron2 names pycocotools' class in its module, and has no place to give it another.
        official = coco_evaluation.COCOeval
        coco_evaluation.COCOeval = lambda truth, found, task: (self._faster if _is_fast(truth, task) else official)(
            truth, found, task
        )
        try:
            super()._eval_predictions(*args, **kwargs)
        finally:
            coco_evaluation.COCOeval = official


def _is_fast(truth: Any, task: str) -> bool:
    """Return whether faster-coco-eval can compute a task's metrics against pycocotools' ground truth."""
    return task != "keypoints" and all(isinstance(image_id, int) for image_id in truth.imgs)


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


class DiskTolerant(DatasetEvaluator):
    """An evaluator during training, which an error of the disk does not end: it is logged.

    It is built when the turn of its set comes, and forgotten with it. What fails on the main process alone comes after
    the last exchange of its evaluator, so that the processes stay together; what may fail on any is agreed upon.

    Args:
        build: makes the evaluator.
        dataset_name: of the registered set that it is for.
    """

    def __init__(self, build: Callable[[], DatasetEvaluator], dataset_name: str) -> None:
        self._build = build
        self._name = dataset_name
        self._evaluators: List[DatasetEvaluator] = []

    def reset(self) -> None:
        metadata = MetadataCatalog.get(self._name)
        is_converted, error = metadata.get("json_file") is None, ""
        try:
            built = self._build()
        except OSError as e:
            error = f"{type(e).__name__}: {e}"
        if error := max(comm.all_gather(error)):
            logger.error("%s cannot be evaluated now (%s); the training goes on.", self._name, error)
            self._evaluators = []
            if is_converted and metadata.get("json_file") is not None:
                del metadata.json_file  # Detectron2 names the file before it is there; the next time it is made anew
            return
        # One after the other: an error of the first would keep the main process from the exchange of the second.
        self._evaluators = list(built._evaluators) if isinstance(built, DatasetEvaluators) else [built]
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> Dict[str, Any]:
        evaluators, self._evaluators = self._evaluators, []
        return {name: value for evaluator in evaluators for name, value in self._results(evaluator).items()}

    def _results(self, evaluator: DatasetEvaluator) -> Dict[str, Any]:
        try:
            return evaluator.evaluate() or {}
        except OSError as e:
            logger.error(
                "What the evaluation of %s found could not be written (%s); the training goes on.",
                self._name,
                e.strerror or e,
            )
            return getattr(evaluator, "metrics", {})


def build_evaluator(cfg: CfgNode, dataset_name: str, tasks: Optional[Tuple[str, ...]] = None) -> DatasetEvaluator:
    """COCO's metrics for every data set, under `bbox`; for Detectron2's VOC sets also VOC's, under `voc`.

    A set of mere images has none; its detections are written down.
    COCO's count objects that VOC marks as difficult; VOC's does not.

    Args:
        tasks: of COCO's "bbox", "segm" and "keypoints"; None: all that the detector predicts.

    Raises:
        GDetKDError: TEST.COCO_EVAL names no implementation, or one that is not installed.
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
        # COCO counts 100. Objects that a detector finds beyond that would count as missed.
        options["max_dets_per_image"] = cfg.TEST.DETECTIONS_PER_IMAGE
        logger.info(
            "AP of %s counts up to %d detections an image (TEST.DETECTIONS_PER_IMAGE); COCO's own is of 100.",
            dataset_name,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    if implementation not in COCO_EVAL:
        raise GDetKDError(f"TEST.COCO_EVAL is {implementation!r}; there are {', '.join(map(repr, COCO_EVAL))}.")
    if implementation == "faster-coco-eval":
        return FasterCOCOEvaluator(dataset_name, tasks, output_dir=folder, **options)
    fast = implementation == "" and has_compiled_ops()
    return CocoMetrics(dataset_name, tasks, output_dir=folder, use_fast_impl=fast, **options)


def _forget_converted(folder: str, dataset_name: str) -> None:
    """Detectron2 converts a set without a JSON file once and would evaluate against that although the set changes."""
    converted = os.path.join(folder, f"{dataset_name}_coco_format.json")
    # Within a run it is converted once, and its metadata then names the file.
    is_new = MetadataCatalog.get(dataset_name).get("json_file") is None
    try:
        if is_new and comm.is_main_process() and os.path.exists(converted):
            os.remove(converted)
    finally:
        comm.synchronize()
