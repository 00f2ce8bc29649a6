"""The interface of a detector family. The rest of the package sees a detector only through it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Collection, ContextManager, Dict, List, Optional, Sequence, Type

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import GDetKDError
from ..recorder import Call
from ..structures import DetectorOutputs, DetectorSpec, Regions

DETECTOR_ADAPTER_REGISTRY = Registry("DETECTOR_ADAPTER")
DETECTOR_ADAPTER_REGISTRY.__doc__ = """
Adapters, one for each detector family. Register a subclass of `DetectorAdapter` to add a family. The adapter that was
registered last is asked first (`matches(model)`), so a subclass of a known detector can have an adapter of its own.
"""

# Fields of `DetectorOutputs` about regions. A loss that needs none of them reads pyramids alone.
REGION_FIELDS = frozenset({"regions", "pooled", "levels", "embeddings", "logits", "deltas"})


class DetectorAdapter(ABC):
    """Read a detector's pyramid, regions, embeddings and predictions.

    A student runs its own training step, and `observe` reads the recorded calls. A teacher runs in `extract` and
    `look`, on the student's regions.

    Args:
        model: a plain Detectron2 detector.
        role: "teacher" or "student", for error messages.
        cfg: the config of the distillation.

    Attributes:
        backbone: backbone that `extract` runs on images, the model's or a faster copy. None if the model has no
            attribute of that name.
        needs: fields of `DetectorOutputs` that losses read. `observe` may leave the other fields empty.
        stages_compared: number of stages that CLS and REG compare; more than 1 only between two cascades.

    Raises:
        GDetKDError: the detector lacks something that distillation needs.
    """

    # Whether each loss of the detector is a mean over the images of a batch, see `Mixture`.
    losses_are_means: ClassVar[bool] = True

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
        """Return whether this adapter is for the detector."""

    @property
    @abstractmethod
    def spec(self) -> DetectorSpec:
        """Return the detector's widths, levels and classes."""

    @abstractmethod
    def points(self) -> Dict[str, nn.Module]:
        """Return the modules whose calls `observe` reads, by name."""

    @abstractmethod
    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        """Read a student's recorded training step: its regions, and the features and predictions for them.

        Args:
            calls: by point, the recorded calls in order.
            batched_inputs: images and ground truth of the step, in Detectron2's format.
        """

    def ignoring(self, doubtful: Sequence[Boxes]) -> ContextManager[None]:
        """Let the student's own losses ignore the places of doubtful boxes, inside a `with` block (`doubt`).

        Args:
            doubtful: the doubtful boxes of each image of the next step, xyxy in pixels.

        Raises:
            GDetKDError: this family does not support it.
        """
        raise GDetKDError(
            f"DATASETS.UNLABELED needs a student that can ignore doubtful boxes, and {type(self).__name__} does not "
            "support that. Write its method `ignoring`, or empty DATASETS.UNLABELED."
        )

    def extract(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return a teacher's feature maps by name. `look` gets them, and needs no images.

        Args:
            images: (B, 3, H, W), normalised and padded for this detector.
        """
        return self.backbone(images)

    @abstractmethod
    def look(
        self,
        features: Dict[str, torch.Tensor],
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        """Compute a teacher's features and predictions for given regions.

        Args:
            features: what `extract` returned.
            regions: boxes in pixels of the images. None if `needs` has no field about regions.
            needs: fields of `DetectorOutputs` to fill beside the pyramid: "pooled", "levels", "embeddings", "logits",
                "deltas", "head".
            later_regions: boxes of a student cascade's stages after the first. A teacher that is a cascade fills
                `later_stages` with its predictions for them.
        """


def find_adapter(model: nn.Module) -> Optional[Type[DetectorAdapter]]:
    """Return the adapter class that matches a detector, or None. The class that was registered last is asked first."""
    adapters = [adapter for _, adapter in DETECTOR_ADAPTER_REGISTRY]
    return next((adapter for adapter in reversed(adapters) if adapter.matches(model)), None)


def build_adapter(model: nn.Module, role: str, cfg: CfgNode) -> DetectorAdapter:
    """Build the adapter for a detector.

    Raises:
        GDetKDError: no registered adapter matches, or the detector lacks something that distillation needs.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        return adapter(model, role, cfg)
    families = ", ".join(name for name, _ in DETECTOR_ADAPTER_REGISTRY)
    raise GDetKDError(
        f"The {role} is a {type(model).__name__}, but no adapter matches it. The registered adapters are {families}. "
        "Detectors of rotated boxes have none. Register an adapter in gdetkd.detectors.DETECTOR_ADAPTER_REGISTRY "
        "(docs/detector-families.md)."
    )
