"""The workarounds in gdetkd._compat: each test fails with "can go" when upstream no longer needs the workaround.

The suite runs on Detectron2 v0.6 and on main (`make test DETECTRON2=DIR`). A workaround for v0.6 alone has to be needed
there and unneeded on main. The others have to be needed on both.
"""

import inspect
from pathlib import Path

import gdetkd  # noqa: F401  first: it prepares the import of Detectron2

import numpy as np  # isort: skip
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, coco_evaluation
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.distributed import distributed_c10d

from gdetkd._compat import evaluation, imports, processes, training
from gdetkd._compat.retinanet import retinanet_takes_group_norm

ROOT = Path(__file__).parents[1]
IS_MAIN = hasattr(HookBase, "after_backward")


def check_v06_needs(workaround, is_needed):
    """Check that v0.6 needs a workaround, and that main does not."""
    if IS_MAIN:
        assert not is_needed, f"{workaround} is needed on Detectron2 main, too: correct its docstring."
    else:
        assert is_needed, f"{workaround} can go: the installed Detectron2 does without it."


def check_both_need(workaround, is_needed):
    assert is_needed, f"{workaround} can go: upstream has changed."


def source(function):
    return inspect.getsource(function)


def public(module):
    return [name for name in dir(module) if not name.startswith("_")]


def test_v06_is_still_supported():
    pins = (ROOT / "requirements.in").read_text()
    assert "pb1-detectron2==0.6" in pins, "What v0.6 alone needs in gdetkd._compat can go: it is no longer pinned."


def test_retinanets_group_norm():
    check_v06_needs("retinanet_takes_group_norm", not retinanet_takes_group_norm())


def test_pillows_alias():
    check_v06_needs("restore_pillow_linear", imports.detectron2_names("data/transforms/transform.py", r"Image\.LINEAR"))
    assert not IS_MAIN or not hasattr(PIL.Image, "LINEAR") or PIL.Image.LINEAR == PIL.Image.BILINEAR


@pytest.mark.parametrize("name", imports.NUMPY_ALIASES)
def test_numpys_aliases(name):
    _, file = imports.NUMPY_ALIASES[name]
    check_v06_needs(f"NumPy's alias {name}", imports.detectron2_names(file, rf"\bnp\.{name}\b"))


