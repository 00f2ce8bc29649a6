"""The recorder of forward calls, and its hooks."""

import pytest
import torch
from torch import nn

from gdetkd.recorder import Recorder


def test_records_every_call_in_order():
    layer = nn.Identity()
    with Recorder({"point": layer}) as calls:
        layer(torch.tensor(1)), layer(torch.tensor(2))
    assert [call.output.item() for call in calls["point"]] == [1, 2]
    assert [call.inputs[0].item() for call in calls["point"]] == [1, 2]


def test_hooks_come_off_on_exit_and_on_exception():
    layer = nn.Identity()
    with Recorder({"point": layer}) as calls:
        pass
    layer(torch.tensor(1))
    assert calls["point"] == [] and not layer._forward_hooks
    with pytest.raises(ZeroDivisionError), Recorder({"point": layer}):
        raise ZeroDivisionError
    assert not layer._forward_hooks


def test_is_not_entered_twice():
    recorder = Recorder({"point": nn.Identity()})
    with recorder, pytest.raises(RuntimeError, match="already recording"):
        recorder.__enter__()
