"""Order a trainer's hooks, identically on every process."""

from typing import Any, Callable, Dict, List, Optional

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PreciseBN
from detectron2.utils import comm

from ..metrics_file import score_prefix
from .catch_up import CatchUp, EvaluationNote
from .hooks import EvaluationHook, KeepBest, RandomState, Stopwatch
from .patience import Patience
from .precise_bn import PreciseStatistics
from .stopping import AgreedStop, StopRequest


def order_hooks(
    detectron2_hooks: List[Optional[HookBase]],
    trainer: Any,
    request: StopRequest,
    random_state: RandomState,
    evaluate: Callable[[], Dict[str, Any]],
    patience: Patience,
    note: EvaluationNote,
) -> List[HookBase]:
    """Return Detectron2's hooks with the hooks of GDetKD at their places.

    The main process alone has hooks that write files, and no place may depend on them. Otherwise a hook that exchanges
    something would run at another time on the main process, and the processes would wait for ever.

    Args:
        detectron2_hooks: the hooks that `DefaultTrainer.build_hooks` returns.
        trainer: a `DistillTrainer`.
        request: tells whether the run is asked to stop.
        random_state: collects the state of each process for a checkpoint.
        evaluate: returns the metrics of DATASETS.TEST.
        patience: ends a training whose AP no longer rises.
        note: notes the last evaluation.
    """
    cfg = trainer.cfg
    period = cfg.TEST.EVAL_PERIOD
    hooks = [hook for hook in detectron2_hooks if hook is not None]
    place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
    before, after = hooks[:place], hooks[place + 1 :]
    writes = [hook for hook in before if isinstance(hook, PeriodicCheckpointer)]
    precise = [PreciseStatistics(hook, period, request) for hook in before if isinstance(hook, PreciseBN)]
    before = [hook for hook in before if not isinstance(hook, (PeriodicCheckpointer, PreciseBN))]
    evaluation, best = EvaluationHook(period, evaluate), None
    if cfg.TEST.KEEP_BEST and cfg.DATASETS.TEST and comm.is_main_process():
        metric = f"{score_prefix(cfg)}bbox/AP"
        run = trainer.checkpointer.checkpointables["run"]
        best = KeepBest(period, trainer.student, cfg.OUTPUT_DIR, cfg.DATASETS.TEST[0], run, metric)
    estimate = precise[0] if precise else None
    catch_up = CatchUp(period, note, evaluation, best, estimate, request, random_state, patience)
    return [
        Stopwatch(),
        *before,
        *precise,
        AgreedStop(request, random_state),
        random_state,
        *writes,
        evaluation,
        AgreedStop(request, random_state),
        *([] if best is None else [best]),
        catch_up,
        patience,
        *after,
    ]
