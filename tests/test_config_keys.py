"""GDetKD replaces some functions of Detectron2. It reads every config key that the replaced functions read.

The tests read the source of the installed Detectron2. So they fail if a new version reads a new key.
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

from gdetkd.data import samplers, task_labels, train_images, train_loader
from gdetkd.engine import DistillTrainer, evaluators, optimizer
from gdetkd.engine import trainer as trainer_module

LOADER = [train_loader, train_images, task_labels, samplers]
# Maps a function of Detectron2 to the modules of GDetKD that replace it.
REPLACEMENTS = {
    data_build._train_loader_from_config: LOADER,
    data_build.build_detection_train_loader: LOADER,
    solver_build.build_optimizer: [optimizer],
    DefaultTrainer.__init__: [trainer_module],
    COCOEvaluator.__init__: [evaluators],
}
# Keys that GDetKD need not read, with the reason.
EXCEPTIONS = {
    "SOLVER.CLIP_GRADIENTS": "GDetKD calls Detectron2's maybe_add_gradient_clipping",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "GDetKD calls Detectron2's maybe_add_gradient_clipping",
    "SOLVER.MOMENTUM": "Detectron2's build_optimizer builds SGD, and AdamW has betas in place of a momentum",
    "SOLVER.NESTEROV": "Detectron2's build_optimizer builds SGD, and AdamW has betas in place of a momentum",
}


def parse(code) -> ast.AST:
    """Parse the source of a module or function."""
    source = inspect.getsource(code)
    return ast.parse(f"if True:\n{source}" if source[0].isspace() else source)  # a method is indented


def unwrap(method) -> FunctionType:
    """Return the function of a class method, or a function as it is."""
    return getattr(method, "__func__", method)


def capital_names(node) -> tuple:
    """Return the capital names at the end of an expression: ("TEST", "EVAL_PERIOD") for `self.cfg.TEST.EVAL_PERIOD`."""
    if isinstance(node, ast.Attribute) and node.attr.isupper():
        return (*capital_names(node.value), node.attr)
    return ()


def find_read(node) -> tuple:
    """Return the key that a node reads, as a tuple of names, and the expression that the key is read from."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return (*capital_names(node.func.value), *texts(node.args[:1])), node.func.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        return (*capital_names(node.args[0]), *texts(node.args[1:2])), node.args[0]
    if isinstance(node, ast.Subscript):
        return (*capital_names(node.value), *texts([node.slice])), node.value
    return capital_names(node), getattr(node, "value", None)


def keys_in(tree) -> set:
    """Return the config keys that the code reads as attributes, by `.get("KEY")`, `["KEY"]` or `getattr`."""
    roots = set(get_cfg())
    reads = {node: find_read(node) for node in ast.walk(tree)}
    reads = {node: (names, start) for node, (names, start) in reads.items() if names and names[0] in roots}
    # `cfg.TEST` is the start of `cfg.TEST.EVAL_PERIOD`. It is not a read by itself.
    starts = {start for _, start in reads.values()}
    return {".".join(names) for node, (names, _) in reads.items() if node not in starts}


def texts(nodes) -> tuple:
    """Return the text constants among nodes."""
    return tuple(node.value for node in nodes if is_text(node))


def is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def with_helpers(function) -> list:
    """Return a function and the functions of the same module that get its config, directly or through each other."""
    module, found = inspect.getmodule(inspect.unwrap(function)), [function]
    for current in found:
        for call in (node for node in ast.walk(parse(current)) if isinstance(node, ast.Call)):
            called = getattr(module, call.func.id, None) if isinstance(call.func, ast.Name) else None
            is_in_module = isinstance(called, FunctionType) and called.__module__ == module.__name__
            gets_config = any(isinstance(argument, ast.Name) and argument.id == "cfg" for argument in call.args)
            if is_in_module and gets_config and called not in found:
                found.append(called)
    return found


