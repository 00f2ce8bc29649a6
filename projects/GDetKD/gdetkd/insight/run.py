"""The folder of a run that train_net.py has written, read again."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import score_prefix
from ..config_file import load_config
from ..detectors import DetectorAdapter, build_adapter
from ..distiller import GDetKD
from ..engine import build_plain_student
from ..engine.checkpoint import NUMBERED
from ..errors import GDetKDError
from ..metrics_file import MetricsFile
from ..safe_load import SafeCheckpointer, read_weights


class FinishedRun:
    """
    Args:
        folder: an OUTPUT_DIR.

    Attributes:
        cfg: the run's, on the CPU where there is no GPU here.

    Raises:
        GDetKDError: it holds no config or no model_final.pth.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        for name in ("config.yaml", "model_final.pth"):
            if not (self.folder / name).is_file():
                raise GDetKDError(f"{folder!r} is not the OUTPUT_DIR of a finished run: it has no {name}.")
        self.cfg: CfgNode = load_config(str(self.folder / "config.yaml"), ["OUTPUT_DIR", str(folder)])
        if not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
        # As many as they were: SOLVER.REFERENCE_WORLD_SIZE may have changed them after the config was written.
        trained = [line["iteration"] for line in MetricsFile(self.folder).lines() if "total_loss" in line]
        if trained:
            self.cfg.SOLVER.MAX_ITER = max(trained) + 1

    def checkpoints(self) -> List[Tuple[int, Path]]:
        """Iterations done and the file, of each that was kept; the last is model_final.pth."""
        numbered = [path for path in sorted(self.folder.glob("model_*.pth")) if NUMBERED.fullmatch(path.name)]
        kept = [(int(NUMBERED.fullmatch(path.name)[1]) + 1, path) for path in numbered]
        last = self.cfg.SOLVER.MAX_ITER
        return [*(each for each in kept if each[0] < last), (last, self.folder / "model_final.pth")]

    def student(self) -> nn.Module:
        """The plain detector, with its last weights."""
        model = build_plain_student(self.cfg)
        SafeCheckpointer(model).load(str(self.folder / "model_final.pth"))
        return model.eval()

    def adapter(self, student: nn.Module) -> DetectorAdapter:
        return build_adapter(student, "student", self.cfg)

    def curve(self) -> Tuple[List[int], List[float]]:
        return read_curve(self.cfg)


def load_checkpoint(distiller: GDetKD, path: Path) -> None:
    """The student and the losses as a distillation has saved them.

    Raises:
        GDetKDError: it is not a distillation's, or of another student or other losses.
    """
    content = read_weights(str(path))
    if "distill" not in content:
        raise GDetKDError(f"{str(path)!r} holds a student alone, not what distillation learned beside it.")
    try:
        distiller.student.load_state_dict(content["model"])
        distiller.losses.load_state_dict(content["distill"]["losses"])
    except RuntimeError as e:
        raise GDetKDError(f"{str(path)!r} does not belong to this config: {e}") from e


def read_curve(cfg: CfgNode) -> Tuple[List[int], List[float]]:
    """Iterations and AP (percent) of a run's evaluations so far, by its config."""
    points = MetricsFile(Path(cfg.OUTPUT_DIR), cfg.SOLVER.MAX_ITER, score_prefix(cfg)).curve()
    return [point.iteration for point in points], [point.metrics["AP"] for point in points]


def read_terms(output_dir: str) -> Dict[str, Tuple[List[int], List[float]]]:
    """Iterations and weighted value of each loss in a run's metrics.json."""
    found: Dict[str, Tuple[List[int], List[float]]] = {}
    for line in MetricsFile(Path(output_dir)).lines():
        for name, value in line.items():
            if _is_loss(name):
                iterations, values = found.setdefault(name, ([], []))
                iterations.append(line["iteration"])
                values.append(value)
    return found


def _is_loss(name: str) -> bool:
    # Detectron2 demands of its detectors that losses have "loss" in their name; "raw/" and "share/" are ours.
    return "loss" in name and name != "total_loss" and "/" not in name


def read_teacher_ap(cfg: CfgNode) -> Any:
    """The teacher's AP (percent) where the run of that config evaluated it, else None."""
    name = f"teacher/{score_prefix(cfg)}bbox/AP"
    return next((line[name] for line in MetricsFile(Path(cfg.OUTPUT_DIR)).lines() if name in line), None)
