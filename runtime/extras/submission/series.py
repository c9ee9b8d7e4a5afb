"""`submission run`: a result's runs one after another, each from scratch, with a seed and a log folder of its own."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from errors import DIVERGED_EXIT, USER_ERROR_EXIT, Interrupted, UserError, warn
from files import replacing
from runtime.arguments import PLACEHOLDER_ORG, RunConfig, parse_arguments
from runtime.environment import commit, platform_name
from runtime.extras.submission.inspection import digest_of, runs_folder
from runtime.extras.submission.logs import BENCHMARK, Log, read_log
from runtime.extras.submission.record import INCIDENTAL, Broken, Done, Series, load_series

PROJECT = Path(__file__).resolve().parents[3]
# What the series gives each run itself, or what makes one no run from scratch.
OWN_FLAGS = ("log_dir", "seed", "save_ckpt_path", "load_ckpt_path", "resume", "exec_mode", "benchmark")
CLEARED_VARIABLE = "CACHES_WERE_CLEARED"
# A run that was broken off is done again; one that breaks off again has a cause that a person must find.
ATTEMPTS = 2


def run(options: argparse.Namespace) -> int:
    """Makes the runs that are still to be made, and puts each log in its place."""
    config = check_arguments(options.arguments)
    launch = launcher(options.launch, options.nproc_per_node)
    system = options.system or default_system(options)
    folder = runs_folder(options.result_dir, system)
    results = options.result_dir / "results" / system / BENCHMARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--result_dir {options.result_dir}: cannot be written: {error.strerror}") from None
    configuration = configuration_of(config, launch)
    series = load_series(folder)
    if series is None:
        series = Series(system, list(options.arguments), launch, json.loads(json.dumps(configuration)))
    series.check_same(configuration)
    if series.runs:
        print(f"{len(series.runs)} of {options.runs} runs are done, in {folder}", flush=True)
    began, before = time.monotonic(), len(series.runs)
    while len(series.runs) < options.runs:
        done = _make_run(series, folder, options.clear_caches, options.runs)
        _put_in_place(folder / done.folder, results / f"result_{len(series.runs)}.txt")
        series.runs.append(done)
        series.save(folder)
        print(_progress(series, options.runs, (time.monotonic() - began) / (len(series.runs) - before)), flush=True)
    _mend_places(series, folder, results)
    return 0


def check_arguments(arguments: Sequence[str]) -> RunConfig:
    """The runs' configuration. Raises UserError for flags that a series cannot have, or that main.py would refuse."""
    config, own = parse_arguments(arguments)
    if refused := sorted(own & set(OWN_FLAGS)):
        raise UserError(f"--{refused[0]} does not go with a series: each run has its own folder and seed, and is whole")
    if config.submission_org == PLACEHOLDER_ORG:
        raise UserError("the runs' --submission_org is missing: who submits; 40 runs with a placeholder are no result")
    return config


def launcher(prefix: str | None, processes: int) -> list[str]:
    """What stands before main.py: python, torchrun for more processes than one, or what `--launch` says."""
    if prefix is not None:
        if processes > 1:
            raise UserError("--launch says itself how many processes there are; drop --nproc_per_node")
        try:
            words = shlex.split(prefix)
        except ValueError as error:
            raise UserError(f"--launch {prefix!r}: {error}") from None
        if not words:
            raise UserError("--launch is empty")
        return words
    if processes > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable]


def default_system(options: argparse.Namespace) -> str:
    """The system's name from its devices, such as 8xNVIDIA_H200. Raises UserError where only a person knows."""
    if options.launch is not None:
        raise UserError("--launch needs --system, the name of what it launches on, such as 4xDGX-H200")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return re.sub(r"[^\w.-]+", "_", platform_name(device, options.nproc_per_node)).strip("_.")


def configuration_of(config: RunConfig, launch: Sequence[str]) -> dict[str, Any]:
    """What all runs of a result must share: flags, code, library and launch."""
    flags = {name: value for name, value in config.to_json().items() if name not in INCIDENTAL}
    return flags | {"commit": commit(), "torch": torch.__version__, "launch": list(launch)}


