"""The runs of a series read the same data, and nothing changes between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.spec import KITS19
from submission import series
from submission.__main__ import main
from submission.launching import PROJECT
from submission.record import load_series
from tests.submission.conftest import OPEN, Bench


def write_folder(folder: Path, content: str) -> Path:
    """Writes the index of a preprocessed folder whose files have digests made from `content`; no volumes."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {
        case: CaseRecord(
            transform=None,
            boxes={},
            digests={kind: f"{content}, {case}, {kind}" for kind in "xy"},
            source_stamp=[[0, 0], [0, 0]],
            statistics={"mean": 0.0, "std": 1.0},
        )
        for case in ("a", "b")
    }
    split = {"train": ["a"], "evaluation": ["b"]}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=KITS19, split=split, cases=records).to_json())
    return folder


def with_data(data_dir: Path | str) -> list[str]:
    return [*OPEN, "--data_dir", str(data_dir)]


def configuration(bench: Bench) -> dict[str, Any]:
    found = load_series(bench.runs)
    assert found
    return found.configuration


def test_a_folder_that_was_preprocessed_again_is_refused(bench: Bench, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "first")
    assert bench.start("--runs", "1", arguments=with_data(data)) == 0
    write_folder(data, "second")
    with pytest.raises(UserError, match=rf"the data set in {data} has changed \(digest [0-9a-f]{{12}}, was [0-9a-f]"):
        bench.start("--runs", "2", arguments=with_data(data))
    write_folder(data, "first")
    assert bench.start("--runs", "2", arguments=with_data(data)) == 0, "nothing of the series is lost"


def test_a_link_that_names_another_folder_is_refused(bench: Bench, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(write_folder(tmp_path / "data", "first"))
    assert bench.start("--runs", "1", arguments=with_data(link)) == 0
    assert bench.start("--runs", "2", arguments=with_data(tmp_path / "data")) == 0, "the same folder by its own name"
    link.unlink()
    link.symlink_to(write_folder(tmp_path / "other", "second"))
    with pytest.raises(UserError, match=f"data_dir {tmp_path / 'other'}, was {tmp_path / 'data'}"):
        bench.start("--runs", "3", arguments=with_data(link))


def test_an_absolute_path_names_the_same_folder_as_a_relative_one(bench: Bench) -> None:
    """main.py runs in the project's folder, wherever the series was started."""
    assert bench.start("--runs", "1", arguments=with_data("data")) == 0
    assert bench.start("--runs", "2", arguments=with_data(PROJECT / "data")) == 0
    with pytest.raises(UserError, match=f"data_dir {PROJECT / 'other'}, was {PROJECT / 'data'}"):
        bench.start("--runs", "3", arguments=with_data("other"))


def test_a_folder_that_only_the_machines_of_the_runs_have_is_no_difference(bench: Bench, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert bench.start("--runs", "1", arguments=with_data(data)) == 0
    assert configuration(bench)["data_digest"] is None
    write_folder(data, "first")
    assert bench.start("--runs", "2", arguments=with_data(data)) == 0
    write_folder(data, "second")
    with pytest.raises(UserError, match="has changed"):
        bench.start("--runs", "3", arguments=with_data(data))


def test_a_series_of_an_earlier_version_continues(bench: Bench, tmp_path: Path) -> None:
    """Its record has --data_dir as it was typed, and no digests."""
    link = tmp_path / "link"
    link.symlink_to(write_folder(tmp_path / "data", "first"))
    assert bench.start("--runs", "1", arguments=with_data(link)) == 0
    path = bench.runs / "series.json"
    content = json.loads(path.read_text())
    del content["configuration"]["data_digest"]
    del content["runs"][0]["data_digest"]
    content["configuration"]["data_dir"] = str(link)
    path.write_text(json.dumps(content))
    assert bench.start("--runs", "2", arguments=with_data(tmp_path / "data")) == 0
    assert configuration(bench)["data_digest"] is not None
    write_folder(tmp_path / "data", "second")
    with pytest.raises(UserError, match="has changed"):
        bench.start("--runs", "3", arguments=with_data(link))


def test_a_run_on_other_data_does_not_count(bench: Bench) -> None:
    """As where the machines of `--launch` have their own copies, so that only the run's own record names the data."""
    assert bench.start("--runs", "1", orders=[{"data_digest": "1" * 64}]) == 0
    with pytest.raises(UserError, match=r"run_1\.broken_1: its data set is not that of the earlier runs; give"):
        bench.start("--runs", "2", orders=[{"data_digest": "2" * 64}])
    assert [path.name for path in bench.results.iterdir()] == ["result_0.txt"]
    assert bench.start("--runs", "3", orders=[{"data_digest": "1" * 64}, {}]) == 0
    found = load_series(bench.runs)
    assert found
    assert [run.data_digest[:1] for run in found.runs] == ["1", "1", ""]
    assert len(found.broken) == 1


def test_what_changes_between_two_runs_of_one_start_is_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 runs take days: the folder, an argument file or the code may change while the series is running."""
    data = write_folder(tmp_path / "data", "first")
    flags = tmp_path / "my.args"
    flags.write_text("--learning_rate 2\n")
    launch_run = series.launch_run
    changes = {
        "has changed": lambda: write_folder(data, "second"),
        "learning_rate 3.0, was 2.0": lambda: flags.write_text("--learning_rate 3\n"),
        "commit another, was": lambda: monkeypatch.setattr(series, "commit", lambda: "another"),
    }
    for number, (message, change) in enumerate(changes.items()):

        def launch_and_change(*values: Any) -> int:
            status = launch_run(*values)
            change()  # noqa: B023 - called within this round
            return status

        with monkeypatch.context() as patch:
            patch.setattr(series, "launch_run", launch_and_change)
            with pytest.raises(UserError, match=message):
                bench.start("--runs", "40", arguments=[*with_data(data), f"@{flags}"])
        assert len(bench.seeds()) == number + 1, "the run before the change is kept"
        write_folder(data, "first")
        flags.write_text("--learning_rate 2\n")


def test_git_that_does_not_answer_ends_no_series(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["a commit", None, "a commit"])
    monkeypatch.setattr(series, "commit", lambda: next(answers))
    assert bench.start("--runs", "2") == 0
    assert configuration(bench)["commit"] == "a commit"


def test_runs_on_two_data_sets_are_not_packed(copied: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied.runs / "series.json"
    content = json.loads(path.read_text())
    for number, run in enumerate(content["runs"]):
        run["data_digest"] = "" if number < 3 else "2" * 64 if number == 7 else "1" * 64
    path.write_text(json.dumps(content))
    assert main(["pack", "--result_dir", str(copied.result_dir)]) == 1
    out = capsys.readouterr().out
    assert "result_7.txt: another data set: its digest is 222222222222, but 111111111111 in most" in out
    assert out.count("another data set") == 1, "runs whose data are unknown are no fault"
    assert [path.name for path in copied.result_dir.iterdir()] == ["results"]
