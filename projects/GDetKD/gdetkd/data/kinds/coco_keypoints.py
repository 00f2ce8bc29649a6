"""Read the names of keypoints in COCO files, pair left and right, and fill in what annotations leave out."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

Item = Dict[str, Any]

# How the names of a left and a right keypoint differ, in the order of trial.
SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
INITIALS = (("l", "r"), ("L", "R"))
SEPARATORS = ("_", "-", ".", " ")


def keypoint_names(categories: Sequence[Item]) -> Optional[List[str]]:
    """Return the names of keypoints in order, or None if categories with keypoints do not have the same names."""
    lists = [item["keypoints"] for item in categories if isinstance(item.get("keypoints"), list) and item["keypoints"]]
    if not lists or any(names != lists[0] for names in lists):
        return None
    names = list(map(str, lists[0]))
    return names if len(set(names)) == len(names) else None


def flip_map(names: Sequence[str]) -> List[Tuple[str, str]]:
    """Return the pairs of keypoints that change places when an image is flipped horizontally.

    Pairs are found by name: "left_eye" and "right_eye", "l_eye" and "r_eye", "eye_L" and "eye_R". A keypoint without a
    partner keeps its name.

    >>> flip_map(["nose", "left_eye", "right_eye"])
    [('left_eye', 'right_eye')]
    """
    known = set(names)
    pairs = []
    for name in names:
        partners = [partner for partner in _possible_partners(name) if partner in known and partner != name]
        if partners:
            pairs.append((name, partners[0]))
    return pairs


def _possible_partners(name: str) -> List[str]:
    """Return the names that the right partner of a left keypoint can have."""
    partners = [name.replace(left, right, 1) for left, right in SIDES if left in name]
    for left, right in INITIALS:
        for separator in SEPARATORS:
            if name.startswith(left + separator):
                partners.append(right + name[1:])
            if name.endswith(separator + left):
                partners.append(name[:-1] + right)
    return partners


def fill_keypoints(annotations: Sequence[Item]) -> int:
    """Give unlabelled keypoints to annotations without keypoints, if other annotations have some.

    pycocotools reads the keypoints of every annotation.

    Returns:
        how many annotations were filled.
    """
    lengths = {len(item["keypoints"]) for item in annotations if isinstance(item.get("keypoints"), list)} - {0}
    if len(lengths) != 1:
        return 0
    lacking = [annotation for annotation in annotations if not annotation.get("keypoints")]
    for annotation in lacking:
        annotation.update(keypoints=[0] * max(lengths), num_keypoints=0)
    return len(lacking)


def count_keypoints(annotation: Item) -> bool:
    """Set num_keypoints of an annotation that has keypoints but lacks their number. Return whether it was set."""
    keypoints = annotation.get("keypoints")
    if not isinstance(keypoints, list) or isinstance(annotation.get("num_keypoints"), int):
        return False
    if not all(isinstance(value, (int, float)) for value in keypoints):
        return False
    annotation["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
    return True
