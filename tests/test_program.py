"""A program shows only a message for a known mistake, and a traceback for any other error."""

import errno
import traceback

import pytest
import torch

from gdetkd.errors import GDetKDError
from gdetkd.program import REPORT, explained_errors, message_in
from gdetkd.safe_load import UntrustedFileError


@pytest.mark.parametrize(
    "error, message",
    [
        (GDetKDError("Set A to 1."), "Set A to 1."),
        (UntrustedFileError("It asks for os.system."), "It asks for os.system."),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), "No space left on device: /full. Choose"),
        (torch.cuda.OutOfMemoryError("Tried to allocate 3 GiB"), "Lower SOLVER.IMS_PER_BATCH"),
        (torch.cuda.OutOfMemoryError(), "Lower SOLVER.IMS_PER_BATCH"),
    ],
)
def test_a_known_mistake_shows_no_traceback(capsys, error, message):
    with pytest.raises(SystemExit) as e, explained_errors():
        raise error
    assert message in e.value.code and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), OSError(errno.EIO, "Input/output error")])
def test_an_unknown_error_shows_its_traceback_and_where_to_report_it(capsys, error):
    with pytest.raises(SystemExit) as e, explained_errors():
        raise error
    printed = capsys.readouterr().err
    assert e.value.code == REPORT and "Traceback" in printed and type(error).__name__ in printed


def test_interrupted():
    with pytest.raises(SystemExit) as e, explained_errors():
        raise KeyboardInterrupt
    assert e.value.code == 130


def test_an_exit_keeps_its_status():
    with pytest.raises(SystemExit) as e, explained_errors():
        raise SystemExit(75)
    assert e.value.code == 75


@pytest.mark.parametrize("kind", [GDetKDError, UntrustedFileError])
def test_the_message_in_the_traceback_of_another_process(kind):
    try:
        try:
            raise KeyError("inner")
        except KeyError as e:
            raise kind("Set A to 1.\nOr to 2.") from e
    except GDetKDError:
        text = traceback.format_exc()
    assert message_in(text) == "Set A to 1.\nOr to 2."
    assert message_in(text.replace("gdetkd.", "other.")) is None
