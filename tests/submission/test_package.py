"""Packing: the tree, MLPerf's checkers, and that nothing is packed if a run is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from submission import checkers, package, scripts
from submission.__main__ import main
from submission.record import load_series
from submission.system import KEYS, describe_system, missing_keys, read_user_description
from tests.submission.conftest import Bench, WriteRun, edit, set_value

CODE = Path("benchmarks/unet3d/implementations/pytorch")


@pytest.fixture(autouse=True)
def _small_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A project of two files instead of this one's hundreds."""
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "main.py").write_text("print('training')\n")
    (project / "model" / "unet3d.py").write_text("")
    (project / "data.npy").write_text("not code")
    for command in (["init", "-q"], ["add", "main.py", "model"]):
        subprocess.run(["git", "-C", str(project), *command], check=True)
    monkeypatch.setattr(package, "PROJECT", project)


def pack(bench: Bench, *options: str) -> int:
    return main(["pack", "--result_dir", str(bench.result_dir), *options])


@pytest.fixture
def _accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the checkers, which take two seconds; other tests run them."""
    monkeypatch.setattr(checkers, "check_all", lambda *_: [])


def packed(bench: Bench) -> list[Path]:
    return [path for path in bench.result_dir.iterdir() if path.name != "results"]


def test_the_checkers_accept_the_tree(copied: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(copied) == 0
    out = capsys.readouterr().out
    verdicts = [line.split()[:2] for line in out.splitlines()[:6] if not line.startswith(" ")]
    assert verdicts == [["pass", "compliance"], ["pass", "RCP"], ["pass", "system"], ["pass", "package"]]
    assert "not required in the open division; the checker's verdict:" in out
    tree = copied.result_dir
    assert sorted(path.name for path in tree.iterdir()) == ["benchmarks", "results", "systems"]
    code = tree / CODE
    assert sorted(path.name for path in code.iterdir()) == ["abacus", "main.py", "model"], "only what git tracks"
    assert sorted(path.name for path in (code / "abacus").iterdir()) == [
        "README.md",
        "abacus_pytorch.json",
        "init_datasets.sh",
        "run_and_time.sh",
        "setup.sh",
    ]
    for script in (code / "abacus").glob("*.sh"):
        assert script.stat().st_mode & stat.S_IXUSR
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    run = (code / "abacus" / "run_and_time.sh").read_text()
    assert '--overlap 0.25 --submission_org ACME --batch_size 28 --data_dir "$DATA_DIR"' in run
    assert run.index("DATA_DIR=$(realpath") < run.index("cd "), "paths are relative to the caller's folder"
    stand_in = copied.result_dir.parent / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    prepared = subprocess.run(
        [code / "abacus" / "init_datasets.sh"],
        cwd=code,
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "RAW": "abacus", "DATA_DIR": "made/data"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--data_dir {code / 'abacus'} --results_dir {code / 'made/data'}\n" in prepared.stdout
    content = json.loads((code / "abacus" / "abacus_pytorch.json").read_text())
    assert content["hyperparameters"]["global_batch_size"] == 28
    assert len(list((tree / "results" / "abacus" / "unet3d").iterdir())) == 40
    assert not list(tree.parent.glob(".pack.*"))


@pytest.mark.usefixtures("_accepted")
def test_missing_properties_are_listed_and_filled_in(
    copied: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(copied) == 0
    out = capsys.readouterr().out
    template = copied.runs / "system_description.json"
    empty = list(json.loads(template.read_text()))
    assert f"packed, except for these {len(empty)}" in out
    assert {"cooling", "number_of_nodes", "host_networking_topology"} <= set(empty)
    filled = tmp_path / "filled.json"
    template.write_text(json.dumps(dict.fromkeys(empty, "") | {"cooling": "air"}))
    assert pack(copied, "--system_description", str(template)) == 0
    assert json.loads(template.read_text()) == dict.fromkeys(empty, "") | {"cooling": "air"}, "what was filled in stays"
    capsys.readouterr()
    filled.write_text(json.dumps({key: f"some {key}" for key in empty}))
    assert pack(copied, "--system_description", str(filled), "--nodes", "2") == 0
    assert capsys.readouterr().out.endswith(f"packed: {copied.result_dir}\n")
    system = json.loads((copied.result_dir / "systems" / "abacus.json").read_text())
    assert list(system) == list(KEYS)
    assert system["cooling"] == "some cooling"
    assert (system["submitter"], system["division"], system["status"]) == ("ACME", "open", "Available on-premise")
    assert system["accelerators_per_node"] == "0"


@pytest.mark.usefixtures("_accepted")
def test_packing_again_replaces_the_previous_package(copied: Bench) -> None:
    assert pack(copied) == 0
    stale = copied.result_dir / CODE / "stale.py"
    stale.write_text("")
    assert pack(copied) == 0
    assert not stale.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "result_39.txt").unlink(), "unet3d: 39 runs, not 40: result_39.txt missing"),
        (lambda folder: edit(folder / "result_1.txt", "opt_momentum", set_value(0.5)), "another configuration"),
        (
            lambda folder: edit(folder / "result_1.txt", "eval_accuracy", set_value(0.99), -1),
            "differs from what the run wrote",
        ),
        (lambda folder: (folder / "result_2.txt").write_text(":::MLLOG {"), "result_2.txt:1: a damaged line"),
        (
            lambda folder: (folder / "result_3.txt").write_bytes((folder / "result_2.txt").read_bytes()),
            "the same seed ",
        ),
        (lambda folder: (folder / "scan.nii").write_text(""), "scan.nii: not a result"),
    ],
)
def test_nothing_is_packed_if_a_run_is_wrong(
    spoil: Callable[[Path], Any], message: str, copied: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copied.results)
    assert pack(copied) == 1
    out = capsys.readouterr().out
    assert message in out
    assert "no result\n" in out
    assert packed(copied) == []


def test_nothing_is_packed_that_a_checker_rejects(
    copied: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object) -> checkers.Verdict:
        raise KeyError("a bug")

    monkeypatch.setattr(checkers, "check_system", crash)
    assert pack(copied) == 1
    out = capsys.readouterr().out
    assert "FAIL  system      the checker failed: KeyError: 'a bug'" in out
    assert out.endswith("not packed: rejected by MLPerf's checker: system\n")
    assert packed(copied) == []


def test_only_a_series_is_packed_and_by_its_ruleset(copied: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(copied, "--ruleset", "3.0.0") == 1
    assert "the runs were made for ruleset 4.0.0, not 3.0.0" in capsys.readouterr().out
    (copied.runs / "series.json").unlink()
    with pytest.raises(UserError, match=r"no series\.json in it"):
        pack(copied)
    assert packed(copied) == []


def test_packing_requires_a_git_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a git checkout"):
        package.copy_code(tmp_path / "nowhere", tmp_path / "copy")


@pytest.mark.usefixtures("_accepted")
def test_failed_runs_and_warm_caches_are_reported(copied: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied.runs / "series.json"
    content = json.loads(path.read_text())
    content["broken"] = [{"folder": "run_1.broken_1", "seed": 1, "why": "a power cut"}]
    path.write_text(json.dumps(content))
    assert pack(copied) == 0
    out = capsys.readouterr().out
    assert "warning: the page cache was not cleared before 40 of 40 runs" in out
    assert "warning: 1 run(s) failed and were repeated: a power cut" in out


# MLPerf's checkers


def test_a_complaint_of_the_compliance_checker_has_file_and_line(made: Bench, tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"result_{number}.txt"
        path.write_bytes((made.results / path.name).read_bytes())
        line = edit(path, "submission_status", set_value('"lab"'))
    verdict = checkers.check_compliance(tmp_path, "4.0.0")
    assert not verdict.accepted
    assert verdict.messages[0] == "5 logs fail"
    assert verdict.messages[1].startswith(f"result_0.txt:{line}: CHECK for 'submission_status' failed")
    (tmp_path / "result_4.txt").unlink()
    assert checkers.check_compliance(tmp_path, "4.0.0").accepted, "as many as may miss the target"


@pytest.mark.parametrize(("epochs", "passes"), [(2100, True), (1900, True), (1880, False)])
def test_the_rcp_checker_counts_as_the_ruleset_does(
    epochs: int, passes: bool, tmp_path: Path, write_open: WriteRun
) -> None:
    """Batch 28: 1,894 epochs of 168 samples are the least accepted. The checker reads only a log's last evaluation."""
    first = write_open(tmp_path / "result_0.txt", seed=1)
    text = first.read_text().replace('"epoch_num": 672', f'"epoch_num": {168 * epochs}')
    for number in range(40):
        (tmp_path / f"result_{number}.txt").write_text(text)
    verdict = checkers.check_convergence(tmp_path, "4.0.0")
    assert verdict.accepted is passes
    assert verdict.messages[0] == "RCP found"
    assert any("normalized" in line for line in verdict.messages) is (epochs == 1900)


