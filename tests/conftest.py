"""Tiny detectors made of Detectron2's own parts, and a tiny dataset, for every test."""

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List

# Tests run side by side. With more threads each, they wait for each other: 13 tests took minutes in place of 40 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gdetkd  # first: it prepares the import of Detectron2
import gdetkd.data
from gdetkd.config import without_gdetkd_keys

import numpy as np  # isort: skip
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isolation import isolated  # noqa: F401  an autouse fixture

# Do not read the datasets that `make quickstart` generated in this checkout.
os.environ["DETECTRON2_DATASETS"] = "/there/are/no/datasets"
CUDA_TESTS = Path(__file__).resolve().parent / "cuda"
NUM_CLASSES = 3
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.MASK_ON": False,
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 2,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48]],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.0005,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 4,
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.TRAIN": ("tiny",),
    "DATASETS.TEST": (),
    "DISTILL.SGFI.EMBED_CHANNELS": (8, 6),
    "DISTILL.CKD.PROJECTION_DIM": 8,
    "DISTILL.CKD.QUEUE_SIZE": 24,
    "SEED": 3,
}
# Keys that make the tiny detector wider.
WIDER = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
}
# Keys of a two-stage detector without an FPN.
RESNET_C4 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
}
# Keys that make the tiny detector dense. A student's meta-architecture is under DISTILL.
DENSE = {
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 10, 12], [16, 20, 24], [32, 40, 48], [64, 80, 96], [128, 160, 192]],
    "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.FCOS.NUM_CONVS": 1,
    "MODEL.FCOS.NORM": "",
}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
# Meta-architecture and keys of each family, by the family's name in a pair.
FAMILIES = {
    "faster_rcnn": ("GeneralizedRCNN", {}),
    "mask_rcnn": ("GeneralizedRCNN", {"MODEL.MASK_ON": True}),
    "cascade_rcnn": ("GeneralizedRCNN", CASCADE),
    "retinanet": ("RetinaNet", DENSE),
    "fcos": ("FCOS", DENSE),
}
ALL_LOSSES = ("SGFI", "CKD", "CLS", "REG")


