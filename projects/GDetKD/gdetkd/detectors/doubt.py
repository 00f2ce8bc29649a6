"""Let a student's own losses ignore the places of doubtful boxes, of which nobody knows whether they are objects.

The rule is the same for all families: a place is ignored if it is background by the labels, and would not be background
if the doubtful boxes were objects, too. A place is an anchor, a proposal or a location of a dense head.
"""

from typing import Any, Callable, List, Sequence

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

# Maps IoUs (objects, places) to the objects' indices and to labels (places,): 0 for background. Detectron2's `Matcher`.
Matching = Callable[[torch.Tensor], Any]


def would_match(matcher: Matching, doubtful: Boxes, places: Boxes) -> torch.Tensor:
    """Return (places,) booleans that say which places are not background if the doubtful boxes are objects."""
    if len(doubtful) == 0:
        return torch.zeros(len(places), dtype=torch.bool, device=places.device)
    return matcher(pairwise_iou(doubtful, places))[1] != 0


def without_doubtful(
    matcher: Matching, proposals: Sequence[Instances], targets: Sequence[Instances], doubtful: Sequence[Boxes]
) -> List[Instances]:
    """Leave out the proposals of each image that are background by the targets and would match a doubtful box.

    Args:
        proposals: with `proposal_boxes`, xyxy in pixels.
        targets: the objects, with `gt_boxes`.
        doubtful: the doubtful boxes of each image.
    """
    kept = []
    for proposal, target, boxes in zip(proposals, targets, doubtful):
        if len(boxes):
            places = proposal.proposal_boxes
            is_background = ~would_match(matcher, target.gt_boxes, places)
            proposal = proposal[~(is_background & would_match(matcher, boxes, places))]
        kept.append(proposal)
    return kept


def mark_ignored(labels: Sequence[torch.Tensor], background: int, matches: Sequence[torch.Tensor]) -> None:
    """Set the label to -1, in place, where it is background and a doubtful box would match.

    Args:
        labels: by image, (places,) class labels.
        background: the label of background.
        matches: by image, (places,) what `would_match` returned.
    """
    for image_labels, is_match in zip(labels, matches):
        image_labels.masked_fill_((image_labels == background) & is_match, -1)