def test_the_system_checker_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "abacus.json"
    path.write_text(json.dumps({"system_name": "abacus"}))
    verdict = checkers.check_system(path, "4.0.0")
    assert not verdict.accepted
    assert "Missing field submitter" in " ".join(verdict.messages)


# The system description


VALUES = {"submission_org": "ACME", "submission_division": "closed", "submission_status": "cloud"}


def test_hardware_is_described_only_for_the_machine_that_ran() -> None:
    """For runs on another processor nothing detected here is used, and of the GPUs only what the runs recorded."""
    environment = {"cpu": "another", "torch": "2.13.0", "device": "NVIDIA H200", "ranks": 16, "system": "Linux"}
    description = describe_system(VALUES, system="big", environment=environment, nodes="2")
    assert description["host_processor_model_name"] == "another"
    assert description["host_memory_capacity"] == ""
    assert (description["accelerator_model_name"], description["accelerators_per_node"]) == ("NVIDIA H200", "8")
    assert description["framework"] == "PyTorch 2.13.0"
    assert description["status"] == "Available cloud"
    assert "cooling" not in missing_keys(description | {"cooling": "water"})
    assert {"host_memory_capacity", "accelerator_interconnect", "host_storage_type"} <= set(missing_keys(description))
    assert not {"hw_notes", "sw_notes"} & set(missing_keys(description))


def test_every_value_of_the_description_is_a_string(made: Bench) -> None:
    """MLPerf's checker joins them and would fail on a number."""
    series = load_series(made.runs)
    assert series
    from runtime.environment import cpu_name

    environment = series.environment | {"cpu": cpu_name()}
    description = describe_system(VALUES, system="abacus", environment=environment, nodes="1")
    assert set(description) == set(KEYS)
    assert all(isinstance(value, str) for key, value in description.items() if key != "other_software_stack")
    assert int(description["host_processor_vcpu_count"]) >= 1
    assert description["host_memory_capacity"].endswith(" GiB")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a JSON object"), ('{"colour": "red"}', "unknown key 'colour'"), ('{"cooling": 3}', "must be a string")],
)
def test_a_bad_description_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "system.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_user_description(tmp_path / "system.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_user_description(tmp_path / "nowhere.json")


def test_paths_of_this_machine_are_left_out() -> None:
    assert scripts.without_paths(["--amp", "--data_dir", "/my/data", "--epochs", "3"]) == ["--amp", "--epochs", "3"]
    assert scripts.without_paths(["--data_dir=/my/data", "--amp"]) == ["--amp"]
