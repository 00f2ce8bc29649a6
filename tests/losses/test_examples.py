"""The examples in the docstrings of the losses give the numbers that stand there."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import gdetkd.losses

MODULES = sorted(module.name for module in pkgutil.iter_modules(gdetkd.losses.__path__))
WITH_EXAMPLES = {
    "ckd": "contrastive_distillation",
    "class_aware_localization": "class_aware_localization",
    "classes": "merge_logits",
    "fgd": "scale_masks",
    "maps": "covered_cells",
    "pkd": "pearson_imitation",
    "roi_imitation": "nearest_levels",
    "sgfi": "level_attention",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_their_numbers(name):
    module = importlib.import_module(f"gdetkd.losses.{name}")
    examples = [test for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch}) if test.examples]
    found = [test.name.split(".")[-1] for test in examples]
    assert found == ([WITH_EXAMPLES[name]] if name in WITH_EXAMPLES else [])
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, "see the captured output"