def keys_read_by(code) -> set:
    """Return the keys that a module reads, or that a function and its helpers read."""
    if isinstance(code, ModuleType):
        return keys_in(parse(code))
    return set().union(*(keys_in(parse(function)) for function in with_helpers(code)))


def find_ignored_keys(function, replacements) -> set:
    """Return the keys that a function of Detectron2 reads and its replacements ignore."""
    return keys_read_by(function) - set().union(*(keys_read_by(code) for code in replacements)) - set(EXCEPTIONS)


@pytest.mark.parametrize("function", REPLACEMENTS, ids=lambda function: function.__qualname__)
def test_no_key_is_ignored(function):
    assert not find_ignored_keys(function, REPLACEMENTS[function])


def test_the_trainer_reads_the_keys_of_each_method_that_it_replaces():
    """Skip a method that calls Detectron2's method, because the call reads the keys."""
    for name, method in vars(DistillTrainer).items():
        method, replaced = unwrap(method), unwrap(vars(DefaultTrainer).get(name))
        # `__init__` calls the `__init__` of a base class that replaces Detectron2's.
        if isinstance(replaced, FunctionType) and (name == "__init__" or not calls_detectron2(method, name)):
            assert not find_ignored_keys(replaced, [trainer_module, optimizer, evaluators, *LOADER]), name


def calls_detectron2(method, name) -> bool:
    """Return whether a method calls the method of this name of its base class or of `DefaultTrainer`."""
    calls = (node.func for node in ast.walk(parse(method)) if isinstance(node, ast.Call))
    calls = (call for call in calls if isinstance(call, ast.Attribute) and call.attr == name)
    return any(ast.unparse(call.value) in ("super()", "DefaultTrainer") for call in calls)


def test_calls_of_detectron2s_methods_are_found():
    assert calls_detectron2(DistillTrainer.build_hooks, "build_hooks")
    assert calls_detectron2(DistillTrainer.auto_scale_workers, "auto_scale_workers")
    bare = next(base for base in DistillTrainer.__mro__[1:] if "__init__" in vars(base))
    assert bare is not DefaultTrainer and not calls_detectron2(bare.__init__, "__init__")


def test_detectron2_reads_every_exception():
    assert set(EXCEPTIONS) <= set().union(*map(keys_read_by, REPLACEMENTS))


def test_gdetkd_has_every_sampler_of_detectron2():
    constants = (node.value for node in ast.walk(parse(data_build._train_loader_from_config)) if is_text(node))
    names = {text for text in constants if text.endswith("TrainingSampler")}
    assert {"TrainingSampler", "RandomSubsetTrainingSampler"} <= names <= set(samplers.SAMPLERS)


def made_up(cfg, tasks):
    """Read two keys that GDetKD's loader reads, and new keys in every way that code can read a key."""
    node = cfg.DATALOADER.get("NEW_BY_GET", True), getattr(cfg.SOLVER, "NEW_BY_GETATTR", 1), cfg.INPUT["NEW_BY_ITEM"]
    return cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED, tasks.TEST.NEW_OF_ANY_NAME, node, made_up_helper(cfg)


def made_up_helper(cfg):
    return cfg.MODEL.NEW.OF_HELPER, cfg.NOT_A_CONFIG.KEY


def test_a_new_key_is_found():
    assert find_ignored_keys(made_up, LOADER) == {
        "DATALOADER.NEW_BY_GET",
        "SOLVER.NEW_BY_GETATTR",
        "INPUT.NEW_BY_ITEM",
        "TEST.NEW_OF_ANY_NAME",
        "MODEL.NEW.OF_HELPER",
    }


def test_a_key_that_gdetkd_no_longer_reads_is_found():
    without_samplers = find_ignored_keys(data_build._train_loader_from_config, [train_loader, train_images])
    assert {"DATALOADER.REPEAT_THRESHOLD", "DATALOADER.RANDOM_SUBSET_RATIO"} <= without_samplers
    assert find_ignored_keys(COCOEvaluator.__init__, [train_loader]) == {"TEST.KEYPOINT_OKS_SIGMAS"}
