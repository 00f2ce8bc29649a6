#!/usr/bin/env python
"""Convert BDD100K's detection labels, as the authors distribute them, to COCO's format.

python tools/bdd100k_to_coco.py det_train.json datasets/bdd100k/det_train_coco.json

The tool reads the labels of 2020 (det_20/det_train.json) and of 2018 (bdd100k_labels_images_train.json), which has
different class names. It leaves out labels without a box (lanes, drivable areas) and labels of a class that is not one
of the ten.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from tqdm import tqdm

# The benchmark's order (bdd100k.com, detection 2020).
CLASSES = [
    "pedestrian",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
    "traffic light",
    "traffic sign",
]
NAMES_OF_2018 = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}
# Size of every image in pixels. The labels do not contain it.
WIDTH, HEIGHT = 1280, 720


def convert(frames: Iterable[Dict[str, Any]]) -> Tuple[Dict[str, Any], Counter]:
    """Return COCO's dictionary, and the number of labels left out, by reason."""
    images, annotations, left_out = [], [], Counter()
    for image_id, frame in enumerate(frames, start=1):
        images.append({"id": image_id, "file_name": frame["name"], "width": WIDTH, "height": HEIGHT})
        for label in frame.get("labels") or []:
            box, reason = _box(label)
            if box is None:
                left_out[reason] += 1
                continue
            category = CLASSES.index(NAMES_OF_2018.get(label["category"], label["category"])) + 1
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            annotations.append({**annotation, "bbox": box, "area": box[2] * box[3]})
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}, left_out


def _box(label: Dict[str, Any]) -> Tuple[Optional[List[float]], str]:
    """Return [x, y, width, height] in pixels, clipped to the image; or None and the reason to leave the label out."""
    corners, name = label.get("box2d"), label["category"]
    if not corners:
        return None, "without a box"
    if NAMES_OF_2018.get(name, name) not in CLASSES:
        return None, f"{name!r}, which the benchmark does not count"
    x1, x2 = (min(max(corners[key], 0), WIDTH) for key in ("x1", "x2"))
    y1, y2 = (min(max(corners[key], 0), HEIGHT) for key in ("y1", "y2"))
    if x2 <= x1 or y2 <= y1:
        return None, "whose box has no area inside the image"
    return [x1, y1, x2 - x1, y2 - y1], ""


def read_frames(path: Path) -> List[Dict[str, Any]]:
    """Return the frames of a labels file. Exit with a message if the file cannot be used."""
    try:
        frames = json.loads(path.read_text())
    except FileNotFoundError:
        sys.exit(f"{path} does not exist. Download the labels from the authors of BDD100K (bdd100k.com).")
    except json.JSONDecodeError as e:
        sys.exit(f"{path} is not complete JSON ({e}). Download it again.")
    if isinstance(frames, dict) and "frames" in frames:
        frames = frames["frames"]
    if not isinstance(frames, list) or not frames or "name" not in frames[0]:
        sys.exit(
            f"{path} is not a BDD100K file: it has to be a list of frames with a name and labels. Choose another file."
        )
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="BDD100K's JSON file")
    parser.add_argument("output", type=Path, help="the COCO file to write")
    args = parser.parse_args()
    coco, left_out = convert(tqdm(read_frames(args.labels), unit="image"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(coco))
    print(f"{args.output}: {len(coco['images'])} images, {len(coco['annotations'])} boxes")
    for reason, count in left_out.most_common():
        print(f"left out: {count} {reason}")


if __name__ == "__main__":
    main()
