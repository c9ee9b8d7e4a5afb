"""`submission pack`: from the runs to the tree that MLPerf takes; none where anything is wrong with them."""

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
    compare,
    inspect,
    read_results,
    results_folder,
    runs_folder,
)
from submission.logs import BENCHMARK, Log, Problem
from submission.record import Series, load_series
from submission.score import print_problems
from submission.system import describe_system, gaps, read_given

PROJECT = Path(__file__).resolve().parents[1]
TEMPLATE = "system_description.json"


def run(options: argparse.Namespace) -> int:
    """Packs what the runs left; 1 where something is wrong with them or a checker refuses the tree."""
    folder = results_folder(options.result_dir, options.system)
    system = folder.parent.name
    own = runs_folder(options.result_dir, system)
    series = load_series(own)
    if series is None:
        raise UserError(f"{own}: no series.json in it; what is packed must be made by `submission run`")
    given = read_given(options.system_description)
    logs, strange = read_results(folder)
    recorded = {f"result_{number}.txt": done.sha256 for number, done in enumerate(series.runs)}
    originals = {f"result_{number}.txt": own / done.folder / "unet3d.log" for number, done in enumerate(series.runs)}
    changed = compare(logs, recorded, originals)
    if problems := [*strange, *inspect(logs, options.ruleset), *changed, *_other_ruleset(series, own, options.ruleset)]:
        print_problems(problems)
        return 1
    nodes = options.nodes or ("1" if options.nodes is None and not _is_launched(series) else "")
    description = describe_system(logs[0].values, system, series.environment, nodes, given)
    with tempfile.TemporaryDirectory(prefix=".pack.", dir=options.result_dir.resolve().parent) as staged:
        tree = Path(staged) / options.result_dir.resolve().name
        _stage(tree, folder, system, options.implementation, description, series, logs[0])
        verdicts = checkers.ask_all(tree, system, options.ruleset, logs[0].is_closed)
        print(checkers.format_verdicts(verdicts), flush=True)
        if refused := [verdict.checker for verdict in verdicts if not verdict.accepted]:
            logger.info(f"not packed: refused by MLPerf's checker of {', '.join(refused)}")
            return 1
        _move(tree, options.result_dir, [Path("systems") / f"{system}.json", implementation(options.implementation)])
    _tell(options.result_dir, own, series, logs, description, given)
    return 0


def implementation(name: str) -> Path:
    return Path("benchmarks") / BENCHMARK / "implementations" / name


def _is_launched(series: Series) -> bool:
    """Whether something else than this machine's python or its torchrun started the runs."""
    return series.launch[1:3] not in ([], ["-m", "torch.distributed.run"])


def _other_ruleset(series: Series, own: Path, ruleset: str) -> list[Problem]:
    logged = series.configuration.get("ruleset")
    if logged == ruleset:
        return []
    return [Problem(own / "series.json", 0, f"the runs were made for ruleset {logged}, not {ruleset}")]


def _stage(
    tree: Path, folder: Path, system: str, name: str, description: Mapping[str, Any], series: Series, log: Log
) -> None:
    """Writes the whole tree, results included, where nothing else is."""
    try:
        shutil.copytree(folder, tree / "results" / system / BENCHMARK, ignore=shutil.ignore_patterns("scaling.json"))
        (tree / "systems").mkdir()
        (tree / "systems" / f"{system}.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        code = tree / implementation(name)
        copy_code(PROJECT, code)
        (code / system).mkdir()
        hyperparameters = {key: log.values[key] for key in sorted(log.values) if key.startswith(("opt_", "global_"))}
        content = scripts.implementation_json(system, name, series, hyperparameters)
        (code / system / f"{system}_{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file, text in scripts.texts(system, series).items():
            path = code / system / file
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    except OSError as error:
        raise UserError(f"{tree.parent}: cannot be written: {error.strerror or error}") from None


def copy_code(project: Path, target: Path) -> None:
    """Copies the files that git tracks, as they are now.

    Raises:
        UserError: the project is no git checkout: nobody could tell code from data.
        OSError: a file cannot be read or written.
    """
    command = ["git", "-C", str(project), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"{project}: no git checkout; pack from one, since what git tracks is the code") from None
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (project / name).is_file():  # else deleted and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, target / name)


def _move(tree: Path, result_dir: Path, parts: Sequence[Path]) -> None:
    """Puts what was staged in place of what an earlier packing left."""
    try:
        for part in parts:
            target = result_dir / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(tree / part, target)
    except OSError as error:
        raise UserError(f"--result_dir {result_dir}: cannot be written: {error.strerror or error}") from None


def _tell(
    result_dir: Path,
    own: Path,
    series: Series,
    logs: Sequence[Log],
    description: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """What was packed, what a reviewer would ask, and what is still to be filled in."""
    uncleared = sum(not log.values["cache_clear"] for log in logs)
    notes = [f"the page cache was not cleared before {uncleared} of {len(logs)} runs; the rules ask for it"] * bool(
        uncleared
    )
    if series.broken:
        notes.append(
            f"{len(series.broken)} run(s) were broken off and made again: {series.broken[0].why}"
            + (", …" if len(series.broken) > 1 else "")
        )
    ran, now = series.configuration.get("commit"), commit()
    if ran != now or "+changes" in str(now):
        notes.append(f"the runs were made by commit {ran}, the packed code is {now}")
    for note in notes:
        print(f"warning: {note}")
    if empty := gaps(description):
        template = own / TEMPLATE
        form = dict.fromkeys(empty, "") | dict(given)  # what a person has filled in there stays
        with replacing(template) as temporary:
            temporary.write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")
        print("only a person knows:\n" + "\n".join(f"      {key}" for key in empty))
        print(
            f"packed, but for these {len(empty)}: fill in {template} and pack again with --system_description "
            f"{shlex.quote(str(template))}",
            flush=True,
        )
    else:
        logger.info(f"packed: {result_dir}")