def make_cfg(changes: Dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    gdetkd.add_gdetkd_config(cfg)
    cfg.merge_from_list([item for pair in {**TINY, **changes}.items() for item in pair])
    return cfg


def plain_keys_of(cfg: CfgNode) -> CfgNode:
    """Return the config without GDetKD's keys, like the file of a teacher or of a plain Detectron2 user."""
    plain = without_gdetkd_keys(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "FCOS":
        plain.MODEL.FCOS = cfg.MODEL.FCOS.clone()  # GDetKD adds this node, and a teacher's file may have it
    return plain


def make_batch(sizes=((64, 64), (64, 48)), boxes_each: int = 3, seed: int = 0) -> List[Dict[str, Any]]:
    """Return a training batch of random images.

    Args:
        sizes: (height, width) of each image in pixels.
        boxes_each: number of objects in each image.
    """
    rng = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        corner = torch.rand(boxes_each, 2, generator=rng) * torch.tensor([width / 2, height / 2])
        size = 8 + torch.rand(boxes_each, 2, generator=rng) * torch.tensor([width / 2 - 8, height / 2 - 8])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(NUM_CLASSES, (boxes_each,), generator=rng)
        instances.gt_masks = PolygonMasks(
            [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in instances.gt_boxes.tensor.numpy()]
        )
        image = torch.randint(256, (3, height, width), generator=rng).to(torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def pytest_configure(config):
    """Let pytest-randomly choose only the order of the tests. `isolated` seeds the random numbers.

    Hide GPUs, unless only tests of tests/cuda run. The other tests are of the CPU, also on a machine with GPUs.
    """
    config.option.randomly_reset_seed = False
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if not all(CUDA_TESTS in (path, *path.parents) for path in named):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Return the device of a test in tests/cuda. The case of a GPU is skipped if there is none, or if it is hidden."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU and a run of tests/cuda alone")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def tiny_dataset(tmp_path_factory) -> Path:
    """Register twelve images with up to three objects each as "tiny". Return their folder."""
    folder = tmp_path_factory.mktemp("tiny")
    write_coco(folder, count=12, masks=True)
    entry = {"name": "tiny", "kind": "coco", "json": str(folder / "tiny.json"), "images": str(folder)}
    cfg = make_cfg({"DATASETS.REGISTER": [entry]})
    gdetkd.data.register_datasets(cfg)
    return folder


def example_in(page: str) -> str:
    """Return the first Python example of a page in docs/."""
    text = (Path(__file__).resolve().parents[1] / "docs" / page).read_text()
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def run_example(page: str) -> None:
    """Run the first Python example of a page in docs/, as a user would paste it."""
    exec(example_in(page), {"__name__": "example"})


def write_coco(folder: Path, count: int, name: str = "tiny", seed: int = 0, masks: bool = False) -> None:
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        height, width = (64, 64) if i % 3 else (64, 80)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append({"id": i + 1, "file_name": f"{name}{i}.png", "height": height, "width": width})
        for _ in range(1 + i % 3):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(10, 30, 2)))
            category = int(rng.integers(NUM_CLASSES))
            pixels[y : y + h, x : x + w] = 40 + 80 * category
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "category_id": category + 1,
                    **({"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} if masks else {}),
                }
            )
        Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    categories = [{"id": c + 1, "name": f"class{c}"} for c in range(NUM_CLASSES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def pseudo_entry(tmp_path):
    """Return a function that writes a dataset of kind `pseudo`, and returns its entry for DATASETS.REGISTER.

    Every second box has the score 0.9, the others have 0.4. With the default thresholds these are doubtful.
    """

    def make(name="pseudo", count=8, min_score=0.5, change=lambda content: None, **entry) -> Dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        write_coco(folder, count, name=name, seed=5)
        content = json.loads((folder / f"{name}.json").read_text())
        for annotation in content["annotations"]:
            annotation["score"] = 0.9 if annotation["id"] % 2 else 0.4
        change(content)
        (folder / f"{name}.json").write_text(json.dumps(content))
        keys = {} if min_score is None else {"min_score": min_score}
        return {"name": name, "kind": "pseudo", "json": f"{folder}/{name}.json", "images": str(folder), **keys, **entry}

    return make


@pytest.fixture
def make_teacher(tmp_path):
    """Return a function that writes a teacher's config and weights, and returns the config keys that name them."""

    def make(changes: Dict[str, Any] = WIDER, seed: int = 7) -> Dict[str, Any]:
        cfg = plain_keys_of(make_cfg(changes))
        config_file, weights = tmp_path / "teacher.yaml", tmp_path / "teacher.pth"
        config_file.write_text(cfg.dump())
        torch.manual_seed(seed)
        model = build_model(cfg)
        settle_batch_norm(model)
        torch.save({"model": model.state_dict()}, weights)
        return {"DISTILL.TEACHER.CONFIG_FILE": str(config_file), "DISTILL.TEACHER.WEIGHTS": str(weights)}

    return make


def settle_batch_norm(model: torch.nn.Module) -> None:
    """Give an untrained detector running statistics. Without them its features in eval mode are in the thousands."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the running statistics become the statistics of one batch
    with torch.no_grad():
        model.train().backbone(model.preprocess_image(make_batch()).tensor)


def look_through_the_model(teacher, dtype: torch.dtype = torch.float32) -> None:
    """Make a teacher run its own backbone, not the faster copy, which rounds differently."""
    teacher.adapter.backbone, teacher._dtype = teacher.model.backbone, dtype


@pytest.fixture
def distill_cfg(make_teacher, tmp_path):
    """Return a function that makes the config of a distillation. The teacher is the wider tiny detector."""

    def make(changes: Dict[str, Any] = {}, teacher: Dict[str, Any] = WIDER) -> CfgNode:
        keys = {"MODEL.META_ARCHITECTURE": "GDetKD", "DISTILL.LOSSES": ALL_LOSSES, "OUTPUT_DIR": str(tmp_path / "run")}
        os.makedirs(keys["OUTPUT_DIR"], exist_ok=True)
        return make_cfg({**keys, **make_teacher(teacher), **changes})

    return make


@pytest.fixture
def shared_cfg(distill_cfg):
    """Return a function that makes the config of a distillation in several processes.

    Every process registers the dataset for itself.
    """

    def make(world_size: int, changes: Dict[str, Any] = {}) -> CfgNode:
        keys = {"DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)]}
        # The outputs of an untrained teacher are large. With the usual learning rate, twenty steps do not stay finite.
        keys.update({"SOLVER.BASE_LR": 1e-5, "SOLVER.IMS_PER_BATCH": world_size})
        return distill_cfg({**keys, **changes})

    return make


@pytest.fixture
def pair_cfg(distill_cfg):
    """Return a function that makes the config of a tiny pair. Pairs have names as in configs/: "teacher-student"."""

    def make(pair: str, changes: Dict[str, Any] = {}, teacher: Dict[str, Any] = {}) -> CfgNode:
        (teacher_arch, teacher_keys), (student_arch, student_keys) = (FAMILIES[name] for name in pair.split("-"))
        keys = {"DISTILL.STUDENT_META_ARCHITECTURE": student_arch, "DISTILL.LOSSES": ("SGFI", "CKD")}
        return distill_cfg(
            {**keys, **student_keys, **changes},
            teacher={**WIDER, "MODEL.META_ARCHITECTURE": teacher_arch, **teacher_keys, **teacher},
        )

    return make


class LargeTensors(TorchDispatchMode):
    """Collect the storages of large tensors that operations inside return.

    Args:
        numbers: how many numbers a large tensor has at least.
    """

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.storages = numbers, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numbers:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage  # kept, so that no later storage gets its address

        return result
