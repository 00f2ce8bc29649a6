"""Train the runs of a comparison as jobs of a SLURM cluster, with the package submitit."""

import ast
import math
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from ..engine.stopping import EXIT_STOPPED
from ..errors import GDetKDError, first_line
from ..files import last_line, written_whole
from . import in_job

# A job that ends this often in a row before its training saves anything would do so for ever.
MAX_TRIES = 3
# Seconds after which a job that stays preempted is taken as ended. SLURM repeats a job sooner, if it repeats it.
SECONDS_PREEMPTED = 600.0
# Seconds between two questions whether SLURM's queue has a job.
SECONDS_BETWEEN_QUESTIONS = 60.0
# Parameters of submitit that would give a job several processes. A training of a comparison is one process.
ONE = ("nodes", "ntasks_per_node", "tasks_per_node")
# Parameters that do not change the kind of machine.
NO_MACHINE = ("comment", "job_name", "name", "time", "timeout_min")


class ProgramOnCluster:
    """Run a program as a job, and submit it again if the job is killed, preempted or out of time.

    If a job for the same log is still there, because the comparison that submitted it was killed, that job is used.

    Args:
        executor: an executor of submitit.
        command: the program and its arguments.
        log: file to which the program's output is appended.
        progress: returns a text that changes when the program has saved something to resume from.
    """

    def __init__(self, executor: Any, command: List[str], log: Path, progress: Callable[[], str]) -> None:
        self._executor = executor
        self._program = in_job.ProgramInJob(command, str(log), EXIT_STOPPED)
        self._log = log
        self._note = log.with_name(f"{log.stem}_job_id.txt")
        self._progress = progress
        self._saved = progress()
        self._tries = 0
        self._code: Optional[int] = None
        self._preempted_since: Optional[float] = None
        self._asked, self._times_unknown = -math.inf, 0  # when SLURM's queue was asked, and how often it knew nothing
        self._job = self._find_job() or self._submit()

    def poll(self) -> Optional[int]:
        """Return the program's exit code, or None while it runs or waits in a queue.

        Raises:
            GDetKDError: the job failed outside of the program, or ended too often before the program saved anything.
        """
        if self._code is not None:
            return self._code
        is_lost = self._stays_preempted() or self._is_forgotten()
        if not is_lost and not self._job.done():
            return None
        code = None if is_lost else self._exit_code()
        if code is None or code < 0 or code == EXIT_STOPPED:  # a negative code is that of a signal
            self._submit_again()
        else:
            self._code = code
        return self._code

    def terminate(self) -> None:
        """Cancel the job. SLURM sends SIGTERM first, so that a training saves."""
        self._job.cancel(check=False)

    def wait(self) -> Optional[int]:
        """Return at once: the next comparison uses the job that is still ending, and submits another one after it."""
        return self._code

    def _find_job(self) -> Any:
        """Return the job that an earlier comparison submitted and that has not ended, or None."""
        if not self._note.exists():
            return None
        job = self._executor.job_class(folder=self._executor.folder, job_id=self._note.read_text())
        return None if job.done(force_check=True) or _is_forgotten(job) else job

    def _submit(self) -> Any:
        import cloudpickle

        # The job gets the code itself. Otherwise it would import GDetKD and torch a second time, which takes seconds.
        cloudpickle.register_pickle_by_value(in_job)
        self._preempted_since, self._times_unknown = None, 0
        self._log.touch()
        job = self._executor.submit(self._program)
        with written_whole(str(self._note)) as file:
            file.write(job.job_id)
        return job

    def _submit_again(self) -> None:
        self._job.cancel(check=False)  # if SLURM also repeats it, two trainings would want the same folder
        saved = self._progress()
        self._tries = 0 if saved != self._saved else self._tries + 1
        self._saved = saved
        if self._tries >= MAX_TRIES:
            raise GDetKDError(
                f"{MAX_TRIES} jobs in a row ended before the program of {self._log} saved anything. Give it more time "
                "or memory, such as --slurm time=240 mem=32GB, or save more often (SOLVER.CHECKPOINT_PERIOD). The log "
                f"ends with: {last_line(self._log)}"
            )
        self._job = self._submit()

    def _stays_preempted(self) -> bool:
        if not self._job.state.upper().startswith("PREEMPTED"):
            self._preempted_since = None
            return False
        self._preempted_since = self._preempted_since or time.monotonic()
        return time.monotonic() - self._preempted_since >= SECONDS_PREEMPTED

    def _is_forgotten(self) -> bool:
        """Return whether SLURM does not know the job, twice in a row: its result may appear a little after its end."""
        if time.monotonic() - self._asked >= SECONDS_BETWEEN_QUESTIONS:
            self._asked = time.monotonic()
            self._times_unknown = self._times_unknown + 1 if _is_forgotten(self._job) else 0
        return self._times_unknown >= 2

    def _exit_code(self) -> Optional[int]:
        """Return the program's exit code, or None if the job was killed before it could tell."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return self._job.result()
        except FailedJobError as e:  # a subclass of the other error
            raise GDetKDError(
                f"The job {self._job.job_id} failed. Correct the cause and start again. Its log is "
                f"{self._job.paths.stderr}, which ends with: {last_line(self._job.paths.stderr)}"
            ) from e
        except UncompletedJobError:
            return None


def _is_forgotten(job: Any) -> bool:
    """Return whether a job has ended without a result, and SLURM no longer knows it.

    submitit waits for such a job for ever. It asks SLURM's accounting alone, which may be off, or not know a job yet.
    """
    if job.state.upper() != "UNKNOWN" or job.done():
        return False
    try:
        found = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True)
    except FileNotFoundError:  # the jobs of submitit's local executor
        return False
    is_invalid = "Invalid job id" in found.stderr
    is_forgotten = is_invalid or (found.returncode == 0 and not found.stdout.strip())
    # The job may have ended, and written its result, since it was asked for above.
    return is_forgotten and not job.done()


class ClusterExecutor:
    """Start programs as jobs.

    Args:
        executor: an executor of submitit. Its folder must be on a file system that all machines share.
        jobs: how many jobs may be in the queue or run at once.
        machine: what the jobs run on, for the report.
    """

    def __init__(self, executor: Any, jobs: int, machine: str) -> None:
        self._executor = executor
        self.jobs = jobs
        self.machine: Optional[str] = machine

    def start(self, command: List[str], log: Path, place: int, progress: Callable[[], str]) -> ProgramOnCluster:
        return ProgramOnCluster(self._executor, command, log, progress)


def slurm_executor(folder: Path, jobs: int, parameters: Dict[str, Any]) -> ClusterExecutor:
    """Return the executor for the SLURM cluster that this machine belongs to.

    Args:
        folder: folder for the files of the jobs. It must be on a file system that all machines share.
        jobs: how many jobs may be in the queue or run at once.
        parameters: submitit's parameters of a job, such as "partition", "gpus_per_node" and "time" (minutes).

    Raises:
        GDetKDError: submitit is not installed, this machine belongs to no SLURM cluster, or a parameter is wrong or
            missing.
    """
    if not {"time", "timeout_min"} & set(parameters):
        raise GDetKDError("--slurm has no time. Give the minutes of a job, such as --slurm time=240.")
    if several := [f"{key}={parameters[key]}" for key in ONE if parameters.get(key, 1) != 1]:
        raise GDetKDError(
            f"--slurm has {', '.join(several)}, but each training of a comparison is one process. Leave it out."
        )
    try:
        import submitit
    except ImportError as e:
        raise GDetKDError(
            f"--executor slurm needs the package submitit, which cannot be imported ({first_line(e)}). Install it with "
            "pip install submitit."
        ) from e
    try:
        executor = submitit.SlurmExecutor(folder=folder)
    except RuntimeError as e:
        raise GDetKDError(
            f"--executor slurm does not work here: {first_line(e)} Start the comparison on a machine from which you "
            "can submit jobs, or use --executor local."
        ) from e
    try:
        executor.update_parameters(**{"job_name": "gdetkd", **parameters})
    except (TypeError, ValueError) as e:
        raise GDetKDError(f"--slurm has a wrong parameter. {e}") from e
    described = ", ".join(f"{key}={value}" for key, value in parameters.items() if key not in NO_MACHINE)
    return ClusterExecutor(executor, jobs, f"SLURM ({described or 'default machines'})")


def parse_parameters(words: Sequence[str]) -> Dict[str, Any]:
    """Turn words such as "time=60" into parameters. A value that is a Python literal becomes that value.

    Raises:
        GDetKDError: a word is not of the form KEY=VALUE.
    """
    parameters = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key.isidentifier():
            raise GDetKDError(f"--slurm has {word!r}. Give KEY=VALUE, such as --slurm partition=gpu time=60.")
        try:
            parameters[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            parameters[key] = text
    return parameters
