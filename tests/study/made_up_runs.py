"""Write the files of complete runs without training, for tests of comparisons and reports."""

import json
import math
from pathlib import Path

from gdetkd.metrics_file import EARLY_END
from gdetkd.study.comparison import Comparison
from gdetkd.study.step_time import StepTime

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart" / "faster_rcnn-faster_rcnn.yaml")
SETTING = {"Student": "a <small> one", "Machine": "this"}


def finish(run, ap, memory=None, seconds=100.0, end=None):
    """Write the files of a complete run. The wall time `seconds` must not affect any result.

    Args:
        end: the iterations after which the run ended. If they are fewer than `run.max_iter`, it ended early.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    end = end or run.max_iter
    if end < run.max_iter:
        (run.folder / EARLY_END).write_text(json.dumps({"iterations": end}))
    middle = end // 2
    lines = []
    for iteration, share in ((middle, 0.5), (end, 1.0)):
        line = {"iteration": iteration - 1, "train_seconds": seconds * share, "total_loss": 1.0}
        lines.append(line if memory is None else {**line, "max_mem": memory * share})
        metrics = {"AP": ap * share, "AP50": ap * share + 20, "AP75": ap * share + 5, "APs": ap / 2, "APm": ap}
        lines.append({"iteration": iteration, **{f"bbox/{k}": v for k, v in metrics.items()}, "bbox/APl": math.nan})
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (run.folder / "model_final.pth").touch()


AP = {"none": (10.0, 12.0, 14.0), "PKD": (15.0, 16.0, 17.0), "GDetKD": (30.0, 34.0, 35.0), "SGFI+CKD": (9.0, 10.0, 8.0)}
RATIOS = {"PKD": 1.3, "GDetKD": 2.0, "SGFI+CKD": 1.03}
STEP = 0.2  # seconds of the baseline's step


def step_times(ratios):
    return {name: StepTime(ratio, ratio - 0.1, ratio + 0.1, STEP, 1, "cpu") for name, ratio in ratios.items()}


def finished(folder, schedules=(1.0,), equal_time=False, memory=None, methods=tuple(AP), ratios=RATIOS):
    comparison = Comparison(CONFIG, [], folder, methods, (1, 2, 3), schedules, equal_time)
    comparison.step_times = step_times(ratios)
    for (method, schedule), runs in comparison.runs.items():
        for run, ap in zip(runs, AP[method]):
            # The longer the schedule, the smaller the gain.
            grown = ap + 20 * math.log2(schedule) if method == "none" else ap + 5 * math.log2(schedule)
            finish(run, grown, None if memory is None else memory[method])
    if equal_time:
        comparison.add_equal_time()
        for runs in comparison.equal_time_runs.values():
            for run, ap in zip(runs, (20.0, 21.0, 22.0)):
                if not run.is_complete():
                    finish(run, ap)
    return comparison


def row_of(rows, method, schedule=1.0):
    return next(row for row in rows if (row.method, row.schedule) == (method, schedule))
