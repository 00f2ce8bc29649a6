"""Test the generated dataset of the quickstart."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from gdetkd.data import shapes

pytest.importorskip("cv2")


def test_images_depend_on_the_seed_alone():
    first, again, other = shapes.draw_image(5), shapes.draw_image(5), shapes.draw_image(6)
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert not (first[0] == other[0]).all()


def test_boxes_lie_in_the_image_and_contain_their_object():
    sizes, classes = [], set()
    for seed in range(40):
        image, objects = shapes.draw_image(seed)
        assert image.shape == (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3) and image.dtype == np.uint8
        for item in objects:
            x, y, w, h = item["bbox"]
            assert 0 <= x and 0 <= y and x + w <= shapes.IMAGE_SIZE and y + h <= shapes.IMAGE_SIZE
            assert 0 < item["area"] <= w * h
            sizes.append(max(w, h))
            classes.add(item["category_id"])
    assert classes == {1, 2, 3, 4, 5, 6}
    assert min(sizes) < 22 and max(sizes) > 65


def test_splits_are_complete_disjoint_and_not_drawn_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {name: (3, seed) for name, (_, seed) in shapes.SPLITS.items()})
    shapes.make_shapes(str(tmp_path))
    digests = [hashlib.sha256(Image.open(path).tobytes()).hexdigest() for path in tmp_path.glob("*/*.png")]
    assert len(digests) == len(set(digests)) == 12
    content = json.loads((tmp_path / "val.json").read_text())
    assert len(content["images"]) == 3 and {a["image_id"] for a in content["annotations"]} <= {1, 2, 3}
    assert [c["name"] for c in content["categories"]] == list(shapes.CLASSES)
    stamp = (tmp_path / "val" / "00000.png").stat().st_mtime_ns
    shapes.make_shapes(str(tmp_path))
    assert (tmp_path / "val" / "00000.png").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("entry", [{"name": "a"}, {"name": "a", "kind": "coco"}, "a", None])
def test_a_wrong_entry_of_a_config_is_left_to_the_check_of_entries(distill_cfg, entry):
    shapes.make_shapes_for(distill_cfg({"DATASETS.REGISTER": [entry]}))


def test_the_real_splits_share_no_seed():
    ranges = [range(seed, seed + count) for count, seed in shapes.SPLITS.values()]
    assert [len(r) for r in ranges] == [1000, 80, 200, 200]
    assert len(set().union(*ranges)) == 1480
