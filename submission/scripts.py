"""The texts beside the packed code: how to set the system up, make its data, and repeat one run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from submission.record import Series

# What names a path of the machine that ran: its reader has others.
PATHS = ("--data_dir",)


def implementation_json(system: str, name: str, series: Series, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """SYSTEM_IMPL.json: what of the implementation the logs do not say."""
    flags = series.configuration
    return {
        "system_desc_id": system,
        "implementation_id": name,
        "framework": f"PyTorch {flags.get('torch')}",
        "code_commit": flags.get("commit"),
        "ruleset": flags.get("ruleset"),
        "precision": f"16 bit where safe ({flags.get('amp_dtype')})" if flags.get("amp") else "fp32",
        "starting_weights": "PyTorch's default initialisation, from the logged seed",
        "data_layout": flags.get("layout"),
        "hyperparameters": dict(hyperparameters),
        "arguments": shlex.join(portable(series.arguments)),
    }


def portable(arguments: list[str]) -> list[str]:
    """The arguments without the paths of the machine that ran."""
    kept, skip = [], False
    for argument in arguments:
        flag, sign, _ = argument.partition("=")
        if not skip and flag not in PATHS:
            kept.append(argument)
        skip = not skip and flag in PATHS and not sign
    return kept


def texts(system: str, series: Series) -> dict[str, str]:
    """{file name: content}."""
    return {
        "README.md": _README.format(
            system=system,
            launch=_launch(series),
            arguments=shlex.join(portable(series.arguments)),
            commit=series.configuration.get("commit"),
            torch=series.configuration.get("torch"),
        ),
        "setup.sh": _SETUP,
        "init_datasets.sh": _DATA,
        "run_and_time.sh": _RUN.format(launch=_launch(series), arguments=shlex.join(portable(series.arguments))),
    }


def _launch(series: Series) -> str:
    """The words before main.py, with the reader's python in place of ours."""
    words = ["python3" if number == 0 and "/python" in word else word for number, word in enumerate(series.launch)]
    return shlex.join(words)


_README = """# 3D U-Net on {system}
PyTorch {torch}, commit {commit}. The code is in the folder above; its README.md explains it.
```
./setup.sh                                  # the packages that requirements.txt pins, into .venv
RAW=KITS19 DATA_DIR=DATA ./init_datasets.sh # the 210 labelled cases of KiTS19 to training volumes, verified
DATA_DIR=DATA LOG_DIR=LOGS ./run_and_time.sh
```
One run is
```
{launch} main.py {arguments} --data_dir DATA --log_dir LOGS --seed -1
```
and the result's forty are `python3 -m submission run` with these arguments; see `docs/submission.md`.
Each run draws its seed from the system's entropy and logs it.
"""
_SETUP = """#!/usr/bin/env bash
# Installs what the code needs into .venv beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install -r requirements.txt
"""
_DATA = """#!/usr/bin/env bash
# RAW=KITS19 DATA_DIR=DATA ./init_datasets.sh: preprocesses RAW/case_00000 … case_00209 and verifies MLPerf's digests.
set -euo pipefail
: "${RAW:?RAW is not set: the folder of the raw scans}" "${DATA_DIR:?DATA_DIR is not set: where volumes go}"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python3 preprocess_dataset.py --data_dir "$RAW" --results_dir "$DATA_DIR"
python3 preprocess_dataset.py --results_dir "$DATA_DIR" --mode verify
"""
_RUN = """#!/usr/bin/env bash
# DATA_DIR=DATA LOG_DIR=LOGS ./run_and_time.sh: one timed run as those of the result; LOGS/unet3d.log is its log.
set -euo pipefail
: "${{DATA_DIR:?DATA_DIR is not set: the folder that init_datasets.sh wrote}}" "${{LOG_DIR:?LOG_DIR is not set}}"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" CACHES_WERE_CLEARED=0
if sync && {{ echo 3 >/proc/sys/vm/drop_caches; }} 2>/dev/null; then
  export CACHES_WERE_CLEARED=1
fi
exec {launch} main.py {arguments} --data_dir "$DATA_DIR" --log_dir "$LOG_DIR" --seed -1
"""
