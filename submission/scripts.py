"""The files beside the packed code: how to set the system up, prepare the data, and repeat one run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from submission.record import Series


def implementation_files(system: str, name: str, series: Series, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns {file name: content}.

    Args:
        name: of the implementation.
        values: from the log of a run, by key.
    """
    flags = series.configuration
    arguments = shlex.join(without_paths(series.arguments))
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
        "arguments": arguments,
    }
    return {
        f"{system}_{name}.json": json.dumps(description, indent=2) + "\n",
        "README.md": _README.format(
            system=system, launch=launch, arguments=arguments, commit=flags.get("commit"), torch=flags.get("torch")
        ),
        "setup.sh": _SETUP,
        "init_datasets.sh": _DATA,
        "run_and_time.sh": _RUN.format(launch=launch, arguments=arguments),
    }


def without_paths(arguments: list[str]) -> list[str]:
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
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python3 preprocess_dataset.py --data_dir "$RAW" --results_dir "$DATA_DIR"
python3 preprocess_dataset.py --results_dir "$DATA_DIR" --mode verify
"""
_RUN = """#!/usr/bin/env bash
# DATA_DIR=DATA LOG_DIR=LOGS ./run_and_time.sh: one timed run like those of the result; writes LOGS/unet3d.log.
set -euo pipefail
: "${{DATA_DIR:?DATA_DIR is not set: the folder that init_datasets.sh wrote}}" "${{LOG_DIR:?LOG_DIR is not set}}"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" CACHES_WERE_CLEARED=0
if sync && {{ echo 3 >/proc/sys/vm/drop_caches; }} 2>/dev/null; then
  export CACHES_WERE_CLEARED=1
fi
exec {launch} main.py {arguments} --data_dir "$DATA_DIR" --log_dir "$LOG_DIR" --seed -1
"""
