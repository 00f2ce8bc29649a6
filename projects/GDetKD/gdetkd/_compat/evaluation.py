"""Open Detectron2's COCO evaluation."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators, coco_evaluation


class CocoSteps(COCOEvaluator):
    """Detectron2's COCO evaluator, with names for the steps that a subclass changes, and without its files.

    The steps have no public names in v0.6 and main. An evaluator that gets no folder cannot convert a dataset without
    a JSON file, so the folder is taken away afterwards.

    Args:
        output_dir: folder for the JSON file of a dataset that has none.
    """

    def __init__(self, *args: Any, output_dir: str, **kwargs: Any) -> None:
        super().__init__(*args, output_dir=output_dir, **kwargs)
        self._output_dir = None

    def annotations(self) -> List[Dict[str, Any]]:
        """Return the annotations that the detections are compared with."""
        return list(self._coco_api.anns.values())

    def choose_tasks(self, predictions: List[Dict[str, Any]]) -> List[str]:
        """Return which of "bbox", "segm" and "keypoints" the detections are evaluated for."""
        return super()._tasks_from_predictions(predictions)

    def compute(self, predictions: List[Dict[str, Any]], img_ids: Optional[List[int]] = None) -> None:
        """Compute the metrics of the gathered predictions."""
        super()._eval_predictions(predictions, img_ids=img_ids)

    def _tasks_from_predictions(self, predictions: List[Dict[str, Any]]) -> List[str]:
        return self.choose_tasks(predictions)

    def _eval_predictions(self, predictions: List[Dict[str, Any]], img_ids: Optional[List[int]] = None) -> None:
        self.compute(predictions, img_ids)


@contextmanager
def coco_eval_made_by(choose: Callable[[Any, str], Optional[type]]) -> Iterator[None]:
    """Let Detectron2's COCO evaluators compute with another class than pycocotools' inside.

    v0.6 and main name that class in their module, and an evaluator takes no other.

    Args:
        choose: gets the ground truth and the task, and returns the class. None stands for pycocotools' class.
    """
    official = coco_evaluation.COCOeval

    def make(truth: Any, detections: Any, task: str) -> Any:
        return (choose(truth, task) or official)(truth, detections, task)

    coco_evaluation.COCOeval = make
    try:
        yield
    finally:
        coco_evaluation.COCOeval = official


def parts_of(evaluator: DatasetEvaluator) -> List[DatasetEvaluator]:
    """Return the evaluators that a `DatasetEvaluators` runs, private in v0.6 and main, or the evaluator itself."""
    return list(evaluator._evaluators) if isinstance(evaluator, DatasetEvaluators) else [evaluator]
