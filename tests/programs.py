"""Run a program of this project as a user does, in a process of its own, without the seconds that its imports take."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, Optional

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300
# New processes are forked from a server that has made these imports. All tests share the server and this list: another
# call of set_forkserver_preload would replace it, and each process would make the imports again, for seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["gdetkd.engine.commands", "gdetkd.insight.page", "gdetkd.study.report", "gdetkd.labelling.run"]
)


def run_program(
    *arguments: Any, cwd: Path = ROOT, environment: Optional[Dict[str, str]] = None
) -> "subprocess.CompletedProcess[str]":
    """Run a Python file like `subprocess.run([sys.executable, *arguments])`, and return its exit code and its output.

    Args:
        arguments: the file, absolute or relative to `cwd`, and the program's arguments.
        environment: changes to this process's environment.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_run, args=(words, str(cwd), {**os.environ, **(environment or {})}, outputs))
        process.start()
        process.join(TIMEOUT_SECONDS)
        code = process.exitcode
        process.kill()
        stdout, stderr = (Path(output).read_text() for output in outputs)
    assert code is not None, f"{words} did not end. Its last output:\n{stderr[-2000:]}"
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def _run(words, cwd, environment, outputs):
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings.simplefilter("ignore")
    sys.argv = words
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name="__main__")