def test_numpy_gets_an_alias_only_if_detectron2_names_it(monkeypatch):
    monkeypatch.delattr(np, "str", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(imports, "detectron2_names", lambda file, pattern: False)
        imports.restore_numpy_aliases()
        assert "str" not in vars(np)
    imports.restore_numpy_aliases()
    assert ("str" in vars(np)) is not IS_MAIN


def test_a_file_that_detectron2_lacks_names_nothing():
    assert not imports.detectron2_names("data/no_such_file.py", "")


def test_the_compiled_extension():
    check_v06_needs("stand_in_for_compiled_ops", imports.imports_compiled_ops())


def test_the_default_store():
    names = [name for name in [*public(dist), *public(distributed_c10d)] if "default_store" in name]
    check_both_need("default_store", not names)
    assert callable(distributed_c10d._get_default_store)


def test_the_group_on_the_cpu():
    check_both_need("cpu_group", not [name for name in public(comm) if "gloo" in name or "cpu" in name])
    check_both_need("exchanging_in", "timeout" not in source(comm._get_global_gloo_group))


def test_other_groups_are_used_inside_alone():
    original = comm._get_global_gloo_group
    with processes.exchanging_in("a group"):
        assert processes.cpu_group() == "a group"
    assert comm._get_global_gloo_group is original


def test_the_local_group():
    check_v06_needs("make_local_group", not processes.MAKES_LOCAL_GROUP)


def test_forgetting_groups():
    names = [name for name in public(comm) if any(word in name for word in ("forget", "destroy", "reset", "clear"))]
    check_both_need("forget_process_groups", not names)
    assert hasattr(comm, "_LOCAL_PROCESS_GROUP") and hasattr(comm._get_global_gloo_group, "cache_clear")


def test_default_trainer_builds_its_parts():
    """`BareTrainer` can go when the whole model, DDP and the checkpointer are no longer fixed in `__init__`."""
    body = source(DefaultTrainer.__init__)
    assert list(inspect.signature(DefaultTrainer.__init__).parameters) == ["self", "cfg"], "BareTrainer can go."
    for part in ("DetectionCheckpointer(", "create_ddp_model(", "self._trainer ="):
        check_both_need("BareTrainer", part in body)
    check_both_need("BareTrainer.keep_results", "self._last_eval_results" in source(DefaultTrainer.train))
    check_v06_needs("BareTrainer.state_dict", not training.SAVES_OPTIMIZER)


def test_the_scale_of_the_losses():
    names = [name for name in public(DefaultTrainer) if "scale" in name]
    check_both_need("BareTrainer.loss_scale", names == ["auto_scale_workers"])
    assert "self.grad_scaler =" in source(AMPTrainer.__init__)
    trainer = training.BareTrainer()
    trainer.run_steps_with(SimpleTrainer(nn.Linear(1, 1), [], None))
    assert trainer.loss_scale == 1.0


def test_default_trainer_passes_no_backward_pass_on():
    """`DefaultTrainer` does not call `after_backward`, so `StepAgreement` belongs to the inner trainer."""
    assert "after_backward" not in source(DefaultTrainer), "StepAgreement can be a hook of DistillTrainer."


class Noted(HookBase):
    def __init__(self, calls):
        self.calls = calls

    def after_backward(self):
        self.calls.append("after_backward")


def test_hooks_are_called_between_the_backward_pass_and_the_optimizer():
    check_v06_needs("AfterBackward", not training.CALLS_AFTER_BACKWARD)
    calls = []

    class Model(nn.Linear):
        def forward(self, batch):
            return {"loss": super().forward(batch).sum()}

    class Trainer(training.AfterBackward, SimpleTrainer):
        pass

    model = Model(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_hook(lambda gradient: calls.append("backward"))
    optimizer.register_step_pre_hook(lambda *args: calls.append("optimizer"))
    trainer = Trainer(model, [torch.ones(1, 2)] * 2, optimizer)
    trainer.register_hooks([Noted(calls)])
    trainer.train(0, 2)
    assert calls == ["backward", "after_backward", "optimizer"] * 2


def test_the_moving_average():
    check_both_need("keeps_moving_average", hasattr(DenseDetector, "_ema_update"))


def test_the_base_of_batch_norm():
    bases = [set(kind.__mro__) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)]
    names = [base.__name__ for base in set.intersection(*bases) - set(nn.Module.__mro__)]
    check_both_need("batch_norms", names and all(name.startswith("_") for name in names))
    assert len(training.batch_norms(nn.Sequential(nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.BatchNorm1d(1)))) == 2


def test_the_batches_of_precise_bn():
    hook = PreciseBN(1, nn.Sequential(nn.BatchNorm1d(1)), "loader", 1)
    check_both_need("loader_of", training.loader_of(hook) == "loader" and "loader" not in map(repr, public(hook)))
    check_both_need("update_statistics", list(inspect.signature(PreciseBN.update_stats).parameters) == ["self"])
    training.update_statistics(hook, iter([torch.tensor([[1.0], [3.0]])]))
    assert hook._model[0].running_mean.item() == 2.0 and hook._data_iter is None


def test_an_interrupted_estimate():
    norm = nn.BatchNorm1d(1)
    settings = training.NormSettings(norm)

    def interrupted():
        yield torch.ones(2, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_bn_stats(norm, interrupted(), 2)
    check_both_need("NormSettings", norm.momentum == 1.0 and len(norm._forward_pre_hooks) == 1)
    settings.restore()
    assert norm.momentum == 0.1 and not norm._forward_pre_hooks


@pytest.mark.parametrize("step", ["_tasks_from_predictions", "_eval_predictions"])
def test_the_steps_of_coco_evaluation(step):
    check_both_need("CocoSteps", hasattr(COCOEvaluator, step) and not hasattr(COCOEvaluator, step.lstrip("_")))
    assert step in vars(evaluation.CocoSteps)


def test_the_class_of_coco_evaluation():
    parameters = inspect.signature(COCOEvaluator.__init__).parameters
    check_both_need("coco_eval_made_by", not [name for name in parameters if "cocoeval" in name.lower()])
    official = coco_evaluation.COCOeval
    with evaluation.coco_eval_made_by(lambda truth, task: (lambda *args: args) if task == "bbox" else None):
        assert coco_evaluation.COCOeval("truth", "found", "bbox") == ("truth", "found", "bbox")
    assert coco_evaluation.COCOeval is official


def test_the_parts_of_evaluators():
    both = DatasetEvaluators(["first", "second"])
    check_both_need("parts_of", "evaluators" not in public(both))
    assert evaluation.parts_of(both) == ["first", "second"] and evaluation.parts_of("alone") == ["alone"]
