"""torchvision's detectors behind the interface of Detectron2's. They can teach.

torchvision's label 0 is the background, and some labels of its COCO models have no class ("N/A"). Both are left out.
The classes here are the other labels, in order.

Shapes: N detections or regions, K labels of the torchvision model, n classes.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.models.detection.image_list import ImageList as TorchvisionImages
from torchvision.models.detection.roi_heads import paste_masks_in_image

# Labels of torchvision that are no classes.
NO_CLASS = ("__background__", "N/A")
# Score from which on a pixel belongs to a mask, as in torchvision's examples and in Detectron2.
MASK_THRESHOLD = 0.5


class TorchvisionDetector(nn.Module):
    """Run a torchvision detector on Detectron2's inputs. The names of its parameters stay torchvision's.

    Images are not resized here, but by the loader, as for Detectron2's detectors.

    Args:
        model: a Faster R-CNN, Mask R-CNN, RetinaNet or FCOS of torchvision. It belongs to this module from now on.
        num_labels: K, the model's `num_classes`.
        categories: names of the K labels, label 0 first. None: the names are unknown, and label 0 is the background.

    Attributes:
        torchvision_model: the given model, which shares all parameters.
        num_labels: K.
        classes: (n,) the label of each class.
        no_classes: (K - n,) the labels that are no classes.
        pixel_mean, pixel_std: (3, 1, 1) for RGB values from 0 to 255.
    """

    def __init__(self, model: nn.Module, num_labels: int, categories: Optional[Sequence[str]] = None) -> None:
        super().__init__()
        transform = model.transform
        self._divisor = transform.size_divisible
        model.transform = _Batch(self._divisor)
        for name, child in model.named_children():
            self.add_module(name, child)
        # It is no submodule, because its children are submodules under the names that they have in torchvision's files.
        object.__setattr__(self, "torchvision_model", model)
        kept = [label for label in range(1, num_labels) if categories is None or categories[label] not in NO_CLASS]
        rest = [label for label in range(num_labels) if label not in kept]
        self.num_labels = num_labels
        self.register_buffer("classes", torch.tensor(kept), persistent=False)
        self.register_buffer("no_classes", torch.tensor(rest), persistent=False)
        for name, values in (("pixel_mean", transform.image_mean), ("pixel_std", transform.image_std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def train(self, mode: bool = True) -> "TorchvisionDetector":
        self.torchvision_model.training = mode
        return super().train(mode)

    def preprocess_image(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Normalise and pad RGB images (3, H, W) of values from 0 to 255."""
        return ImageList.from_tensors([self._normalized(inputs) for inputs in batched_inputs], self._divisor)

    def _normalized(self, inputs: Dict[str, Any]) -> torch.Tensor:
        return (inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Instances]]:
        """Return the detections in Detectron2's format, in pixels of the inputs' "height" and "width"."""
        images = [self._normalized(inputs) for inputs in batched_inputs]
        outputs = []
        for found, inputs, image in zip(self.torchvision_model(images), batched_inputs, images):
            size = tuple(image.shape[-2:])
            output_size = inputs.get("height", size[0]), inputs.get("width", size[1])
            outputs.append({"instances": self._instances(found, size, output_size)})
        return outputs

    def _instances(self, found: Dict[str, torch.Tensor], size: Tuple[int, int], output_size: Tuple[int, int]) -> Any:
        class_of = self.classes.new_full((self.num_labels,), -1)
        class_of[self.classes] = torch.arange(self.num_classes, device=self.device)
        instances = Instances(size, pred_boxes=Boxes(found["boxes"]), scores=found["scores"])
        instances.pred_classes = class_of[found["labels"]]
        if "masks" in found:
            instances.probabilities = found["masks"]
        instances = detector_postprocess(instances[instances.pred_classes >= 0], *output_size)
        if instances.has("probabilities"):
            masks = paste_masks_in_image(instances.probabilities, instances.pred_boxes.tensor, output_size)
            instances.pred_masks = masks[:, 0] > MASK_THRESHOLD
            instances.remove("probabilities")
        return instances

    def class_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return softmax logits (N, n + 1) with background last, from logits (N, K). They merge the other labels."""
        return torch.cat([logits[:, self.classes], logits[:, self.no_classes].logsumexp(dim=1, keepdim=True)], dim=1)

    def class_deltas(self, deltas: torch.Tensor) -> torch.Tensor:
        """Return box deltas (N, 4 n) from deltas (N, 4 K)."""
        return deltas.unflatten(1, (-1, 4))[:, self.classes].flatten(1)


class _Batch(nn.Module):
    """Stand in for torchvision's transform: images are normalised already, and are padded alone."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self._divisor = divisor

    def forward(self, images: List[torch.Tensor], targets: Any = None) -> Tuple[TorchvisionImages, Any]:
        padded = ImageList.from_tensors(images, self._divisor)
        return TorchvisionImages(padded.tensor, padded.image_sizes), targets

    def postprocess(self, detections: Any, image_sizes: Any, original_sizes: Any) -> Any:
        return detections


def classes_among(categories: Sequence[str]) -> Tuple[str, ...]:
    """Return the labels that are classes, in order."""
    return tuple(name for name in categories if name not in NO_CLASS)
