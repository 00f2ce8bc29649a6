"""Generate a small detection dataset in COCO's format for quick starts.

An image shows textured shapes of six classes, partly hidden, in front of clutter that resembles them. The sizes use all
pyramid levels of a small detector. Colour is a hint at the class, but not a certain one.
"""

import colorsys
import json
import os
from typing import Any, Collection, Dict, List, Mapping, Tuple

import numpy as np
import pycocotools.mask
from detectron2.config import CfgNode
from tqdm import tqdm

from ..errors import GDetKDError
from ..files import written_whole
from .folders import resolve

CLASSES = ("triangle", "square", "circle", "star", "ring", "cross")
FOLDER = "gdetkd_shapes"  # in Detectron2's data folder
IMAGE_SIZE = 128  # pixels
OBJECT_SIZES = (18, 76)  # pixels, drawn log-uniformly
OBJECTS = (2, 5)  # fewest and most in an image
HUE_TELLS_CLASS = 0.7  # share of objects with the hue of their class
MIN_VISIBLE = 0.5  # least visible share of an object; an object that would hide more is not drawn
# Maps a split to its number of images and the seed of its first image. Splits share no image.
SPLITS = {
    "teacher": (1000, 1_000_000),
    "student": (80, 2_000_000),
    "val": (200, 3_000_000),
    "test": (200, 4_000_000),
}


def make_shapes(folder: str, splits: Collection[str] = tuple(SPLITS)) -> None:
    """Write `<split>.json` and `<split>/*.png` of the splits, unless they are complete already.

    Args:
        folder: created if it does not exist.
        splits: names in SPLITS.

    Raises:
        GDetKDError: OpenCV is not installed.
    """
    for split in splits:
        count, seed = SPLITS[split]
        annotations = os.path.join(folder, f"{split}.json")
        if os.path.exists(annotations):
            continue
        os.makedirs(os.path.join(folder, split), exist_ok=True)
        images = [
            _write(os.path.join(folder, split, f"{index:05d}.png"), seed + index)
            for index in tqdm(range(count), desc=f"drawing {split}", unit="image")
        ]
        with written_whole(annotations) as file:  # last, so a split with a JSON is complete
            json.dump(_coco(images, split), file)


def make_shapes_for(cfg: CfgNode) -> None:
    """Generate the dataset if a config registers it."""
    entries = [entry for entry in cfg.DATASETS.REGISTER if isinstance(entry, Mapping)]
    if any(entry.get("kind") == "coco" and entry.get("json") == f"{FOLDER}/val.json" for entry in entries):
        make_shapes(resolve(FOLDER))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as e:
        raise GDetKDError("The generated dataset needs OpenCV: python -m pip install opencv-python-headless") from e
    return cv2


def _write(path: str, seed: int) -> List[Dict[str, Any]]:
    image, objects = draw_image(seed)
    if not _opencv().imwrite(path, image):
        raise GDetKDError(f"{path!r} cannot be written. Check the folder's permissions and the space on the disk.")
    return objects


