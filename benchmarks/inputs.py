"""Random images and objects. The time of a step does not depend on what they show."""

from typing import Any, Dict, List

import torch
from detectron2.structures import Boxes, Instances

OBJECTS = 8  # in each image


def make_batch(images: int, height: int, width: int) -> List[Dict[str, Any]]:
    """Return a training batch in Detectron2's format. All images have the same size in pixels."""

    rng = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corners = torch.rand(OBJECTS, 2, generator=rng) * torch.tensor([width, height]) * 0.7
        sides = (0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=rng)) * torch.tensor([width, height])
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corners, corners + sides], dim=1)))
        instances.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
        # A loader gives bytes. Wider numbers would take longer to copy to a GPU.
        image = torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch
