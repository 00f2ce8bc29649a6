"""Run a program in a job of a cluster.

The job gets this file's code without the package, so that it starts fast. The file imports nothing of GDetKD or torch.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import List

# Seconds that a job waits for its end after SIGTERM stopped its program. If the cluster repeats the job by itself, the
# job must not report an end before.
SECONDS_TO_THE_END = 120.0
# An option of Linux' prctl: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1


class ProgramInJob:
    """Run a program in a job. submitit calls this object on a machine of the cluster.

    Args:
        command: the program and its arguments.
        log: file to which the program's output is appended.
        exit_stopped: exit code of a program that saved and ended because of SIGTERM.
    """

    def __init__(self, command: List[str], log: str, exit_stopped: int) -> None:
        self._command = command
        self._log = log
        self._exit_stopped = exit_stopped

    def __call__(self) -> int:
        """Return the program's exit code, or `exit_stopped` if submitit says that the time of the job is over."""
        from submitit.core.utils import UncompletedJobError

        process = self._start()
        try:
            code = process.wait()
            if code == self._exit_stopped:
                time.sleep(SECONDS_TO_THE_END)
        except UncompletedJobError:  # submitit's handler of SIGUSR2 raises it
            code = self._exit_stopped
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return code

    def _start(self) -> "subprocess.Popen[bytes]":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with open(self._log, "a") as log:
            return subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(cores), **os.environ},
                preexec_fn=_follow_the_job,
            )


def _follow_the_job() -> None:
    """Let only the job's own process act at the end of its time, and let the program save if that process is killed."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends it to all processes of a job before its time is over
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
