"""RetinaNet's head."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

# Number of groups of Detectron2's GroupNorm.
GROUPS = 32


def retinanet_takes_group_norm() -> bool:
    """Return whether Detectron2 can build the head with MODEL.RETINANET.NORM "GN". Detectron2 v0.6 cannot."""
    shape = ShapeSpec(channels=GROUPS)
    try:
        with torch.random.fork_rng(devices=[]):  # the student's initial weights do not depend on this
            RetinaNetHead(input_shape=[shape], num_classes=1, num_anchors=1, conv_dims=[GROUPS], norm="GN")
    except ValueError:
        return False
    return True
