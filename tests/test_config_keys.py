"""Every config key that a function of Detectron2 reads is read by the code that we run in its place.

The functions are those of the installed Detectron2, so that a key of a new version is found by this test.
"""

import ast
import inspect
from types import FunctionType, ModuleType

import pytest
from detectron2.config import get_cfg
from detectron2.data import build as data_build
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import build as solver_build

from gdetkd.data import samplers, train_images, train_loader
from gdetkd.engine import DistillTrainer, evaluators, optimizer
from gdetkd.engine import trainer as trainer_module

LOADER = [train_loader, train_images, samplers]
OURS_BY_THEIRS = {
    data_build._train_loader_from_config: LOADER,
    data_build.build_detection_train_loader: LOADER,
    solver_build.build_optimizer: [optimizer],
    DefaultTrainer.__init__: [trainer_module],
    COCOEvaluator.__init__: [evaluators],
}
# Keys that our code need not read, with the reason.
KNOWN = {
    "SOLVER.CLIP_GRADIENTS": "Detectron2's maybe_add_gradient_clipping is called",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "Detectron2's maybe_add_gradient_clipping is called",
    "SOLVER.MOMENTUM": "SGD is built by Detectron2's build_optimizer, and AdamW has betas in its place",
    "SOLVER.NESTEROV": "SGD is built by Detectron2's build_optimizer, and AdamW has betas in its place",
}


def tree_of(code) -> ast.AST:
    source = inspect.getsource(code)
    return ast.parse(f"if True:\n{source}" if source[0].isspace() else source)  # a method is indented


def plain(method) -> FunctionType:
    return getattr(method, "__func__", method)


def chain_of(node) -> tuple:
    """Return ("TEST", "EVAL_PERIOD") of `self.cfg.TEST.EVAL_PERIOD`: the capital names at the end."""
    if isinstance(node, ast.Attribute) and node.attr.isupper():
        return (*chain_of(node.value), node.attr)
    return ()


def read_of(node) -> tuple:
    """Return the chain of names that a node reads, as an attribute or by name, and the start of it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return (*chain_of(node.func.value), *name_in(node.args[:1])), node.func.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        return (*chain_of(node.args[0]), *name_in(node.args[1:2])), node.args[0]
    if isinstance(node, ast.Subscript):
        return (*chain_of(node.value), *name_in([node.slice])), node.value
    return chain_of(node), getattr(node, "value", None)


def keys_in(tree) -> set:
    """Return the config keys that the code reads as attributes, by `.get("KEY")`, `["KEY"]` or `getattr`."""
    roots = set(get_cfg())
    reads = {node: read_of(node) for node in ast.walk(tree)}
    reads = {node: (chain, start) for node, (chain, start) in reads.items() if chain and chain[0] in roots}
    # `cfg.TEST` is the start of `cfg.TEST.EVAL_PERIOD`, not a read of its own.
    starts = {start for _, start in reads.values()}
    return {".".join(chain) for node, (chain, _) in reads.items() if node not in starts}


def name_in(nodes) -> tuple:
    return tuple(each.value for each in nodes if isinstance(each, ast.Constant) and isinstance(each.value, str))


def with_helpers(function) -> list:
    """Return the function, and those of its module that it hands its config to, directly or not."""
    module, found = inspect.getmodule(inspect.unwrap(function)), [function]
    for current in found:
        for call in (node for node in ast.walk(tree_of(current)) if isinstance(node, ast.Call)):
            called = getattr(module, call.func.id, None) if isinstance(call.func, ast.Name) else None
            is_own = isinstance(called, FunctionType) and called.__module__ == module.__name__
            has_cfg = any(isinstance(each, ast.Name) and each.id == "cfg" for each in call.args)
            if is_own and has_cfg and called not in found:
                found.append(called)
    return found


def keys_read_by(code) -> set:
    """Return the keys that a module reads, or a function with its helpers."""
    if isinstance(code, ModuleType):
        return keys_in(tree_of(code))
    return set().union(*(keys_in(tree_of(function)) for function in with_helpers(code)))


def ignored(theirs, ours) -> set:
    return keys_read_by(theirs) - set().union(*(keys_read_by(code) for code in ours)) - set(KNOWN)


@pytest.mark.parametrize("theirs", OURS_BY_THEIRS, ids=lambda function: function.__qualname__)
def test_no_key_is_ignored(theirs):
    assert not ignored(theirs, OURS_BY_THEIRS[theirs])


def test_keys_of_the_trainer_are_read_where_we_do_without_its_method():
    """A method that calls Detectron2's own reads what that reads."""
    for name, method in vars(DistillTrainer).items():
        method, theirs = plain(method), plain(vars(DefaultTrainer).get(name))
        # `__init__` calls that of a base class, which passes Detectron2's over.
        if isinstance(theirs, FunctionType) and (name == "__init__" or not calls_detectron2(method, name)):
            assert not ignored(theirs, [trainer_module, optimizer, evaluators, *LOADER]), name


def calls_detectron2(method, name) -> bool:
    calls = (node.func for node in ast.walk(tree_of(method)) if isinstance(node, ast.Call))
    calls = (call for call in calls if isinstance(call, ast.Attribute) and call.attr == name)
    return any(ast.unparse(call.value) in ("super()", "DefaultTrainer") for call in calls)


def test_methods_that_call_detectron2():
    assert calls_detectron2(DistillTrainer.build_hooks, "build_hooks")
    assert calls_detectron2(DistillTrainer.auto_scale_workers, "auto_scale_workers")
    bare = next(base for base in DistillTrainer.__mro__[1:] if "__init__" in vars(base))
    assert bare is not DefaultTrainer and not calls_detectron2(bare.__init__, "__init__")


def test_every_known_key_is_one_that_detectron2_reads():
    assert set(KNOWN) <= set().union(*map(keys_read_by, OURS_BY_THEIRS))


def test_every_sampler_of_detectron2_is_known():
    constants = (node.value for node in ast.walk(tree_of(data_build._train_loader_from_config)) if is_text(node))
    names = {text for text in constants if text.endswith("TrainingSampler")}
    assert {"TrainingSampler", "RandomSubsetTrainingSampler"} <= names <= set(samplers.SAMPLERS)


def is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def made_up(cfg, tasks):
    """Reads two keys that our loader reads, and new ones in every way there is."""
    node = cfg.DATALOADER.get("NEW_BY_GET", True), getattr(cfg.SOLVER, "NEW_BY_GETATTR", 1), cfg.INPUT["NEW_BY_ITEM"]
    return cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED, tasks.TEST.NEW_OF_ANY_NAME, node, made_up_helper(cfg)


def made_up_helper(cfg):
    return cfg.MODEL.NEW.OF_HELPER, cfg.NOT_A_CONFIG.KEY


def test_a_new_key_would_be_found():
    assert ignored(made_up, LOADER) == {
        "DATALOADER.NEW_BY_GET",
        "SOLVER.NEW_BY_GETATTR",
        "INPUT.NEW_BY_ITEM",
        "TEST.NEW_OF_ANY_NAME",
        "MODEL.NEW.OF_HELPER",
    }


def test_a_key_that_we_stop_reading_would_be_found():
    without_samplers = ignored(data_build._train_loader_from_config, [train_loader, train_images])
    assert {"DATALOADER.REPEAT_THRESHOLD", "DATALOADER.RANDOM_SUBSET_RATIO"} <= without_samplers
    assert ignored(COCOEvaluator.__init__, [train_loader]) == {"TEST.KEYPOINT_OKS_SIGMAS"}
