"""Runs MLPerf's compliance checker on a log, if it is installed."""

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
# More add nothing: a truncated log lacks a dozen keys.
MAX_COMPLAINTS = 8


@dataclass(frozen=True)
class Compliance:
    """Result of the compliance checker.

    Attributes:
        accepted: None if the checker could not be run.
        summary: a phrase for the page.
        complaints: the checker's own lines.
    """

    accepted: bool | None
    summary: str
    complaints: tuple[str, ...] = ()


def check(log: Path, ruleset: str = DEFAULT_RULESET) -> Compliance:
    """Runs `mlperf_logging.compliance_checker` on an MLPerf log, with the ruleset that the run followed."""
    if find_spec("mlperf_logging") is None:
        return Compliance(None, "not run: not installed (pip install mlperf-logging)")
    if not log.is_file():
        return Compliance(None, f"not run: there is no {log.name}")
    # The checker writes a log of its own, into the current folder unless it is given a path.
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
            return Compliance(None, f"could not be run ({type(error).__name__})")
    output = done.stderr + done.stdout
    if done.returncode == 0 and "SUCCESS" in output:
        return Compliance(True, f"accepts the log (training, ruleset {ruleset})")
    if "FAILED" not in output:
        return Compliance(None, f"could not be run (exit status {done.returncode})", tuple(output.splitlines()[-1:]))
    complaints = [line for line in map(_complaint, output.splitlines()) if line]
    more = (f"and {len(complaints) - MAX_COMPLAINTS} more",) if len(complaints) > MAX_COMPLAINTS else ()
    summary = f"does not accept the log (training, ruleset {ruleset}):"
    return Compliance(False, summary, (*complaints[:MAX_COMPLAINTS], *more))


def _complaint(line: str) -> str:
    """Returns a line of the checker's output without its decoration, or "" if it is not a complaint."""
    line = re.sub(r"^(WARNING|ERROR|INFO) -\s*", "", line).strip()
    is_noise = set(line) <= {"-"} or line.startswith(("Running compliance", "Compliance checks", "FAILED", "**"))
    return "" if is_noise else line
