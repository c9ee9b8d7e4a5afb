"""`submission pack`: turns the runs into the tree that MLPerf accepts; writes none if anything is wrong with them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replacing
from common.messages import logger
from runtime.environment import commit
from submission import checkers, scripts
from submission.inspection import (
    SCALING_FILE,
    find_changed_logs,
    find_mixed_data,
    find_problems,
    read_results,
    results_folder,
    runs_folder,
)
from submission.logs import BENCHMARK, Log, Problem
from submission.record import NAME, Series, load_series
from submission.score import print_problems
from submission.system import describe_system, missing_keys, read_user_description

PROJECT = Path(__file__).resolve().parents[1]
TEMPLATE = "system_description.json"


def run(options: argparse.Namespace) -> int:
    """Packs the runs; returns 1 if something is wrong with them or a checker rejects the tree."""
    results = results_folder(options.result_dir, options.system)
    system = results.parent.name
    folder = runs_folder(options.result_dir, system)
    series = load_series(folder)
    if series is None:
        raise UserError(f"{folder}: no {NAME} in it; only runs made by `submission run` can be packed")
    user = read_user_description(options.system_description)
    logs, problems = read_results(results)
    problems += find_problems(logs, options.ruleset)
    written = {
        f"result_{number}.txt": (folder / done.folder / "unet3d.log", done.sha256)
        for number, done in enumerate(series.runs)
    }
    problems += find_changed_logs(logs, written)
    problems += find_mixed_data(
        logs, {f"result_{number}.txt": done.data_digest for number, done in enumerate(series.runs)}
    )
    if (logged := series.configuration.get("ruleset")) != options.ruleset:
        problems.append(Problem(folder / NAME, 0, f"the runs were made for ruleset {logged}, not {options.ruleset}"))
    if problems:
        print_problems(problems)
        return 1
    values, name = logs[0].values, options.implementation
    arguments = scripts.packed_arguments(series, PROJECT, tracked_files(PROJECT))
    nodes = options.nodes or ("1" if options.nodes is None and _runs_locally(series) else "")
    description = describe_system(values, system=system, environment=series.environment, nodes=nodes) | user
    with tempfile.TemporaryDirectory(prefix=".pack.", dir=options.result_dir.resolve().parent) as staged:
        tree = Path(staged) / options.result_dir.resolve().name
        code = Path("benchmarks") / BENCHMARK / "implementations" / name
        files = {Path("systems") / f"{system}.json": json.dumps(description, indent=2) + "\n"}
        for file, text in scripts.implementation_files(system, name, series, values, arguments=arguments).items():
            files[code / system / file] = text
        _stage(tree, results, code, files)
        verdicts = checkers.check_all(tree, system, options.ruleset, logs[0].is_closed)
        print(checkers.format_verdicts(verdicts), flush=True)
        if rejected := [verdict.checker for verdict in verdicts if not verdict.accepted]:
            logger.info(f"not packed: rejected by MLPerf's checker: {', '.join(rejected)}")
            return 1
        _move(tree, options.result_dir, [Path("systems") / f"{system}.json", code])
    for warning in _warnings(series, logs):
        print(f"warning: {warning}")
    if missing := missing_keys(description):
        _request_missing(missing, user, folder / TEMPLATE)
    else:
        logger.info(f"packed: {options.result_dir}")
    return 0


def _runs_locally(series: Series) -> bool:
    """Whether python or torchrun on this machine started the runs, not a `--launch` command."""
    return series.launch[1:3] in ([], ["-m", "launch.torchrun"], ["-m", "torch.distributed.run"])


def _stage(tree: Path, results: Path, code: Path, files: Mapping[Path, str]) -> None:
    """Writes the whole tree, results included, into an empty folder.

    Args:
        tree: the folder.
        results: the logs.
        code: path in the tree for the files of the project.
        files: texts by path in the tree.
    """
    logs = tree / "results" / results.parent.name / BENCHMARK
    shutil.copytree(results, logs, ignore=shutil.ignore_patterns(SCALING_FILE))
    copy_code(PROJECT, tree / code)
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)


def tracked_files(project: Path) -> list[str]:
    """Returns the paths of the files that git tracks and that still exist.

    Raises:
        UserError: the project is not a git checkout, so code and data cannot be distinguished.
    """
    command = ["git", "-C", str(project), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"{project}: not a git checkout; only files tracked by git are packed") from None
    names = filter(None, os.fsdecode(listed).split("\0"))
    return [name for name in names if (project / name).is_file()]  # others are deleted, but not committed yet


def copy_code(project: Path, target: Path) -> None:
    """Copies the files that git tracks, as they are now.

    Raises:
        UserError: the project is not a git checkout.
        OSError: a file cannot be read or written.
    """
    for name in tracked_files(project):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(project / name, target / name)


def _move(tree: Path, result_dir: Path, parts: Sequence[Path]) -> None:
    """Moves parts of the staged tree into the result folder, replacing those of an earlier packing."""
    for part in parts:
        target = result_dir / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(tree / part, target)


def _warnings(series: Series, logs: Sequence[Log]) -> list[str]:
    """Returns what a reviewer would ask about."""
    warnings = []
    if uncleared := sum(not log.values["cache_clear"] for log in logs):
        warnings.append(f"the page cache was not cleared before {uncleared} of {len(logs)} runs; the rules require it")
    if series.broken:
        more = ", …" if len(series.broken) > 1 else ""
        warnings.append(f"{len(series.broken)} run(s) failed and were repeated: {series.broken[0].why}{more}")
    ran, now = series.configuration.get("commit"), commit()
    if ran != now or "+changes" in str(now):
        warnings.append(f"the runs were made with commit {ran}, the packed code is {now}")
    return warnings


def _request_missing(missing: Sequence[str], user: Mapping[str, Any], template: Path) -> None:
    """Lists the properties that could not be detected, and writes a file to fill in."""
    content = dict.fromkeys(missing, "") | dict(user)  # keeps the values already filled in
    with replacing(template) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("could not be detected:\n" + "\n".join(f"      {key}" for key in missing))
    print(
        f"packed, except for these {len(missing)}: fill in {template} and pack again with --system_description "
        f"{shlex.quote(str(template))}",
        flush=True,
    )