def _make_run(series: Series, folder: Path, clear: str | None, total: int) -> Done:
    """One run to its end; one that is broken off is noted and done again from scratch."""
    name = f"run_{len(series.runs)}"
    if (folder / name).exists():  # this program was ended while the run was going
        _set_aside(series, folder, name, "the series was ended in it")
    for _ in range(ATTEMPTS):
        print(f"run {len(series.runs) + 1} of {total}: {folder / name / 'console.txt'}", flush=True)
        status = _launch(series, folder / name, _clear_caches(clear))
        log = _read(folder / name / "unet3d.log")
        why = _why_broken(status, log, series.seeds)
        if why is None and log is not None:
            if not series.environment:
                series.environment = _environment(folder / name)
            verdict = "success" if log.converged else "aborted"
            seed = int(log.values["seed"])
            return Done(name, seed, verdict, log.epochs, log.clock_ms, digest_of(log.path))
        aside = _set_aside(series, folder, name, str(why))
        if status == USER_ERROR_EXIT:
            raise UserError(f"the run was refused: {_last_line(aside / 'console.txt')}")
        warn(f"{name} {why}; see {aside / 'console.txt'}")
    raise UserError(f"{name} was broken off {ATTEMPTS} times, the last one: {series.broken[-1].why}; "
                    "mend the cause and start the series again: it goes on from here")  # fmt: skip


def _launch(series: Series, log_dir: Path, were_cleared: bool) -> int:
    """Runs main.py to its end, its console in a file; a signal to this program ends it first.

    Raises:
        UserError: the launcher cannot be started.
        Interrupted: this program was asked to leave.
    """
    log_dir.mkdir()
    command = [*series.launch, "main.py", *series.arguments, "--log_dir", str(log_dir), "--seed", "-1"]
    environment = {**os.environ, CLEARED_VARIABLE: str(int(were_cleared))}
    with (log_dir / "console.txt").open("wb") as console:
        try:
            process = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started: {error.strerror}") from None
        with _passing_on(process) as told:
            status = process.wait()
    if told:
        raise Interrupted(told[0])
    return status


class _passing_on:  # noqa: N801 - used like a function
    """SIGTERM and Ctrl-C go to the run alone, which ends in its own time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._told: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> list[int]:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on)
        return self._told

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        self._told.append(number)
        with suppress(OSError):  # it has just ended
            os.killpg(self._process.pid, signal.SIGTERM if len(self._told) < 2 else signal.SIGKILL)


def _clear_caches(command: str | None) -> bool:
    """Whether the command cleared the page cache; told where it was asked to and could not."""
    if command is None:
        return False
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        warn(f"the page cache could not be cleared ({done.stderr.strip()[-200:] or done.returncode}); the log says so")
    return done.returncode == 0


def _read(path: Path) -> Log | None:
    return read_log(path) if path.is_file() else None


def _why_broken(status: int, log: Log | None, used: set[int]) -> str | None:
    """Why this was no run of a result; None: it was one, converged or not."""
    if status not in (0, DIVERGED_EXIT):
        return f"ended with the exit status {status}"
    if log is None:
        return "left no unet3d.log"
    if log.problems:
        return f"left a log that is not whole: line {log.problems[0].line}: {log.problems[0].what}"
    if log.values["seed"] in used:
        return f"drew the seed {log.values['seed']}, which another run of this series had"
    return None


def _set_aside(series: Series, folder: Path, name: str, why: str) -> Path:
    """Keeps a broken run's folder under another name, and its seed in mind."""
    seed = None
    with suppress(OSError, UserError):
        log = _read(folder / name / "unet3d.log")
        seed = log.values.get("seed") if log else None
    number = 1 + len(series.broken)
    while (aside := folder / f"{name}.broken_{number}").exists():
        number += 1
    (folder / name).rename(aside)
    series.broken.append(Broken(aside.name, seed if isinstance(seed, int) else None, why))
    series.save(folder)
    return aside


def _environment(log_dir: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return dict(json.loads((log_dir / "run.json").read_text(encoding="utf-8"))["environment"])
    return {}


def _put_in_place(log_dir: Path, result: Path) -> None:
    try:
        with replacing(result) as temporary:
            shutil.copyfile(log_dir / "unet3d.log", temporary)
    except OSError as error:
        raise UserError(f"{result}: cannot be written: {error.strerror or error}") from None


def _mend_places(series: Series, folder: Path, results: Path) -> None:
    """Puts logs in place that are not: a series may have been ended between a run and its copy."""
    for number, done in enumerate(series.runs):
        if not (results / f"result_{number}.txt").exists():
            _put_in_place(folder / done.folder, results / f"result_{number}.txt")


def _progress(series: Series, total: int, seconds_a_run: float) -> str:
    done = series.runs[-1]
    left = total - len(series.runs)
    told = (
        f"run {len(series.runs)} of {total}: {done.status} after {done.epochs} epochs, {done.clock_ms / 60_000:.2f} min"
    )
    return f"{told}, seed {done.seed}" + (
        f"; about {timedelta(seconds=round(left * seconds_a_run))} left" if left else ""
    )


def _last_line(console: Path) -> str:
    with suppress(OSError, IndexError):
        return console.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    return "its console is empty"
