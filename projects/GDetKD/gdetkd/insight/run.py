"""Read the folder of a finished run: its config, its checkpoints and its metrics."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config_file import load_config
from ..detectors import DetectorAdapter, build_adapter
from ..distiller import GDetKD
from ..engine import build_plain_student
from ..engine.checkpoint import NUMBERED
from ..errors import GDetKDError
from ..metrics_file import MetricsFile, score_prefix
from ..safe_load import SafeCheckpointer, read_weights


class FinishedRun:
    """Give access to a finished run.

    Args:
        folder: the OUTPUT_DIR of the run.

    Attributes:
        cfg: the run's config, with device "cpu" if this machine has no GPU.

    Raises:
        GDetKDError: the folder has no config.yaml or no model_final.pth.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        for name in ("config.yaml", "model_final.pth"):
            if not (self.folder / name).is_file():
                raise GDetKDError(
                    f"{folder!r} is not the OUTPUT_DIR of a finished run: it has no {name}. Name the folder of a run "
                    "that has ended."
                )
        self.cfg: CfgNode = load_config(str(self.folder / "config.yaml"), ["OUTPUT_DIR", str(folder)])
        if not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
            if self.cfg.DISTILL.TEACHER.DTYPE == "float16":  # it needs a GPU
                self.cfg.DISTILL.TEACHER.DTYPE = "float32"
        # SOLVER.REFERENCE_WORLD_SIZE may have changed the number of iterations after the config was written.
        trained = [line["iteration"] for line in MetricsFile(self.folder).lines() if "total_loss" in line]
        if trained:
            self.cfg.SOLVER.MAX_ITER = max(trained) + 1

    def checkpoints(self) -> List[Tuple[int, Path]]:
        """Return the iterations done and the file of each checkpoint in order. The last is model_final.pth."""
        paths = [path for path in sorted(self.folder.glob("model_*.pth")) if NUMBERED.fullmatch(path.name)]
        numbered = [(int(NUMBERED.fullmatch(path.name)[1]) + 1, path) for path in paths]
        end = self.cfg.SOLVER.MAX_ITER
        earlier = [(iterations, path) for iterations, path in numbered if iterations < end]
        return [*earlier, (end, self.folder / "model_final.pth")]

    def student(self) -> nn.Module:
        """Return the plain detector with the weights of model_final.pth, in eval mode."""
        model = build_plain_student(self.cfg)
        SafeCheckpointer(model).load(str(self.folder / "model_final.pth"))
        return model.eval()

    def adapter(self, student: nn.Module) -> DetectorAdapter:
        return build_adapter(student, "student", self.cfg)

    def curve(self) -> Tuple[List[int], List[float]]:
        return read_curve(self.cfg)


def load_checkpoint(distiller: GDetKD, path: Path) -> None:
    """Load the student and the losses from a checkpoint of a distillation.

    Raises:
        GDetKDError: the file holds no distillation, or it belongs to another teacher, student, or to other losses.
    """
    content = read_weights(str(path))
    if "distill" not in content:
        raise GDetKDError(
            f"{str(path)!r} holds a student alone, without the state of the distillation losses. Use a checkpoint of a "
            "distillation."
        )
    then, now = content["distill"]["teacher"], distiller.teacher.describe()
    if then["sha256"] != now["sha256"]:
        raise GDetKDError(
            f"{str(path)!r} was distilled from another teacher than DISTILL.TEACHER.WEIGHTS in the run's config.yaml: "
            f"from {then['weights']!r} with SHA-256 {then['sha256'][:12]}, and {now['weights']!r} has "
            f"{now['sha256'][:12]}. Put that teacher back, or correct the config."
        )
    try:
        distiller.student.load_state_dict(content["model"])
        distiller.losses.load_state_dict(content["distill"]["losses"])
    except RuntimeError as e:
        raise GDetKDError(f"{str(path)!r} does not belong to this config: {e}") from e


def read_curve(cfg: CfgNode) -> Tuple[List[int], List[float]]:
    """Return the iterations and AP (percent) of a run's evaluations so far.

    Args:
        cfg: the run's config.
    """
    points = MetricsFile(Path(cfg.OUTPUT_DIR), cfg.SOLVER.MAX_ITER, score_prefix(cfg)).curve()
    return [point.iteration for point in points], [point.metrics["AP"] for point in points]


def read_terms(output_dir: str) -> Dict[str, Tuple[List[int], List[float]]]:
    """Return the iterations and weighted values of each loss in a run's metrics.json, in order.

    Iterations that were repeated after a resume count once.
    """
    curves: Dict[str, Dict[int, float]] = {}
    for line in MetricsFile(Path(output_dir)).lines():
        for name, value in line.items():
            if _is_loss(name):
                curves.setdefault(name, {})[line["iteration"]] = value
    return {name: (sorted(curve), [curve[iteration] for iteration in sorted(curve)]) for name, curve in curves.items()}


def _is_loss(name: str) -> bool:
    # Detectron2 requires "loss" in the name of a detector's loss. GDetKD also logs "raw/..." and "share/..." values.
    return "loss" in name and name != "total_loss" and "/" not in name


def read_teacher_ap(cfg: CfgNode) -> Any:
    """Return the teacher's AP (percent) if the run evaluated the teacher, else None.

    Args:
        cfg: the run's config.
    """
    name = f"teacher/{score_prefix(cfg)}bbox/AP"
    return next((line[name] for line in reversed(MetricsFile(Path(cfg.OUTPUT_DIR)).lines()) if name in line), None)
