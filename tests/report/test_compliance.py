"""MLPerf's compliance checker: run if it is installed, with the ruleset of the run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from report import compliance
from report.compliance import Compliance
from report.records import Run


def test_the_checker_is_run_if_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "unet3d.log"
    assert compliance.check(log) == Compliance(None, "not run: there is no unet3d.log")
    log.write_text("not an MLPerf log\n")
    refused = compliance.check(log)
    assert refused.accepted is False
    assert refused.complaints[0] == "Required EXACTLY_ONE occurrence of 'submission_org' but found 0"
    assert len(refused.complaints) == compliance.MAX_COMPLAINTS + 1
    assert re.fullmatch(r"and \d+ more", refused.complaints[-1])
    assert list(tmp_path.iterdir()) == [log]
    monkeypatch.setattr(compliance, "find_spec", lambda name: None)
    assert compliance.check(log).accepted is None
    assert "not installed" in compliance.check(log).summary


def test_the_checker_uses_the_ruleset_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Run(folder=tmp_path, config={"ruleset": name}).ruleset for name in ("3.0.0", "9", None)] == [
        "3.0.0",
        "4.0.0",
        "4.0.0",
    ]
    log = tmp_path / "unet3d.log"
    log.write_text("")
    commands: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, "", "SUCCESS")
    monkeypatch.setattr(compliance.subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert "ruleset 3.0.0" in compliance.check(log, "3.0.0").summary
    assert commands[0][commands[0].index("--ruleset") + 1] == "3.0.0"
