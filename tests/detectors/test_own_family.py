"""The example in docs/detector-families.md runs as written, with a detector as student and as teacher."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_backbone, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from conftest import make_batch, make_cfg, plain_keys_of, run_example
from gdetkd import DistillTrainer
from gdetkd.detectors import DETECTOR_ADAPTER_REGISTRY, RCNNAdapter, find_adapter
from gdetkd.engine.preprocessing import preprocessing_of
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import read_weights


class MyDetector(nn.Module):
    """Classify the ground-truth boxes of an image. This is enough of a detector to have regions."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        shapes = self.backbone.output_shape()
        self.pool = ROIPooler(7, [1 / shape.stride for shape in shapes.values()], 2, "ROIAlignV2")
        self.embed = nn.Linear(shapes["p2"].channels * 49, 10)
        self.classify = nn.Linear(10, cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    @property
    def device(self):
        return self.embed.weight.device

    def preprocess_image(self, batched_inputs):
        return ImageList.from_tensors([inputs["image"].float() / 255 for inputs in batched_inputs], 32)

    def forward(self, batched_inputs):
        maps = self.backbone(self.preprocess_image(batched_inputs).tensor)
        boxes = [Boxes(inputs["instances"].gt_boxes.tensor) for inputs in batched_inputs]
        logits = self.classify(self.embed(self.pool(list(maps.values()), boxes).flatten(1)))
        target = torch.cat([inputs["instances"].gt_classes for inputs in batched_inputs])
        return {"loss_classes": nn.functional.cross_entropy(logits, target)}


@pytest.fixture
def own_family():
    META_ARCH_REGISTRY.register(MyDetector)


def test_a_detector_without_an_adapter_is_refused_with_what_to_do(distill_cfg, own_family):
    with pytest.raises(GDetKDError, match="student is a MyDetector.*RetinaNetAdapter.*Register an adapter"):
        build_model(distill_cfg({"DISTILL.STUDENT_META_ARCHITECTURE": "MyDetector"}))


def test_the_documented_example_learns_and_teaches(distill_cfg, own_family, tmp_path):
    run_example("detector-families.md")
    own = {"DISTILL.STUDENT_META_ARCHITECTURE": "MyDetector", "DISTILL.LOSSES": ("SGFI", "CKD")}
    check(build_model(distill_cfg(own)).train())
    teacher = plain_keys_of(make_cfg({"MODEL.META_ARCHITECTURE": "MyDetector"}))
    (tmp_path / "own.yaml").write_text(teacher.dump())
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "own.pth")
    files = {"CONFIG_FILE": str(tmp_path / "own.yaml"), "WEIGHTS": str(tmp_path / "own.pth")}
    cfg = distill_cfg({"DISTILL.LOSSES": ("SGFI", "CKD"), **{f"DISTILL.TEACHER.{k}": v for k, v in files.items()}})
    check(build_model(cfg).train())
    cfg.SOLVER.MAX_ITER = 1
    trainer = DistillTrainer(cfg)
    trainer.train()
    described = trainer.distiller.teacher.describe()
    assert read_weights(str(tmp_path / "run" / "model_final.pth"))["distill"]["teacher"] == described
    assert described["images"] == "BGR" and preprocessing_of(trainer.distiller.teacher.model, "BGR") is None


def test_a_detector_that_extends_a_known_one_can_have_an_adapter_of_its_own(distill_cfg, own_family):
    class Extended(GeneralizedRCNN):
        pass

    class ExtendedAdapter(RCNNAdapter):
        @classmethod
        def matches(cls, model):
            return isinstance(model, Extended)

    META_ARCH_REGISTRY.register(Extended)
    DETECTOR_ADAPTER_REGISTRY.register(ExtendedAdapter)
    model = build_model(distill_cfg({"DISTILL.STUDENT_META_ARCHITECTURE": "Extended"}))
    assert type(model.adapter) is ExtendedAdapter and type(model.teacher.adapter) is RCNNAdapter


def test_a_teacher_without_a_backbone_brings_its_own_way_to_features(distill_cfg, own_family, tmp_path):
    run_example("detector-families.md")

    class Renamed(MyDetector):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.net = self.backbone
            del self.backbone

    class RenamedAdapter(find_adapter(MyDetector(make_cfg({})))):
        @classmethod
        def matches(cls, model):
            return isinstance(model, Renamed)

        @property
        def spec(self):
            self.model.__dict__["backbone"] = self.model.net  # the example's description reads it
            try:
                return super().spec
            finally:
                del self.model.__dict__["backbone"]

        def extract(self, images):
            return self.model.net(images)

    META_ARCH_REGISTRY.register(Renamed)
    DETECTOR_ADAPTER_REGISTRY.register(RenamedAdapter)
    teacher = plain_keys_of(make_cfg({"MODEL.META_ARCHITECTURE": "Renamed"}))
    (tmp_path / "own.yaml").write_text(teacher.dump())
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "own.pth")
    files = {"CONFIG_FILE": str(tmp_path / "own.yaml"), "WEIGHTS": str(tmp_path / "own.pth")}
    keys = {f"DISTILL.TEACHER.{k}": v for k, v in files.items()}
    check(build_model(distill_cfg({"DISTILL.LOSSES": ("SGFI", "CKD"), **keys})).train())


def check(model):
    with EventStorage():
        losses = model(make_batch())
    terms = [losses[name] for name in ("loss_distill_sgfi", "loss_distill_ckd")]
    assert all(torch.isfinite(term) and term > 0 for term in terms)
    weights = list(model.student.backbone.parameters())
    for term in terms:
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_a_field_that_an_adapter_does_not_fill_is_named(distill_cfg, own_family, tmp_path):
    run_example("detector-families.md")
    teacher = plain_keys_of(make_cfg({"MODEL.META_ARCHITECTURE": "MyDetector"}))
    (tmp_path / "own.yaml").write_text(teacher.dump())
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "own.pth")
    files = {"CONFIG_FILE": str(tmp_path / "own.yaml"), "WEIGHTS": str(tmp_path / "own.pth")}
    keys = {f"DISTILL.TEACHER.{k}": v for k, v in files.items()}
    model = build_model(distill_cfg({"DISTILL.LOSSES": ("FITNET", "ROIFI"), **keys})).train()
    with pytest.raises(GDetKDError, match="needs levels of"), EventStorage():
        model(make_batch())
