"""Thousands of mutated annotations and images load, or an error names them. Nothing hangs."""

import io
import json
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import make_cfg, write_coco
from gdetkd.data import build_train_loader, register_datasets
from gdetkd.data.clean import find_bad_images
from gdetkd.data.train_loader import BAD_IMAGES, PositionedDataset
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.errors import GDetKDError

HANG_SECONDS = 20
MORE = pytest.mark.soak
# Number of examples of each test: few in every test run, many in `make soak`.
EXAMPLES = pytest.mark.parametrize("examples", [100, pytest.param(4000, marks=MORE)])


def fuzz(examples, strategy, load):
    """Call `load` with random examples, the same in every run. Return how many it refused, and how many there were."""
    counts = {"refused": 0, "all": 0}

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(example):
        counts["all"] += 1
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(example)
            except GDetKDError as error:
                counts["refused"] += 1
                assert len(str(error)) > 20

    one()
    print(f"{counts['all']} examples, {counts['refused']} refused with an error that names them")
    assert counts["all"] >= examples * 0.9
    return counts


@contextmanager
def no_hang():
    def hang(*args):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**9, 10**30, 10**400, 1e308, -1e30, 2**31, 2**63, 0.5]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["../../../etc/passwd", "/etc/passwd", "a\0b", "", " ", "$(ls)", "http://x/y.png", 5000 * "a"]),
    st.lists(st.floats() | st.integers(), max_size=8),
    st.dictionaries(st.sampled_from(["id", "size", "counts"]), st.integers() | st.text(max_size=4), max_size=3),
)
# A mutation of a tree: the place (an index at each level), the action, and a value for it.
MUTATION = st.tuples(
    st.lists(st.integers(0, 50), min_size=1, max_size=5), st.sampled_from(["set", "delete", "double", "add"]), JUNK
)


def mutate(tree, mutation):
    where, action, junk = mutation
    for depth, index in enumerate(where):
        if not isinstance(tree, (dict, list)) or not tree:
            return
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = keys[index % len(keys)]
        if depth + 1 < len(where) and isinstance(tree[key], (dict, list)) and tree[key]:
            tree = tree[key]
            continue
        if action == "set":
            tree[key] = junk
        elif action == "delete":
            del tree[key]
        elif action == "double" and isinstance(tree, list):
            tree.append(tree[key])
        elif isinstance(tree, dict):
            tree[str(junk)[:8]] = junk
        return


# Mutations of bytes: the place (a share of the length), the action, and bytes for it.
BYTES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["cut", "flip", "insert", "zero", "repeat"]),
        st.binary(min_size=1, max_size=6),
    ),
    max_size=4,
)


def mutate_bytes(data, changes):
    for share, action, other in changes:
        place = int(share * len(data))
        after = place + len(other)
        if action == "cut":
            data = data[:place]
        elif action == "flip":
            data = data[:place] + bytes(a ^ b for a, b in zip(data[place:after], other)) + data[after:]
        elif action == "insert":
            data = data[:place] + other + data[place:]
        elif action == "zero":
            data = data[:place] + bytes(len(other)) + data[after:]
        else:
            data = data[:after] + data[place:after] + data[after:]
    return data


@contextmanager
def registered(entry):
    """Register a dataset inside, and return a config that trains on it."""
    cfg = make_cfg({"DATASETS.REGISTER": [{"name": "fuzzed", **entry}], "DATASETS.TRAIN": ("fuzzed",)})
    cfg.INPUT.MAX_BAD_FRACTION = 0.5
    try:
        register_datasets(cfg)
        yield cfg
    finally:
        if "fuzzed" in DatasetCatalog.list():
            DatasetCatalog.remove("fuzzed"), MetadataCatalog.remove("fuzzed")


def to_first_batch(entry):
    with registered(entry) as cfg:
        check_datasets(cfg)
        next(iter(build_train_loader(cfg)))


@EXAMPLES
def test_coco_json(tmp_path, examples):
    write_coco(tmp_path, 3, name="mine")
    path = tmp_path / "mine.json"
    sound = json.loads(path.read_text())
    masks = [[[5, 5, 20, 5, 20, 20]], {"size": [64, 80], "counts": [0, 64 * 80]}, {"size": [64, 64], "counts": "0PP4"}]
    for annotation, mask in zip(sound["annotations"], masks[:2]):
        annotation.update(segmentation=mask, keypoints=[4, 5, 2])

    def load(example):
        mutations, changes = example
        tree = json.loads(json.dumps(sound))
        for mutation in mutations:
            mutate(tree, mutation)
        path.write_bytes(mutate_bytes(json.dumps(tree).encode(), changes))
        to_first_batch({"kind": "coco", "json": str(path), "images": str(tmp_path)})

    load(([], []))
    few_bytes = st.one_of(st.just([]), BYTES)
    counts = fuzz(examples, st.tuples(st.lists(MUTATION, max_size=4), few_bytes), load)
    assert 0 < counts["refused"] < counts["all"]


