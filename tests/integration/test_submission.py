"""A submission from the command line to the packed tree, on a tiny data set with as many cases as KiTS19.

One run per ruleset is real and trains to 0.908 with main.py; the others reuse its log with another seed, because a run
takes longer to start than to train. `python3 -m tests.submission.acceptance` makes all 40.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from submission.__main__ import main
from submission.logs import read_log
from tests.integration.conftest import PROJECT
from tests.submission.synthetic_runs import TINY_RUN, write_blocks

STUB = PROJECT / "tests" / "submission" / "stub.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    write_blocks(folder, (PROJECT / "evaluation_cases.txt").read_text(encoding="utf-8").split())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("ruleset", "unit"), [("3.0.0", 1), ("4.0.0", 168)])
def test_mlperfs_checkers_accept_forty_packed_runs(
    ruleset: str, unit: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps({"template": None, "runs": [{"real": True}]}))
    result_dir = tmp_path / "ACME"
    launch = shlex.join([sys.executable, str(STUB), str(orders)])
    options = ["--result_dir", str(result_dir), "--system", "abacus"]
    arguments = [*TINY_RUN, "--data_dir", str(data), "--submission_org", "ACME", "--ruleset", ruleset]
    assert main(["run", *options, "--launch", launch, "--", *arguments]) == 0
    first = read_log(result_dir / "results" / "abacus" / "unet3d" / "result_0.txt")
    assert first.problems == []
    assert first.converged
    assert first.evaluations[-1][1] >= 0.908
    assert (first.values["train_samples"], first.values["eval_samples"]) == (168, 42)
    assert first.unit == unit
    assert "not MLPerf's" not in " ".join(first.rule_violations), "168 and 42 cases with KiTS19's numbers"
    capsys.readouterr()

    assert main(["pack", *options, "--ruleset", ruleset]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("pass", "FAIL"))] == [
        ["pass", "compliance"],
        ["pass", "RCP"],
        ["pass", "system"],
        ["pass", "package"],
    ]
    assert (result_dir / "benchmarks" / "unet3d" / "implementations" / "pytorch" / "main.py").is_file()
    assert main(["score", *options, "--ruleset", ruleset]) == 0
    assert "(open division: not scaled)" in capsys.readouterr().out
