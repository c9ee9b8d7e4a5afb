"""The files beside the packed code: how to set the system up, prepare the data, and repeat one run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.arguments import parse_arguments
from runtime.flag_fields import read_argument_file
from submission.record import INCIDENTAL_FLAGS, Series


def implementation_files(
    system: str, name: str, series: Series, values: Mapping[str, Any], *, arguments: Sequence[str]
) -> dict[str, str]:
    """Returns {file name: content}.

    Args:
        name: of the implementation.
        values: from the log of a run, by key.
        arguments: for main.py, as `packed_arguments` returns them.
    """
    flags = series.configuration
    command = shlex.join(without_paths(arguments))
    # The reader's python instead of the path to ours.
    launch = shlex.join(
        "python3" if number == 0 and "/python" in word else word for number, word in enumerate(series.launch)
    )
    description = {
        "system_desc_id": system,
        "implementation_id": name,
        "framework": f"PyTorch {flags.get('torch')}",
        "code_commit": flags.get("commit"),
        "ruleset": flags.get("ruleset"),
        "precision": f"16 bit where safe ({flags.get('amp_dtype')})" if flags.get("amp") else "fp32",
        "starting_weights": "PyTorch's default initialization, from the logged seed",
        "data_layout": flags.get("layout"),
        "hyperparameters": {key: values[key] for key in sorted(values) if key.startswith(("opt_", "global_"))},
        "arguments": command,
    }
    return {
        f"{system}_{name}.json": json.dumps(description, indent=2) + "\n",
        "README.md": _README.format(
            system=system, launch=launch, arguments=command, commit=flags.get("commit"), torch=flags.get("torch")
        ),
        "setup.sh": _SETUP,
        "init_datasets.sh": _DATA,
        "run_and_time.sh": _RUN.format(launch=launch, arguments=command),
    }


def packed_arguments(series: Series, project: Path, packed: Collection[str]) -> list[str]:
    """Returns the arguments of the series for the packed code, which lacks argument files that git does not track.

    Args:
        project: the folder in which main.py ran, and read the files.
        packed: paths of the packed files in it.

    Raises:
        UserError: a file that is not packed cannot be read, or its flags are not those of the runs any more.
    """
    arguments = with_files_replaced(series.arguments, project, packed)
    if arguments != series.arguments:
        _check_flags(series, with_files_replaced(series.arguments, project, ()))
    return arguments


def with_files_replaced(
    arguments: Sequence[str], project: Path, packed: Collection[str], *, outer: tuple[str, ...] = ()
) -> list[str]:
    """Returns the arguments with the content of each `@FILE` in its place, unless it and all that it names are packed.

    Args:
        outer: files that are being read.
    """
    replaced = []
    for argument in arguments:
        if not argument.startswith("@"):
            replaced.append(argument)
            continue
        name = os.path.relpath(project / argument[1:], project)
        if name in outer:
            raise UserError(f"argument file {argument[1:]} includes itself")
        try:
            content = read_argument_file(project / name)
        except OSError as error:
            raise UserError(
                f"the runs were started with {argument}, which cannot be read any more ({error.strerror}); restore it: "
                "the package needs its flags, and run.args in the folder of a run has them"
            ) from None
        flags = with_files_replaced(content, project, packed, outer=(*outer, name))
        replaced += [f"@{name}"] if name in packed and flags == content else flags
    return replaced


def _check_flags(series: Series, arguments: Sequence[str]) -> None:
    """Raises UserError if the arguments, read from files now, are not those of the runs."""
    ran = series.configuration
    config, _ = parse_arguments([*arguments, "--data_dir", str(ran.get("data_dir"))])
    now = json.loads(json.dumps(config.to_json()))
    compared = now.keys() & ran.keys() - {*INCIDENTAL_FLAGS, "data_dir"}
    if changes := [f"{name} {now[name]}, was {ran[name]}" for name in sorted(compared) if now[name] != ran[name]]:
        files = " ".join(argument for argument in series.arguments if argument.startswith("@"))
        raise UserError(f"{files}: changed since the runs: {'; '.join(changes)}; restore what the runs were made with")


def without_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments without `--data_dir`, which names a folder of the machine that ran."""
    kept, skip = [], False
    for argument in arguments:
        flag, separator, _ = argument.partition("=")
        if not skip and flag != "--data_dir":
            kept.append(argument)
        skip = not skip and flag == "--data_dir" and not separator
    return kept


_README = """# 3D U-Net on {system}
PyTorch {torch}, commit {commit}. The code is in the parent folder; its README.md explains it.
```
./setup.sh                                  # installs the packages pinned in requirements.txt into .venv
RAW=KITS19 DATA_DIR=DATA ./init_datasets.sh # preprocesses and verifies the 210 labelled cases of KiTS19
DATA_DIR=DATA LOG_DIR=LOGS ./run_and_time.sh
```
One run is
```
{launch} main.py {arguments} --data_dir DATA --log_dir LOGS --seed -1
```
and `python3 -m submission run` with these arguments makes the 40 runs of the result; see `docs/submission.md`.
Each run draws its seed from the system's entropy and logs it.
"""
_SETUP = """#!/usr/bin/env bash
# Installs the required packages into .venv beside the code.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install -r requirements.txt
"""
_DATA = """#!/usr/bin/env bash
# RAW=KITS19 DATA_DIR=DATA ./init_datasets.sh: preprocesses RAW/case_00000 … case_00209 and verifies MLPerf's MD5s.
set -euo pipefail
: "${RAW:?RAW is not set: the folder of the raw scans}" "${DATA_DIR:?DATA_DIR is not set: the folder for the volumes}"
RAW=$(realpath "$RAW") DATA_DIR=$(realpath -m "$DATA_DIR")
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python3 preprocess_dataset.py --data_dir "$RAW" --results_dir "$DATA_DIR"
python3 preprocess_dataset.py --results_dir "$DATA_DIR" --mode verify
"""
_RUN = """#!/usr/bin/env bash
# DATA_DIR=DATA LOG_DIR=LOGS ./run_and_time.sh: one timed run like those of the result; writes LOGS/unet3d.log.
set -euo pipefail
: "${{DATA_DIR:?DATA_DIR is not set: the folder that init_datasets.sh wrote}}" "${{LOG_DIR:?LOG_DIR is not set}}"
DATA_DIR=$(realpath -m "$DATA_DIR") LOG_DIR=$(realpath -m "$LOG_DIR")
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" CACHES_WERE_CLEARED=0
if sync && {{ echo 3 >/proc/sys/vm/drop_caches; }} 2>/dev/null; then
  export CACHES_WERE_CLEARED=1
fi
exec {launch} main.py {arguments} --data_dir "$DATA_DIR" --log_dir "$LOG_DIR" --seed -1
"""
