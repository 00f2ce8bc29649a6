"""Train on images with and without labels in one step.

The student's backbone runs once on all images, so that a BatchNorm sees the whole batch. The heads run on the labelled
and on the unlabelled images in turn, because their losses have different weights and labels.
"""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence

import torch
from torch import nn

from .device import on_device
from .recorder import replaced
from .structures import DetectorOutputs, Predictions, Regions

Part = List[Dict[str, Any]]
NAMES = ("labeled", "unlabeled")


@contextmanager
def shared_pyramid(student: nn.Module, parts: Sequence[Part]) -> Iterator[Dict[str, torch.Tensor]]:
    """Run the student's backbone once on all parts. Inside the `with` block, its next calls return the parts' shares.

    Args:
        student: a detector with Detectron2's `preprocess_image` and `backbone`. In the block it has to run on each part
            once, in order.

    Returns:
        the feature maps (images of all parts, C, H, W) by name.
    """
    backbone = student.backbone
    images = student.preprocess_image([sample for part in parts for sample in part])
    pyramid = backbone(images.tensor)
    sizes = [len(part) for part in parts]
    shares = zip(*(level.split(sizes) for level in pyramid.values()))
    with replaced(backbone, "forward", lambda original: lambda images: dict(zip(pyramid, next(shares)))):
        yield pyramid


class Mixture:
    """Join the student's losses on labelled and unlabelled images.

    Args:
        weight: DISTILL.UNLABELED.WEIGHT.
        mean_over_images: whether each loss of the student is a mean over its images. If not, it is a sum over
            positives, divided by a running mean of their number, which both parts update in turn.
    """

    def __init__(self, weight: float, mean_over_images: bool = True) -> None:
        self._weight = weight
        self._mean_over_images = mean_over_images
        self._scalars: Dict[str, torch.Tensor] = {}

    def join(self, parts: Sequence[Part], losses: Sequence[Dict[str, torch.Tensor]]) -> Dict[str, torch.Tensor]:
        """Return the losses of the whole batch. Those of unlabelled images are multiplied by `weight`.

        Args:
            parts: the labelled and the unlabelled images.
            losses: the student's losses on each part.
        """
        sizes = [len(part) if self._mean_over_images else 1 for part in parts]
        shares = [size / sum(sizes) * factor for size, factor in zip(sizes, (1.0, self._weight))]
        self._scalars = {
            f"{part}/{name}": loss.detach().sum()
            for part, of_part in zip(NAMES, losses)
            for name, loss in of_part.items()
        }
        boxes = sum(len(sample["instances"]) for sample in parts[-1])
        first = next(iter(self._scalars.values()))
        self._scalars["unlabeled/boxes"] = on_device(boxes / len(parts[-1]), like=first)
        return {name: sum(share * of_part[name] for share, of_part in zip(shares, losses)) for name in losses[0]}

    def take_scalars(self) -> Dict[str, torch.Tensor]:
        """Return the step's values to log, and forget them: each loss on each part, and pseudo boxes in an image."""
        scalars, self._scalars = self._scalars, {}
        return scalars


def joined(parts: Sequence[DetectorOutputs], pyramid: Dict[str, torch.Tensor]) -> DetectorOutputs:
    """Join a student's outputs on parts of a batch.

    Args:
        pyramid: by name, the feature maps (images, C, H, W) of the whole batch. Further maps may be among them.
    """
    first = parts[0]
    later_stages = [
        Predictions(
            _joined_regions([stage.regions for stage in stages]),
            *(torch.cat([getattr(stage, name) for stage in stages]) for name in ("logits", "deltas")),
        )
        for stages in zip(*(part.later_stages for part in parts))
    ]
    tensors = {name: [getattr(part, name) for part in parts] for name in ("pooled", "embeddings", "logits", "deltas")}
    return DetectorOutputs(
        pyramid={name: pyramid[name] for name in first.pyramid},
        strides=first.strides,
        regions=None if first.regions is None else _joined_regions([part.regions for part in parts]),
        **{name: None if values[0] is None else torch.cat(values) for name, values in tensors.items()},
        later_stages=later_stages,
        gt_boxes=[boxes for part in parts for boxes in part.gt_boxes],
        towers=None if first.towers is None else _joined_towers([part.towers for part in parts]),
    )


def _joined_regions(parts: Sequence[Regions]) -> Regions:
    boxes = [boxes for part in parts for boxes in part.boxes]
    return Regions(boxes, None if parts[0].sources is None else torch.cat([part.sources for part in parts]))


def _joined_towers(parts: Sequence[Any]) -> Any:
    """Join the innermost tensors of nested lists and tuples along their first dimension."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    return type(parts[0])([_joined_towers(inner) for inner in zip(*parts)])
