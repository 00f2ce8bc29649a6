"""The defaults of the method name their sources, because its authors published no code."""

import inspect
import re

import pytest

from conftest import make_cfg
from gdetkd import config
from gdetkd.losses import DISTILL_LOSS_REGISTRY

SOURCES = ("a write-up", "a re-implementation", "our choice")
# The comment above a default, and the default's key.
DEFAULT = re.compile(r"((?: *#.*\n)*) *node\.([A-Z_]+) = ")
WRITE_UP = {"IOU_THRESHOLD", "POSITIVE_FRACTION"}


def sources_of_regions():
    """Return the sources in the comments above the defaults of DISTILL.REGIONS, by key."""
    body = inspect.getsource(config._add_regions_node)
    return {key: re.findall(r"Source: ([^.]+)\.", comment) for comment, key in DEFAULT.findall(body)}


@pytest.mark.parametrize("key", sorted(make_cfg({}).DISTILL.REGIONS))
def test_each_default_of_the_regions_names_its_source(key):
    [source] = sources_of_regions()[key]
    assert source in SOURCES
    assert (source == "a write-up") == (key in WRITE_UP)


def test_the_module_explains_the_sources():
    assert all(f'"{source}"' in config.__doc__ for source in SOURCES)


@pytest.mark.parametrize(
    "name, loss", list(DISTILL_LOSS_REGISTRY), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_default_of_a_loss_names_its_source(name, loss):
    """A key without a comment shares the comment above it. QUEUE_SIZE only overrides another key."""
    own_keys = set(make_cfg({}).DISTILL[name]) - {"WEIGHT", "SHARE", "WARMUP_ITERS"}
    comments, comment = {}, ""
    for own, key in DEFAULT.findall(inspect.getsource(loss.add_keys)) if own_keys else ():
        comments[key] = comment = own or comment
    assert set(comments) == own_keys
    for key, comment in comments.items():
        assert key == "QUEUE_SIZE" or re.search(r"[Ss]ource|authors|paper", comment), f"{name}.{key} names no source"
    for default in ("default_weight", "default_share"):
        assert getattr(loss, default) == 1.0 or re.search(rf"{default} = .*# source: ", inspect.getsource(loss))
