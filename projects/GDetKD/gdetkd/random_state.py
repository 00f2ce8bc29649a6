"""Save, restore and seed the random generators of a training run."""

import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Sequence

import numpy as np
import torch


def get_random_state() -> Dict[str, Any]:
    """Return the states of Python, NumPy, torch and CUDA, in types that the safe checkpoint loader accepts."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # reading the state would initialise CUDA, also for a run on the CPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore the states that `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state(seed: Sequence[int]) -> Iterator[None]:
    """Seed Python, NumPy and torch (the CPU and the current GPU) in a `with` block, and restore the states after it."""
    before = get_random_state()
    words = np.random.SeedSequence(list(seed)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # torch.manual_seed would reseed all GPUs, and their states are not saved here.
    torch.default_generator.manual_seed(int(words[2]))
    if "cuda" in before:  # a worker of the data loader must not touch CUDA
        torch.cuda.manual_seed(int(words[2]))
    try:
        yield
    finally:
        set_random_state(before)
