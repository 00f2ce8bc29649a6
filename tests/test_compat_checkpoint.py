"""The workarounds for checkpoints and pickles in gdetkd._compat. As in test_compat.py, a test fails when one can go."""

import io
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from gdetkd._compat import pickles
from gdetkd._compat.checkpoint import CheckpointSteps
from test_compat import check_both_need, source


@pytest.mark.parametrize("step", ["_load_file", "_load_model"])
def test_the_steps_of_loading(step):
    check_both_need("CheckpointSteps", hasattr(Checkpointer, step) and not hasattr(Checkpointer, step.lstrip("_")))
    assert f"self.{step}(" in source(Checkpointer.load) and step in vars(CheckpointSteps)


def test_the_base_class_of_detectron2s_checkpointer_reads_torchs_format(tmp_path):
    """So `read_torch_file` is what reads it."""
    check_both_need("CheckpointSteps", "super()._load_file(" in source(DetectionCheckpointer))

    class Steps(CheckpointSteps):
        def read_torch_file(self, filename):
            calls.append(filename)
            return super().read_torch_file(filename)

    calls, model, path = [], nn.Linear(1, 1), str(tmp_path / "weights.pth")
    torch.save({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([3.0])}, path)
    Steps(model).load(path)
    assert calls == [path] and [parameter.item() for parameter in model.parameters()] == [2.0, 3.0]


ARRAYS = {
    "contiguous": np.ones(2),
    "in Fortran's order": np.asfortranarray(np.ones((2, 3))),
    "a view": np.ones((4, 4))[::2, ::2],
    "a scalar": np.float32(1),
    "a truth value": np.bool_(True),
}


@pytest.mark.parametrize("array", ARRAYS)
def test_the_names_in_numpys_pickles(array):
    named = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module, name):
            named.add((module, name))
            return pickles.numpy_names().get((module, name)) or super().find_class(module, name)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = Noting(io.BytesIO(pickle.dumps(ARRAYS[array], protocol))).load()
        assert np.array_equal(loaded, ARRAYS[array])
    named.discard(("_codecs", "encode"))  # bytes in old protocols
    check_both_need("numpy_names", any("core." in module for module, _ in named))
    assert named <= set(pickles.numpy_names())


def test_numpys_functions_have_the_names_under_which_they_are_allowed():
    functions = {name: value for (module, name), value in pickles.numpy_names().items() if "core." in module}
    assert functions.keys() == {"_reconstruct", "scalar", "_frombuffer"}
    assert all(value.__name__ == name and value.__module__.startswith("numpy") for name, value in functions.items())


def test_torchs_loader_and_numpy(tmp_path):
    path = tmp_path / "scalars.pth"
    torch.save([np.float64(0.5), np.ones(2)], path)
    with pytest.raises(pickle.UnpicklingError):  # else names_allowed can go
        torch.load(path, weights_only=True)
    with pickles.names_allowed({}):
        assert torch.load(path, weights_only=True)[0] == 0.5
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


class Payload:
    def __reduce__(self):
        return exec, ("pass",)


@pytest.mark.parametrize("zipped", [True, False])
def test_torchs_refusals(tmp_path, zipped):
    path = tmp_path / "payload.pth"
    torch.save(Payload(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError) as refusal:
        torch.load(path, weights_only=True)
    check_both_need("refused_name", type(refusal.value) is pickle.UnpicklingError and not vars(refusal.value))
    assert pickles.refused_name(refusal.value).endswith("exec")
    path.write_bytes(b"no weights" * 10)
    with pytest.raises(pickle.UnpicklingError) as damage:
        torch.load(path, weights_only=True)
    assert pickles.refused_name(damage.value) == "" == pickles.refused_name(ValueError("GLOBAL os.system"))
