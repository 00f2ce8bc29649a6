"""Keypoints in COCO files: their names, which of them are mirror images, and what annotations leave out."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

Item = Dict[str, Any]

# How names of keypoints on the left and on the right differ, in the order in which they are tried.
SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
INITIALS = (("l", "r"), ("L", "R"))
SEPARATORS = ("_", "-", ".", " ")


def keypoint_names(categories: Sequence[Item]) -> Optional[List[str]]:
    """Return the names that all categories with keypoints have in common, in order, or None.

    Args:
        categories: of a COCO file, each with a list of names under `keypoints` if its objects have some.
    """
    lists = [each["keypoints"] for each in categories if isinstance(each.get("keypoints"), list) and each["keypoints"]]
    is_usable = (
        bool(lists) and all(names == lists[0] for names in lists) and len(set(map(str, lists[0]))) == len(lists[0])
    )
    return list(map(str, lists[0])) if is_usable else None


def flip_map(names: Sequence[str]) -> List[Tuple[str, str]]:
    """Return the pairs of keypoints that change places when an image is flipped horizontally.

    Names tell: "left_eye" and "right_eye", "l_eye" and "r_eye", "eye_L" and "eye_R". A keypoint without a counterpart
    stays what it is.

    >>> flip_map(["nose", "left_eye", "right_eye"])
    [('left_eye', 'right_eye')]
    """
    known = set(names)
    pairs = []
    for name in names:
        others = [other for other in _mirrored(name) if other in known and other != name]
        if others:
            pairs.append((name, others[0]))
    return pairs


def _mirrored(name: str) -> List[str]:
    """Return what the counterpart on the right of a keypoint on the left can be called."""
    found = [name.replace(left, right, 1) for left, right in SIDES if left in name]
    for left, right in INITIALS:
        for separator in SEPARATORS:
            if name.startswith(left + separator):
                found.append(right + name[1:])
            if name.endswith(separator + left):
                found.append(name[:-1] + right)
    return found


def fill_keypoints(annotations: Sequence[Item]) -> int:
    """Give annotations without keypoints as many unlabelled ones as the others have. Return how many.

    pycocotools reads the keypoints of every annotation.
    """
    lengths = {len(each["keypoints"]) for each in annotations if isinstance(each.get("keypoints"), list)} - {0}
    if len(lengths) != 1:
        return 0
    lacking = [each for each in annotations if not each.get("keypoints")]
    for annotation in lacking:
        annotation.update(keypoints=[0] * max(lengths), num_keypoints=0)
    return len(lacking)


def count_keypoints(annotation: Item) -> bool:
    """Add num_keypoints to an annotation with keypoints that lacks it. Return whether that was so."""
    keypoints = annotation.get("keypoints")
    if not isinstance(keypoints, list) or isinstance(annotation.get("num_keypoints"), int):
        return False
    if not all(isinstance(value, (int, float)) for value in keypoints):
        return False
    annotation["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
    return True
