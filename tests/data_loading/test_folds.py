"""Folds: nnU-Net's own division, its `splits_final.json` in and out, and the split that a run gets from a fold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data_loading.folds import SPLITS_NAME, Fold, LabelledCases, find_folds, make_folds, read_splits, write_splits
from data_loading.index import INDEX_NAME, DatasetIndex, PseudoLabels, read_index, write_json

# KFold(n_splits=5, shuffle=True, random_state=12345) of scikit-learn 1.9 on 12 cases: the held-out indices.
SKLEARN_12 = ([0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5])


def own(*cases: str) -> dict[str, str]:
    """Cases, each a patient of its own."""
    return {case: case for case in cases}


def labelled(train: str, evaluation: str, test: str = "", *, pseudo: str = "", only_training: bool = False) -> Any:
    split = {"train": list(train), "evaluation": list(evaluation)} | ({"test": list(test)} if test else {})
    return LabelledCases(
        split=split,
        patients=own(*train, *evaluation, *test),
        pseudo_labelled=frozenset(pseudo),
        only_training=only_training,
    )


def test_folds_are_those_of_scikit_learn_with_nnunets_seed() -> None:
    cases = [f"c{number:02d}" for number in range(12)]
    folds = make_folds(own(*reversed(cases)), 5)
    assert [fold.val for fold in folds] == [tuple(cases[index] for index in held) for held in SKLEARN_12]
    for fold in folds:
        assert sorted(fold.train + fold.val) == cases
        assert list(fold.train) == sorted(fold.train)


@pytest.mark.parametrize("number", [5, 7, 23])
def test_each_case_is_held_out_once_and_sizes_differ_by_one_at_most(number: int) -> None:
    folds = make_folds(own(*(f"c{index:02d}" for index in range(number))), 5)
    assert sorted(case for fold in folds for case in fold.val) == [f"c{index:02d}" for index in range(number)]
    sizes = [len(fold.val) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_cases_of_one_patient_stay_together() -> None:
    patients = {f"p{index // 3}_slab{index % 3}": f"p{index // 3}" for index in range(30)}
    for fold in make_folds(patients, 5):
        assert not {patients[case] for case in fold.train} & {patients[case] for case in fold.val}
        assert len(fold.val) == 6


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    make_folds(own(*"abcdef"), 3)
    assert np.random.rand() == expected


def test_fewer_cases_than_folds_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"^--folds 5: there are only 3 cases to divide; use fewer folds$"):
        make_folds(own(*"abc"), 5)
    with pytest.raises(UserError, match=r"only 2 patients to divide"):
        make_folds({"a": "p", "b": "q", "c": "q"}, 5)


def test_folds_divide_training_and_evaluation_cases_but_no_test_and_no_pseudo_labelled_ones() -> None:
    found = labelled("abcp", "de", "t", pseudo="p")
    folds = find_folds(found, 5, None)
    assert sorted(case for fold in folds for case in fold.val) == list("abcde")
    split = found.with_fold(folds[0])
    assert split["train"] == [*folds[0].train, "p"]
    assert split["evaluation"] == list(folds[0].val)
    assert split["test"] == ["t"]


def test_folds_of_the_training_cases_hold_the_evaluation_cases_back() -> None:
    found = labelled("abcd", "ef", only_training=True)
    fold = find_folds(found, 2, None)[0]
    assert sorted(fold.train + fold.val) == list("abcd")
    assert found.with_fold(fold)["test"] == ["e", "f"]


def test_a_pseudo_labelled_case_of_a_held_out_patient_does_not_train() -> None:
    split = {"train": ["a", "b", "again_a", "again_b"], "evaluation": ["c"]}
    patients = {"a": "a", "b": "b", "c": "c", "again_a": "a", "again_b": "b"}
    found = LabelledCases(
        split=split, patients=patients, pseudo_labelled=frozenset({"again_a", "again_b"}), only_training=False
    )
    assert found.with_fold(Fold(("b", "c"), ("a",)))["train"] == ["b", "c", "again_b"]


def test_a_copy_that_a_teacher_labelled_belongs_to_its_originals_patient(
    tmp_path: Path, write_preprocessed: Callable[..., Path]
) -> None:
    """As `prediction.pseudo_labels` writes it without `--unlabelled`: the same image, and no patient is known."""
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "pseudo_b", "pseudo_new"]
    cases = {name: (rng.normal(size=(1, 2, 2, 2)), np.zeros((1, 2, 2, 2))) for name in names}
    index = read_index(write_preprocessed(tmp_path, cases) / INDEX_NAME)
    images = {"a": "1", "b": "2", "c": "3", "pseudo_b": "2", "pseudo_new": "4"}
    split = {"train": ["a", "b", "pseudo_b", "pseudo_new"], "evaluation": ["c"]}
    records = {name: replace(record, digests={"x": images[name], "y": name}) for name, record in index.cases.items()}
    pseudo_labels = PseudoLabels(cases=["pseudo_b", "pseudo_new"], teacher="", threshold=0.5, max_share=0.5)
    index = DatasetIndex(spec=index.spec, split=split, cases=records, pseudo_labels=pseudo_labels)
    write_json(tmp_path / INDEX_NAME, index.to_json())
    found = LabelledCases.find(tmp_path, split, only_training=False)
    assert found.with_fold(Fold(("a", "c"), ("b",)))["train"] == ["a", "c", "pseudo_new"]
    assert found.with_fold(Fold(("b", "c"), ("a",)))["train"] == ["b", "c", "pseudo_b", "pseudo_new"]


def test_splits_are_read_as_they_were_written(tmp_path: Path) -> None:
    folds = make_folds(own(*"abcdefg"), 3)
    write_splits(tmp_path, folds)
    content = json.loads((tmp_path / SPLITS_NAME).read_text())
    assert [sorted(record) for record in content] == [["train", "val"]] * 3
    assert read_splits(tmp_path / SPLITS_NAME) == folds
    assert find_folds(labelled("abcd", "efg"), 0, tmp_path / SPLITS_NAME) == folds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "expected a list"),
        ("{}", "a fold is empty, or there is none"),
        ("[]", "a fold is empty, or there is none"),
        ('[{"train": ["a"]}]', "'val'; expected a list of"),
        ('[{"train": ["a"], "val": "b"}]', "two lists of case ids"),
        ('[{"train": ["a"], "val": []}]', "a fold is empty"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', "lists b twice in one fold"),
        ("[1]", "expected a list"),
    ],
)
def test_a_file_that_is_no_list_of_folds_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_splits(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ("z", "fold 0 names z, which --data_dir does not have"),
        ("t", "names t, which is a test case of --data_dir"),
        ("p", "names p, which is pseudo-labelled"),
    ],
)
def test_a_fold_of_other_cases_is_one_clear_line(tmp_path: Path, val: str, message: str) -> None:
    write_splits(tmp_path, [Fold(("a", "b"), (val,))])
    with pytest.raises(UserError, match=message):
        find_folds(labelled("abp", "c", "t", pseudo="p"), 0, tmp_path / SPLITS_NAME)


def test_a_patient_in_both_parts_of_a_fold_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path, [Fold(("a1",), ("a2",))])
    found = LabelledCases(
        split={"train": ["a1", "a2"], "evaluation": []},
        patients={"a1": "a", "a2": "a"},
        pseudo_labelled=frozenset(),
        only_training=False,
    )
    with pytest.raises(UserError, match="patient a is in its training and in its validation part"):
        find_folds(found, 0, tmp_path / SPLITS_NAME)
