"""Keep the evaluations during training from ending a run when the disk is full."""

import logging
from typing import Any, Callable, Dict, List

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .._compat.evaluation import parts_of

logger = logging.getLogger(__name__)


class DiskTolerant(DatasetEvaluator):
    """Evaluate during training, and log errors of the disk instead of ending the run.

    The evaluator is built when the evaluation of its dataset begins. An error while it is built can come on any
    process, so the processes agree on it. Later errors come on the main process alone, after the last exchange of the
    evaluator. So the processes stay together.

    Args:
        build: returns the evaluator.
        dataset_name: name of the registered dataset.
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
            logger.error("Could not evaluate %s (%s). The training goes on. Make room on the disk.", self._name, error)
            self._evaluators = []
            if is_converted and metadata.get("json_file") is not None:
                # Detectron2 names the file before it writes it. Let it write the file next time.
                del metadata.json_file
            return
        # They run one by one. An error of the first would keep the main process from the exchange of the second.
        self._evaluators = parts_of(built)
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
                "Could not write the detections on %s (%s). The training goes on. Make room on the disk.",
                self._name,
                e.strerror or e,
            )
            return getattr(evaluator, "metrics", {})
