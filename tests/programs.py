"""Runs the project's programs: in the test's process, or in processes forked from one that has imported torch.

A new interpreter needs two seconds to import torch, so tests start one only if it is their subject (`run_python`).
`call` is for what a program prints, writes and returns; `start` for several ranks, signals, and whatever may kill the
process. Both run the program as the command line would, `if __name__ == "__main__":` included.
"""

from __future__ import annotations

import builtins
import faulthandler
import gc
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
Completed = subprocess.CompletedProcess[str]
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
# Imported by the server once: the slow imports of training, evaluation, prediction and reports.
PRELOADED = (
    "tests.programs",
    "torch._dynamo",
    "runtime.run",
    "runtime.case_table",
    "prediction.predict",
    "report.write",
)
# pytest's filters of warnings, as a JSON list, which `tests/conftest.py` sets for the forked processes.
FILTERS_VARIABLE = "TESTS_WARNING_FILTERS"
# One thread per process: ranks that compete for cores take minutes instead of seconds.
THREADS = {"OMP_NUM_THREADS": "1"}
# Below Linux's range for connections (ip_local_port_range, from 32768).
PORTS = range(20_000, 32_000)
PORTS_OF_PROCESS = 50
_asked_ports = itertools.count()
# Not those that a test has changed when it starts the server.
SERVER_VARIABLES = {
    **os.environ,
    **THREADS,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def _execute(arguments: Sequence[str]) -> int:
    """Runs `python3 ARGUMENTS` (a script, `-m module` or `-c code`) in this process; returns the exit status."""
    sys.argv = list(arguments)
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            with _module_forgotten(arguments[1]):
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            module = ModuleType("__main__")
            with mock.patch.dict(sys.modules, {"__main__": module}):
                exec(compile(arguments[1], "<string>", "exec"), vars(module))
        else:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


@contextmanager
def _module_forgotten(name: str) -> Iterator[None]:
    """Removes a module that a test has imported from those that runpy sees, as in a new interpreter: it warns of it."""
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


# In this process


def call(*arguments: object, environment: Mapping[str, str] = NO_VARIABLES) -> Completed:
    """Runs `python3 ARGUMENTS` in this process and returns the exit status and what was printed.

    Restores what a program may change: random state, torch's settings, signal handlers, environment and folder.

    Raises:
        AssertionError: the program left a thread running.
    """
    threads = set(threading.enumerate())
    with tempfile.TemporaryDirectory() as folder, _process_restored(environment):
        paths = [Path(folder, name) for name in ("out", "err")]
        with _redirected(*paths):
            status = _execute(list(map(str, arguments)))
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"threads left running: {left}"
    return subprocess.CompletedProcess(list(map(str, arguments)), status, out, err)


@contextmanager
def _process_restored(environment: Mapping[str, str]) -> Iterator[None]:
    import numpy as np
    import torch
    from tqdm import tqdm

    backend = torch.backends.cudnn
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    flags = backend.benchmark, backend.deterministic, torch.are_deterministic_algorithms_enabled()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, folder, threads = sys.argv, os.getcwd(), torch.get_num_threads()
    try:
        # Without tqdm's own thread, which would outlive the program.
        with mock.patch.dict(os.environ, environment), mock.patch.object(tqdm, "monitor_interval", 0):
            os.chdir(ROOT)
            yield
    finally:
        sys.argv = argv
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        backend.benchmark, backend.deterministic = flags[:2]
        torch.use_deterministic_algorithms(flags[2])
        torch.set_num_threads(threads)
        faulthandler.enable(sys.__stderr__ or sys.stderr)  # main.py enabled it for a file that is closed now


@contextmanager
def _redirected(out: Path, err: Path) -> Iterator[None]:
    """Writes stdout and stderr, of libraries too, to files."""
    with out.open("w", encoding="utf-8") as stdout, err.open("w", encoding="utf-8") as stderr:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            with mock.patch.multiple(sys, stdout=stdout, stderr=stderr):
                yield
        finally:
            for stream in (stdout, stderr):
                stream.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


# In forked processes


class Started:
    """A program that runs in a forked process, with the interface of `subprocess.Popen`."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit status, -n after signal n, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()


def start(
    *arguments: object, out: Path, err: Path | None = None, environment: Mapping[str, str] = NO_VARIABLES
) -> Started:
    """Starts `python3 ARGUMENTS` in a forked process.

    Args:
        out, err: files that stdout and stderr are appended to; both to `out` by default.
        environment: variables in addition to this process's.
    """
    variables = {**os.environ, **THREADS, **environment}
    # Otherwise the program would start loader workers from a server of its own.
    method = multiprocessing.get_start_method()
    child = (list(map(str, arguments)), out, err or out, variables, method)
    process = _server().Process(target=_run_child, args=child)
    process.start()
    return Started(process)


def _server() -> multiprocessing.context.ForkServerContext:
    """Returns the context whose processes are forked from the server, which is started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, SERVER_VARIABLES, clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def _run_child(arguments: list[str], out: Path, err: Path, variables: dict[str, str], start_method: str) -> None:
    multiprocessing.set_start_method(start_method, force=True)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _filter_warnings(json.loads(variables.get(FILTERS_VARIABLE, "[]")))
    unraisable: list[Any] = []

    def report(problem: Any) -> None:
        unraisable.append(problem.exc_type)
        sys.__unraisablehook__(problem)

    sys.unraisablehook = report
    status = _execute(arguments)
    gc.collect()  # files that were not closed warn when they are collected, where an error cannot be raised
    sys.exit(status or bool(unraisable))


def filters_variable(*more: str) -> dict[str, str]:
    """Returns the variable that gives a started program pytest's filters of warnings and more of them."""
    return {FILTERS_VARIABLE: json.dumps([*json.loads(os.environ.get(FILTERS_VARIABLE, "[]")), *more])}


def _filter_warnings(filters: Sequence[str]) -> None:
    """Applies pytest's filters, "action:message:category:module"; the later ones have precedence."""
    for text in filters:
        action, message, category, module = [*text.split(":"), "", "", ""][:4]
        kind: Any = action
        warnings.filterwarnings(kind, message, getattr(builtins, category or "Warning"), module)


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """Returns the environment variables that torchrun would set for each rank."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(
    *arguments: object, ranks: int = 2, timeout_s: float = 120, environment: Mapping[str, str] = NO_VARIABLES
) -> list[Completed]:
    """Runs a program on several ranks and returns what each printed. Kills what is left after the timeout."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            start(
                *arguments,
                out=Path(folder, f"out_{rank}"),
                err=Path(folder, f"err_{rank}"),
                environment={**variables, **environment},
            )
            for rank, variables in enumerate(rank_variables(ranks))
        ]
        deadline = time.monotonic() + timeout_s
        try:
            statuses = [rank.wait(max(0.0, deadline - time.monotonic())) for rank in started]
        finally:
            for rank in started:
                rank.kill()
        command = list(map(str, arguments))
        return [
            subprocess.CompletedProcess(
                command, status, *(Path(folder, f"{name}_{rank}").read_text("utf-8") for name in ("out", "err"))
            )
            for rank, status in enumerate(statuses)
        ]


def free_port() -> int:
    """Returns a free port that no other program is likely to take before the caller's program listens on it.

    When Linux chooses a port itself, it takes none of `PORTS`. Processes start their search at different ports.
    """
    while True:
        port = PORTS[(PORTS_OF_PROCESS * os.getpid() + next(_asked_ports)) % len(PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