XML = (
    "<annotation><folder>x</folder><filename>{name}.jpg</filename><size><width>64</width><height>48</height><depth>3"
    "</depth></size><object><name>cat</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax>"
    "<ymax>40</ymax></bndbox></object></annotation>"
)
WORDS = st.sampled_from("64 48 3 30 cat xmin bndbox size width object < > / name".split())
OTHER_WORDS = st.sampled_from(["", "\0", 5000 * "9", *"nan inf -1 1e400 &b; <!DOCTYPE dog é <a>".split()])


@EXAMPLES
def test_voc_xml(tmp_path, examples):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("RGB", (64, 48)).save(tmp_path / f"JPEGImages/{name}.jpg")
        (tmp_path / f"Annotations/{name}.xml").write_text(XML.format(name=name))
    listed, path = tmp_path / "ImageSets/Main/train.txt", tmp_path / "Annotations/one.xml"

    def load(example):
        words, changes, list_changes = example
        text = XML.format(name="one")
        for old, new in words:
            text = text.replace(old, new, 1)
        path.write_bytes(mutate_bytes(text.encode(), changes))
        listed.write_bytes(mutate_bytes(b"one\ntwo\n", list_changes))
        to_first_batch({"kind": "voc", "root": str(tmp_path), "split": "train", "classes": ["cat", "dog", "cow"]})

    load(([], [], []))
    few_bytes = st.one_of(st.just([]), BYTES)
    strategy = st.tuples(st.lists(st.tuples(WORDS, OTHER_WORDS | WORDS), max_size=3), few_bytes, few_bytes)
    counts = fuzz(examples, strategy, load)
    assert 0 < counts["refused"] < counts["all"]


YOLO_WORDS = st.sampled_from("0 1 0.5 0.25 train images names nc path kpt_shape cat : , [ ] { }".split())
OTHER_YOLO_WORDS = st.sampled_from(
    ["", "\0", "*a", "&a", "../", "\n", 5000 * "9", *"nan inf -1 1e400 2 é !!x 0.9".split()]
)


@EXAMPLES
def test_yolo(tmp_path, examples):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (64, 48)).save(tmp_path / f"images/{name}.jpg")
        (tmp_path / f"labels/{name}.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.5 0.25 0.5 0.25 0.25 0.5\n")
    texts = {
        "data.yaml": "path: .\ntrain: images\nnc: 3\nnames: [cat, dog, cow]\n",
        "labels/one.txt": (tmp_path / "labels/one.txt").read_text(),
    }

    def load(example):
        words, changes, name = example
        for other, text in texts.items():
            for old, new in words if other == name else ():
                text = text.replace(old, new, 1)
            (tmp_path / other).write_bytes(mutate_bytes(text.encode(), changes if other == name else []))
        to_first_batch({"kind": "yolo", "yaml": str(tmp_path / "data.yaml"), "split": "train"})

    load(([], [], ""))
    few_bytes = st.one_of(st.just([]), BYTES)
    words = st.lists(st.tuples(YOLO_WORDS, OTHER_YOLO_WORDS | YOLO_WORDS), max_size=3)
    counts = fuzz(examples, st.tuples(words, few_bytes, st.sampled_from(sorted(texts))), load)
    assert 0 < counts["refused"] < counts["all"]


@EXAMPLES
def test_images(tmp_path, examples):
    """Broken images are found at the start or when they are read. Then a sound image takes their place."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(np.kron(rng.integers(0, 255, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
    picture.save(tmp_path / "sound.png")
    encoded = {}
    exif = Image.Exif()
    exif[274] = 3
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG") else {}))
        encoded[kind] = buffer.getvalue()
    broken = {"found at the start": 0, "found when read": 0, "loaded": 0}

    def load(example):
        kind, changes = example
        (tmp_path / "fuzzed.img").write_bytes(mutate_bytes(encoded[kind], changes))
        samples = [
            {"file_name": str(tmp_path / name), "width": 64, "height": 48, "image_id": name, "annotations": []}
            for name in ("fuzzed.img", "sound.png")
        ]
        at_start = find_bad_images(samples)
        whole = find_bad_images(samples[:1], whole=True)
        assert set(at_start) <= set(whole) | {samples[1]["file_name"]} and samples[1]["file_name"] not in at_start
        sample = PositionedDataset(samples, mapper, seed=1)[0, 0]
        assert sample["image"].shape[0] == 3
        broken["found at the start" if at_start else "found when read" if BAD_IMAGES in sample else "loaded"] += 1

    mapper = DatasetMapper(make_cfg({}), is_train=True)
    fuzz(examples, st.tuples(st.sampled_from(sorted(encoded)), BYTES), load)
    print(broken)
    assert all(broken.values())
