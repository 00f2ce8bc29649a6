"""What the rest of the package knows of a detector: this interface, and nothing else."""

from abc import ABC, abstractmethod
from typing import Any, Collection, Dict, List, Optional, Sequence, Type

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import GDetKDError
from ..recorder import Call
from ..structures import DetectorOutputs, DetectorSpec, Regions

DETECTOR_ADAPTER_REGISTRY = Registry("DETECTOR_ADAPTER")
DETECTOR_ADAPTER_REGISTRY.__doc__ = """
Adapters, one for each detector family; the first whose `matches(model)` holds is taken.
Register a subclass of `DetectorAdapter` to add a family.
"""

# The fields of `DetectorOutputs` that are about regions; a loss that needs none of them reads pyramids alone.
REGION_FIELDS = frozenset({"pooled", "levels", "embeddings", "logits", "deltas"})


class DetectorAdapter(ABC):
    """Shows a detector's pyramid, regions, embeddings and predictions.

    Args:
        model: a plain Detectron2 detector.
        role: "teacher" or "student", for error messages.
        cfg: the config of the distillation.

    Attributes:
        backbone: what `look` runs on images: the model's, or a faster copy of it; None where it has none of that name.
        needs: names of the `DetectorOutputs` that losses read. What is not among them `observe` need not fill.
        stages_compared: how many stages of a student's cascade CLS and REG compare; 1 for every other student.

    Raises:
        GDetKDError: the detector lacks something that distillation needs.
    """

    def __init__(self, model: nn.Module, role: str, cfg: CfgNode) -> None:
        self.model = model
        self.role = role
        self.cfg = cfg
        self.backbone: Optional[nn.Module] = getattr(model, "backbone", None)
        self.needs: Collection[str] = REGION_FIELDS
        self.stages_compared = 1

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter is for such a detector."""

    @property
    @abstractmethod
    def spec(self) -> DetectorSpec:
        """Widths, levels and classes."""

    @abstractmethod
    def points(self) -> Dict[str, nn.Module]:
        """The modules whose calls `observe` reads."""

    @abstractmethod
    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        """Reads a recorded training step of a student: its regions and what it computed for them.

        Args:
            calls: of each point, in order.
            batched_inputs: the step's images and ground truth, in Detectron2's format.
        """

    @abstractmethod
    def look(
        self,
        images: torch.Tensor,
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        """Computes what a teacher has to say on given regions.

        Args:
            images: (B, 3, H, W), normalised and padded as this detector wants them.
            regions: boxes in pixels of those images; None where `needs` names nothing of regions.
            needs: names of the `DetectorOutputs` to fill beside the pyramid: "pooled", "levels", "embeddings",
                "logits", "deltas", "head".
            later_regions: of a cascade of a student, the boxes of its stages after the first. Where the teacher is a
                cascade too, its predictions for them fill `later_stages`.
        """


def find_adapter(model: nn.Module) -> Optional[Type[DetectorAdapter]]:
    """The registered adapter class for a detector, or None."""
    return next((adapter for _, adapter in DETECTOR_ADAPTER_REGISTRY if adapter.matches(model)), None)


def build_adapter(model: nn.Module, role: str, cfg: CfgNode) -> DetectorAdapter:
    """The adapter for a detector.

    Raises:
        GDetKDError: no registered adapter matches, or the one that does finds something missing.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        return adapter(model, role, cfg)
    families = ", ".join(name for name, _ in DETECTOR_ADAPTER_REGISTRY)
    raise GDetKDError(
        f"The {role} is a {type(model).__name__}, for which there is no adapter (there is: {families}). "
        "Register one in gdetkd.detectors.DETECTOR_ADAPTER_REGISTRY."
    )
