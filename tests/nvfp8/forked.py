"""`python <arguments>` without the imports that most need, 3 to 4 s of CPU time: forked from a process that has made them.

That process is `multiprocessing`'s fork server, one for all tests of a worker. What is forked from it has arguments, environment,
output, signals and a status of its own, like a Python that was just started; but the interpreter is not taken down at its end.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# None of them looks for a GPU when it is imported, or defines a Triton kernel.
IMPORTS = ["pytest", "nanochat.train", "torch._dynamo", "torch.distributed.checkpoint"]


def _run(arguments: Sequence[str], environment: Mapping[str, str], out: str, error: str) -> None:
    for path, descriptor in ((out, 1), (error, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


class Forked:
    """As much of `subprocess.Popen`, with text, as tests use."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            forkserver.ensure_running()
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        self._process = context.Process(target=_run, args=(list(arguments), dict(environment), *names))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> Iterator[str]:
        """Lines as they come; the rest is left to `communicate`."""
        while True:
            ended = self.returncode is not None
            if line := self._files[0].readline():
                yield line
            elif ended:
                return
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        out, error = (file.read() for file in self._files)
        return out, error


def start(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str] | Forked":
    """Start `python <arguments>`: forked where there is no GPU, for CUDA does not survive a fork."""
    if torch.cuda.is_available():
        command, pipe = [sys.executable, *arguments], subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    return Forked(arguments, environment)


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    process = start(arguments, environment)
    out, error = process.communicate(timeout=300)
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, error)
