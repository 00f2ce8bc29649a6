"""Pure functions from what detectors say of objects to the figures that are drawn.

Shapes: N objects, L levels of the student, M levels of the teacher, C classes, D the width of an embedding.
"""

from typing import Any, Dict, List, Optional

import torch

# COCO's, in pixels of area of the image as it is on disk; the first takes all.
SIZES = {
    "all": (0.0, float("inf")),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}


def level_matching(
    alpha: torch.Tensor, levels: torch.Tensor, areas: torch.Tensor, teacher_levels: int
) -> Dict[str, Dict[str, List[Any]]]:
    """How SGFI spreads the objects of each teacher level over the student's.

    Args:
        alpha: (N, L), each row summing to 1.
        levels: (N,) index of the level that the teacher's box-size rule assigns.
        areas: (N,) in pixels.
        teacher_levels: M.

    Returns:
        for each of `SIZES`: "alpha", M means of L values, None of a level that has no object; "objects", M counts.
    """
    found = {}
    for size, (least, end) in SIZES.items():
        of_size = (areas >= least) & (areas < end)
        chosen = [of_size & (levels == level) for level in range(teacher_levels)]
        found[size] = {
            "alpha": [alpha[each].mean(dim=0).tolist() if each.any() else None for each in chosen],
            "objects": [int(each.sum()) for each in chosen],
        }
    return found


def class_correlation(embeddings: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pearson's correlation between the mean embeddings of classes.

    Args:
        embeddings: (N, D)
        classes: (N,)
        num_classes: C.

    Returns:
        (C, C), 1 on the diagonal; NaN of a class that has no object, or whose mean embedding is constant.
    """
    means = torch.stack([embeddings[classes == each].double().mean(dim=0) for each in range(num_classes)])
    centred = means - means.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return ((centred / lengths) @ (centred / lengths).t()).clamp(-1, 1)


def correlation_gap(one: torch.Tensor, other: torch.Tensor) -> Optional[float]:
    """Mean absolute difference of two `class_correlation`s over pairs of different classes; None where no pair is
    known on both sides."""
    pairs = ~torch.eye(len(one), dtype=torch.bool)
    difference = (one - other).abs()[pairs]
    difference = difference[~difference.isnan()]
    return float(difference.mean()) if len(difference) else None
