"""A signal that arrives while a process is being started waits until the process has a handle."""

import os
import signal
import subprocess
import sys

import pytest

from gdetkd.study.signals import exit_on_signals, starting


def test_a_signal_ends_the_code_inside():
    with pytest.raises(SystemExit) as e, exit_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert e.value.code == 128 + signal.SIGTERM


def test_a_signal_waits_while_a_process_is_started():
    process, is_kept = None, False
    with pytest.raises(SystemExit) as e, exit_on_signals():
        with starting():
            os.kill(os.getpid(), signal.SIGTERM)
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            is_kept = True
        pytest.fail("the signal was lost")
    process.kill()
    process.communicate()
    assert is_kept and e.value.code == 128 + signal.SIGTERM


def test_an_error_while_starting_lets_later_signals_through():
    with pytest.raises(FileNotFoundError), exit_on_signals(), starting():
        subprocess.Popen(["/no/such/program"])
    with pytest.raises(SystemExit), exit_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
