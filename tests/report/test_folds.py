"""The report over folds: every case once, by the run that held it out."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from data_loading.folds import SPLITS_NAME, make_folds, write_splits
from report.__main__ import main
from report.folds import TABLE_NAME, are_folds, join_folds
from report.records import names_of, read_run
from report.write import write_comparison
from tests.report.runs import Tags, log_run

CASES = [f"c{number}" for number in range(7)]
FOLDS = make_folds({case: case for case in CASES}, 3)


def log_folds(root: Path, *, count: int = 3, exclude: tuple[str, ...] = ()) -> list[Path]:
    """Logs of a cross-validation: fold k has a mean Dice of 0.5 + k / 10 at epoch 1, and 0.1 less at epoch 2."""
    folders = []
    for number in range(count):
        excluded = ["--exclude", *exclude] if exclude else []
        folder = log_run(
            root / f"f{number}",
            cases=[case for case in FOLDS[number].val if case not in exclude],
            scores={1: 0.5 + number / 10, 2: 0.4 + number / 10},
            flags=["--folds", "3", "--fold", str(number), *excluded],
        )
        write_splits(folder, FOLDS)
        folders.append(folder)
    return folders


def test_means_are_over_cases_and_not_over_folds(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in log_folds(tmp_path)]
    for last, lower in ((False, 0.0), (True, 0.1)):
        joined = join_folds(runs, names_of(runs), last=last)
        assert joined is not None
        assert sorted(joined.dice) == CASES
        # The n-th case of a fold has the fold's mean -0.1 n and +0.1 n. The folds hold 3, 2 and 2 cases.
        first = [0.5, 0.4, 0.3, 0.6, 0.5, 0.7, 0.6]
        second = [0.5, 0.6, 0.7, 0.6, 0.7, 0.7, 0.8]
        assert joined.class_dice == pytest.approx([sum(first) / 7 - lower, sum(second) / 7 - lower])
        assert joined.mean_dice == pytest.approx(sum(first + second) / 14 - lower)
        assert joined.problems == []
        assert joined.run_of[FOLDS[1].val[0]] == "f1"


def test_a_case_that_no_run_or_several_scored_is_named(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in log_folds(tmp_path, count=2)]
    joined = join_folds([runs[0], runs[1], runs[1]], ["a", "b", "c"])
    assert joined is not None
    assert len(joined.dice) == 5
    first, second = FOLDS[1].val
    assert joined.problems == [
        f"2 cases scored by several runs, of which the first counts: {first} by b and c, {second} by b and c",
        f"2 cases scored by none of these runs: {', '.join(FOLDS[2].val)}",
    ]


def test_runs_of_other_cases_or_classes_are_no_folds_of_each_other(tmp_path: Path) -> None:
    first, second = (read_run(folder) for folder in log_folds(tmp_path / "a", count=2))
    other = read_run(log_folds(tmp_path / "b", count=1)[0])
    assert are_folds([first, second, other])
    assert not are_folds([first, replace(other, classes=["liver"])])
    write_splits(other.folder, make_folds({case: case for case in "xyz"}, 3))
    assert not are_folds([first, other])
    assert "All cases of the folds" not in write_comparison([first.folder, other.folder]).read_text(encoding="utf-8")
    (other.folder / SPLITS_NAME).unlink()
    assert are_folds([first, other])


def test_an_excluded_case_is_not_missing(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in log_folds(tmp_path, exclude=(FOLDS[0].val[0],))]
    joined = join_folds(runs, names_of(runs))
    assert joined is not None
    assert len(joined.dice) == 6
    assert joined.problems == []


def test_a_comparison_of_folds_has_the_joined_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = log_folds(tmp_path)
    page = Tags(write_comparison(folders).read_text(encoding="utf-8"))
    assert "All cases of the folds" in page.text
    out = capsys.readouterr().out.splitlines()
    mean = sum([0.5, 0.4, 0.3, 0.6, 0.5, 0.7, 0.6, 0.5, 0.6, 0.7, 0.6, 0.7, 0.7, 0.8]) / 14
    assert out[0].startswith(f"best evaluations: 7 cases of 3 folds, mean Dice {mean:.4f} (kidney ")
    assert out[2].startswith(f"last evaluations: 7 cases of 3 folds, mean Dice {mean - 0.1:.4f} (kidney ")
    with (folders[0] / TABLE_NAME).open() as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["case"] for row in rows) == CASES
    assert [float(row["mean_dice"]) for row in rows] == sorted(float(row["mean_dice"]) for row in rows)
    assert set(rows[0]) == {"case", "run", "mean_dice", "kidney_dice", "tumour_dice"}


@pytest.mark.parametrize("how", ["the same path", "through a link", "another spelling"])
def test_a_folder_that_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """Its run would count as two folds."""
    first, second = log_folds(tmp_path, count=2)
    (tmp_path / "link").symlink_to(first)
    again = {"the same path": first, "through a link": tmp_path / "link"}.get(how, second / ".." / "f0")
    what = "is given twice" if again == first else f"and {first} are one folder"
    with pytest.raises(UserError, match=f"^{re.escape(f'--log_dir {again} {what}; give each run once')}$"):
        main([str(first), str(second), str(again)])
    assert capsys.readouterr().out == ""
    assert not (first / TABLE_NAME).exists()
    assert not (first / "comparison.html").exists()


def test_a_comparison_of_other_runs_has_no_such_table(tmp_path: Path) -> None:
    one = log_run(tmp_path / "a", scores={1: 0.5})
    assert "All cases of the folds" not in write_comparison([one, *log_folds(tmp_path, count=1)]).read_text()
    assert not (one / TABLE_NAME).exists()
