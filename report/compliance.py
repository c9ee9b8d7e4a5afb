"""What MLPerf's own compliance checker says of a log, if it is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from runtime.mlperf.rulesets import DEFAULT_RULESET

TIMEOUT_S = 60
# More of them say no more: a log that was cut off lacks a dozen keys.
MAX_COMPLAINTS = 8


@dataclass(frozen=True)
class Compliance:
    """`accepted` is None where nobody could say; `told` a sentence, `complaints` the checker's own lines."""

    accepted: bool | None
    told: str
    complaints: tuple[str, ...] = ()


def check(log: Path, ruleset: str = DEFAULT_RULESET) -> Compliance:
    """Runs `mlperf_logging.compliance_checker` on an MLPerf log, by the ruleset that it was written for."""
    if find_spec("mlperf_logging") is None:
        return Compliance(None, "not asked: it is not installed (pip install mlperf-logging)")
    if not log.is_file():
        return Compliance(None, f"not asked: there is no {log.name}")
    # It writes a log of its own, without the option into the current folder.
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", ruleset),
            *("--log_output", str(Path(folder) / "checked.log"), str(log)),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Compliance(None, f"could not be asked ({type(error).__name__})")
    said = done.stderr + done.stdout
    if done.returncode == 0 and "SUCCESS" in said:
        return Compliance(True, f"accepts the log (training, ruleset {ruleset})")
    if "FAILED" not in said:
        return Compliance(None, f"could not be asked (exit status {done.returncode})", tuple(said.splitlines()[-1:]))
    found = [line for line in map(_complaint, said.splitlines()) if line]
    more = (f"and {len(found) - MAX_COMPLAINTS} more",) if len(found) > MAX_COMPLAINTS else ()
    return Compliance(
        False, f"does not accept the log (training, ruleset {ruleset}):", (*found[:MAX_COMPLAINTS], *more)
    )


def _complaint(line: str) -> str:
    """A line of the checker's without its decoration; "" for one that is no complaint."""
    line = re.sub(r"^(WARNING|ERROR|INFO) -\s*", "", line).strip()
    is_noise = set(line) <= {"-"} or line.startswith(("Running compliance", "Compliance checks", "FAILED", "**"))
    return "" if is_noise else line
