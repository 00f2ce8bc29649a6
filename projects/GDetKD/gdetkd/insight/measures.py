"""Compute the numbers that the charts draw. All functions are pure.

Shapes: N objects, L levels of the student, M levels of the teacher, C classes, D the width of an embedding.
"""

from typing import Any, Dict, List, Optional

import torch

# COCO's object sizes, by area in pixels of the image on disk.
SIZES = {
    "all": (0.0, float("inf")),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}


def level_matching(
    alpha: torch.Tensor, levels: torch.Tensor, areas: torch.Tensor, teacher_levels: int
) -> Dict[str, Dict[str, List[Any]]]:
    """Average how SGFI spreads the objects of each teacher level over the student's levels.

    Args:
        alpha: (N, L); each row sums to 1.
        levels: (N,) index of the level that the teacher's box-size rule assigns.
        areas: (N,) in pixels.
        teacher_levels: M.

    Returns:
        by name in `SIZES`: "alpha", M means of L values (None if the level has no object), and "objects", M counts.
    """
    matching = {}
    for size, (least, end) in SIZES.items():
        has_size = (areas >= least) & (areas < end)
        selections = [has_size & (levels == level) for level in range(teacher_levels)]
        matching[size] = {
            "alpha": [alpha[chosen].mean(dim=0).tolist() if chosen.any() else None for chosen in selections],
            "objects": [int(chosen.sum()) for chosen in selections],
        }
    return matching


def class_correlation(embeddings: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return Pearson's correlation between the mean embeddings of classes.

    Args:
        embeddings: (N, D)
        classes: (N,)
        num_classes: C.

    Returns:
        (C, C), 1 on the diagonal. NaN if a class has no object or a constant mean embedding.
    """
    means = torch.stack([embeddings[classes == index].double().mean(dim=0) for index in range(num_classes)])
    return torch.corrcoef(means).reshape(num_classes, num_classes)  # of one class it would be a number


def correlation_gap(first: torch.Tensor, second: torch.Tensor) -> Optional[float]:
    """Return the mean absolute difference of two `class_correlation`s, or None if they share no known pair.

    Only pairs of different classes count.
    """
    pairs = ~torch.eye(len(first), dtype=torch.bool)
    difference = (first - second).abs()[pairs]
    difference = difference[~difference.isnan()]
    return float(difference.mean()) if len(difference) else None