def _coco(images: List[List[Dict[str, Any]]], split: str) -> Dict[str, Any]:
    annotations = [
        {**item, "id": number + 1, "image_id": image + 1, "iscrowd": 0}
        for number, (image, item) in enumerate((i, item) for i, objects in enumerate(images) for item in objects)
    ]
    return {
        "info": {"description": f"GDetKD's generated shapes, {split}"},
        "images": [
            {"id": i + 1, "file_name": f"{i:05d}.png", "width": IMAGE_SIZE, "height": IMAGE_SIZE}
            for i in range(len(images))
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }


def draw_image(seed: int) -> Tuple[np.ndarray, List[Dict[str, Any]]]:
    """Draw the image of a seed.

    Returns:
        the image (IMAGE_SIZE, IMAGE_SIZE, 3), uint8 BGR, and its objects with COCO's `bbox` (xywh in pixels), `area`
        (visible pixels), `category_id` and `segmentation` (run lengths of the visible pixels).
    """
    rng = np.random.default_rng(seed)
    image = _texture(rng, low=60, high=190, contrast=45)
    _clutter(rng, image)
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)  # the index of the object that a pixel shows
    drawn: List[Tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        label = int(rng.integers(len(CLASSES)))
        mask = _mask(rng, label)
        if not _leaves_visible(owner, mask, [m for _, m in drawn]):
            continue
        owner[mask] = len(drawn)
        drawn.append((label, mask))
        image[mask] = _paint(rng, label)[mask]
    _cover(rng, image, owner, [mask for _, mask in drawn])
    image = np.clip(image + rng.normal(0, 7, image.shape), 0, 255).astype(np.uint8)
    return image, [_annotation(label, mask, owner == i) for i, (label, mask) in enumerate(drawn)]


def _annotation(label: int, mask: np.ndarray, visible: np.ndarray) -> Dict[str, Any]:
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    box = [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y]
    runs = pycocotools.mask.encode(np.asfortranarray(visible.astype(np.uint8)))
    segmentation = {"size": runs["size"], "counts": runs["counts"].decode("ascii")}
    return {"bbox": box, "area": int(visible.sum()), "category_id": label + 1, "segmentation": segmentation}


def _leaves_visible(owner: np.ndarray, mask: np.ndarray, drawn: List[np.ndarray]) -> bool:
    return all(((owner == i) & ~mask).sum() >= MIN_VISIBLE * other.sum() for i, other in enumerate(drawn))


def _mask(rng: np.random.Generator, label: int) -> np.ndarray:
    """Return the mask (IMAGE_SIZE, IMAGE_SIZE) bool of a shape with random place, size and rotation."""
    cv2 = _opencv()
    radius = np.exp(rng.uniform(*np.log(OBJECT_SIZES))) / 2
    center = rng.uniform(0.6 * radius, IMAGE_SIZE - 0.6 * radius, 2)
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    name = CLASSES[label]
    if name in ("circle", "ring"):
        cv2.circle(canvas, tuple(int(c) for c in center), int(radius), 1, -1)
        if name == "ring":
            cv2.circle(canvas, tuple(int(c) for c in center), int(radius * rng.uniform(0.45, 0.65)), 0, -1)
    else:
        points = _outline(name, rng) * radius + center
        cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def _outline(name: str, rng: np.random.Generator) -> np.ndarray:
    """Return the corners (points, 2) of a randomly rotated polygon in the unit circle."""
    if name == "cross":
        arm = rng.uniform(0.25, 0.4)
        long = np.sqrt(1 - arm**2)
        quarter = np.array([[arm, arm], [long, arm], [long, -arm]])
        quarter_turn = np.array([[0, 1], [-1, 0]])
        points = np.concatenate([quarter @ np.linalg.matrix_power(quarter_turn, k).T for k in range(4)])
    else:
        count = {"triangle": 3, "square": 4, "star": 10}[name]
        radii = np.where(np.arange(count) % 2, rng.uniform(0.4, 0.55), 1.0) if name == "star" else np.ones(count)
        angles = np.arange(count) * 2 * np.pi / count
        points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    turn = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    return points @ np.array([[cos, -sin], [sin, cos]])


def _paint(rng: np.random.Generator, label: int) -> np.ndarray:
    """Return a striped or blotched surface (IMAGE_SIZE, IMAGE_SIZE, 3) in the hue of the class or a random hue."""
    has_class_hue = rng.random() < HUE_TELLS_CLASS
    hue = (label / len(CLASSES) + rng.normal(0, 0.03)) % 1 if has_class_hue else rng.random()
    color = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 0.9), rng.uniform(0.5, 1.0)))[::-1]
    if rng.random() < 0.5:
        ys, xs = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 14)
        wave = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * 2 * np.pi / period)
        shade = 1 + rng.uniform(0.05, 0.3) * wave
    else:
        shade = 1 + (_texture(rng, 0, 1, 1)[..., 0] - 0.5) * 0.4
    return np.clip(color * shade[..., None], 0, 255)


def _texture(rng: np.random.Generator, low: float, high: float, contrast: float) -> np.ndarray:
    """Return smooth coloured blotches (IMAGE_SIZE, IMAGE_SIZE, 3) around a random colour."""
    cells = int(rng.integers(4, 14))
    base = rng.uniform(low, high, 3)
    noise = rng.uniform(-0.5, 0.5, (cells, cells, 3)).astype(np.float32)
    blotches = _opencv().resize(noise, (IMAGE_SIZE, IMAGE_SIZE), interpolation=_opencv().INTER_CUBIC)
    return np.clip(base + contrast * blotches, min(low, 0), max(high, 1) + contrast)


def _clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw lines, arcs and corners, which resemble parts of objects."""
    cv2 = _opencv()
    for _ in range(rng.integers(4, 12)):
        color = tuple(float(c) for c in rng.uniform(20, 235, 3))
        x, y, size = (int(v) for v in (*rng.integers(0, IMAGE_SIZE, 2), rng.integers(5, 30)))
        start, thickness = float(rng.uniform(0, 360)), int(rng.integers(1, 4))
        if rng.random() < 0.4:
            cv2.ellipse(image, (x, y), (size, size), start, 0, float(rng.uniform(40, 150)), color, thickness)
        else:
            corners = (np.array([x, y]) + rng.integers(-size, size + 1, (rng.integers(2, 4), 2))).astype(np.int32)
            cv2.polylines(image, [corners], False, color, thickness)


def _cover(rng: np.random.Generator, image: np.ndarray, owner: np.ndarray, masks: List[np.ndarray]) -> None:
    """Draw bars over the objects, but leave enough of every object visible."""
    cv2 = _opencv()
    for _ in range(rng.integers(0, 4)):
        bar = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        start, end = (tuple(int(v) for v in rng.integers(0, IMAGE_SIZE, 2)) for _ in range(2))
        cv2.line(bar, start, end, 1, int(rng.integers(2, 8)))
        if _leaves_visible(owner, bar > 0, masks):
            owner[bar > 0] = -1
            image[bar > 0] = rng.uniform(20, 235, 3)
