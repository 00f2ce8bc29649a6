"""Bring data to the device without a wait.

A plain copy to a GPU from memory that is not pinned makes the CPU wait until the GPU has done all its work. With
`non_blocking`, the copy joins the queue of work.
"""

from typing import Any, Dict, List

import torch
from detectron2.structures import Boxes, Instances


def on_device(values: Any, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a number or nested sequences of numbers, with the dtype and the device of `like`."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def images_on_device(batched_inputs: List[Dict[str, Any]], device: torch.device) -> List[Dict[str, Any]]:
    """Return a training batch whose tensors, such as the images, lie on the device. The given batch does not change.

    Teacher and student then share one copy. The labels stay on the host, where Detectron2 draws them (VIS_PERIOD).
    """
    return [{name: _moved(value, device) for name, value in inputs.items()} for inputs in batched_inputs]


def objects_on_device(batched_inputs: List[Dict[str, Any]], device: torch.device) -> List[Dict[str, Any]]:
    """Return a training batch whose ground-truth boxes lie on the device. The given batch does not change."""
    moved = []
    for inputs in batched_inputs:
        instances = Instances(inputs["instances"].image_size, **inputs["instances"].get_fields())
        instances.gt_boxes = Boxes(_moved(instances.gt_boxes.tensor, device))
        moved.append({**inputs, "instances": instances})
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
