"""Pseudo-labels: from confident predictions, for training cases only, and recorded in dataset.json."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.messages import notes_held, take_notes
from data_loading.dataset import (
    case_file,
    case_files,
    pseudo_label_cap,
    read_case,
    read_spec_and_split,
    seen_by_teacher,
)
from data_loading.folds import Fold
from data_loading.index import INDEX_NAME, DatasetIndex, read_index, write_json
from data_loading.integrity import check_files, file_md5, split_digest
from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform
from data_loading.sampler import PseudoLabelCap
from prediction import pseudo_labels
from prediction.pseudo_labels import check_teacher, main
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.writer import save
from runtime.run_spec import read_pseudo_labels, split_of_fold
from runtime.train_state import TrainState
from runtime.trained_cases import training_cases

MODEL = "tests.prediction.test_pseudo_labels:ImageReader"


class ImageReader(nn.Module):
    """A teacher that reads class k and its logit l from the image's values 10 k + l."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.classes = out_channels

    def forward(self, image: Tensor) -> Tensor:
        value = (image / 10).round()
        strength = image - 10 * value
        logits = torch.stack([(value == k) * strength for k in range(self.classes)], dim=1)[:, :, 0]
        return logits * self.scale


def image_of(classes: np.ndarray, strength: np.ndarray | float) -> np.ndarray:
    return 10.0 * classes + strength


@pytest.fixture
def folder(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    cases = {}
    for number in range(4):
        label, taught = (rng.integers(0, 3, (1, 4, 6, 8)) for _ in range(2))
        # Softmax of (4, 0, 0) is 0.965, of (1, 0, 0) 0.576.
        strength = np.where(rng.random((1, 4, 6, 8)) < 0.5, 4.0, 1.0)
        cases[f"case_{number}"] = (image_of(taught, strength), label)
    path = write_preprocessed(tmp_path / "data", cases)
    index = read_index(path / INDEX_NAME)
    spec = replace(index.spec, mean=0.0, std=1.0)  # intensities stay, and files have their digests
    records = {
        case: replace(record, digests={kind: file_md5(case_file(path, case, kind)) for kind in "xy"})
        for case, record in index.cases.items()
    }
    write_json(path / INDEX_NAME, DatasetIndex(spec=spec, split=index.split, cases=records).to_json())
    return path


@pytest.fixture
def teacher(tmp_path: Path, folder: Path) -> Path:
    network = ImageReader(1, 3)
    optimizer, scaler = torch.optim.SGD(network.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(network=network, model=network, optimizer=optimizer, scaler=scaler)
    arguments = ["--data_dir", "DATA", "--val_input_shape", "4", "4", "8", "--model", MODEL]
    data = split_digest(folder, read_spec_and_split(folder, [])[1])
    config, spec = parse_arguments(arguments)[0], read_index(folder / INDEX_NAME).spec
    content = checkpoints.snapshot(state, [0.0], config=config.to_json(), seed=1, data=data, spec=spec.to_json())
    save(tmp_path / "teacher.pth", content)
    return tmp_path / "teacher.pth"


def run(folder: Path, teacher: Path, results: Path, *more: object) -> int:
    return main(
        [
            "--load_ckpt_path",
            str(teacher),
            "--data_dir",
            str(folder),
            "--results_dir",
            str(results),
            "--model",
            MODEL,
            *map(str, more),
        ]
    )


def test_training_cases_get_the_teachers_label_where_it_is_confident(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    assert run(folder, teacher, results, "--threshold", 0.9, "--max_share", 0.25) == 0
    before, after = read_index(folder / INDEX_NAME), read_index(results / INDEX_NAME)
    names = [f"pseudo_{case}" for case in before.split["train"]]
    assert after.split == {"train": [*before.split["train"], *names], "evaluation": before.split["evaluation"]}
    pseudo = after.pseudo_labels
    assert pseudo is not None
    assert (pseudo.cases, pseudo.threshold, pseudo.max_share) == (names, 0.9, 0.25)
    assert pseudo.teacher == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert pseudo_label_cap(results) == PseudoLabelCap(count=3, max_share=0.25)
    fewer = {**after.split, "train": after.split["train"][:-1]}
    assert pseudo_label_cap(results, fewer) == PseudoLabelCap(count=2, max_share=0.25)
    assert pseudo_label_cap(folder) == PseudoLabelCap()
    for case in before.split["train"]:
        image, manual = read_case(folder, case)
        taught, is_confident = np.round(image / 10), np.isclose(image % 10, 4)
        assert 0.3 < is_confident.mean() < 0.7
        copied, label = read_case(results, f"pseudo_{case}")
        np.testing.assert_array_equal(copied, image)
        np.testing.assert_array_equal(label, np.where(is_confident, taught, manual))
        np.testing.assert_array_equal(read_case(results, case)[1], manual)
    assert check_files(results, names).changed == []


def write_scans(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in images.items():
        if array.min() == array.max():  # one value everywhere is refused
            array.flat[0] += 0.25
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_unlabelled_scans_are_added_if_their_foreground_is_confident(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, (5, 6, 8))
    scans = write_scans(
        tmp_path / "scans",
        {
            "confident": image_of(classes, np.where(classes > 0, 4.0, 1.0)),
            "unconfident": image_of(classes, 1.0),
            "empty": image_of(0 * classes, 4.0),
        },
    )
    assert run(folder, teacher, tmp_path / "results", "--unlabelled", scans) == 0
    index = read_index(tmp_path / "results" / INDEX_NAME)
    assert index.pseudo_labels is not None
    assert index.pseudo_labels.cases == ["pseudo_confident"]
    assert index.split["train"][-1] == "pseudo_confident"
    np.testing.assert_array_equal(read_case(tmp_path / "results", "pseudo_confident")[1][0], classes)


def test_unlabelled_scans_get_the_orientation_of_the_data_set_s_scans(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    index = read_index(folder / INDEX_NAME)
    shape = (4, 6, 8)
    source = Geometry(np.diag([1.0, -1, 1, 1]), shape, (1, 1, 1))  # the second axis runs to the back
    transform = GridTransform(source=source, resampled_shape=shape, padding_before=(0, 0, 0), shape=shape)
    cases = {case: replace(record, transform=transform) for case, record in index.cases.items()}
    write_json(folder / INDEX_NAME, replace(index, cases=cases).to_json())
    classes = np.random.default_rng(1).integers(0, 3, (5, 6, 8))
    scans = write_scans(tmp_path / "scans", {"forward": image_of(classes, 4.0)})
    assert run(folder, teacher, tmp_path / "results", "--unlabelled", scans) == 0
    np.testing.assert_array_equal(read_case(tmp_path / "results", "pseudo_forward")[1][0], classes[:, ::-1])


def test_a_threshold_of_1_accepts_what_is_certain(folder: Path, teacher: Path, tmp_path: Path) -> None:
    saved = torch.load(teacher, weights_only=True)
    for part in (saved["last"], saved["best"]):
        if part["network"] is not None:
            part["network"]["scale"] *= 100  # softmax of (400, 0, 0) is 1 in float32
    save(teacher, saved)
    classes = np.random.default_rng(1).integers(0, 3, (5, 6, 8))
    scans = write_scans(tmp_path / "scans", {"certain": image_of(classes, 4.0)})
    assert run(folder, teacher, tmp_path / "results", "--unlabelled", scans, "--threshold", 1) == 0
    assert run(folder, teacher, tmp_path / "again", "--threshold", 1) == 0
    case = read_index(folder / INDEX_NAME).split["train"][0]
    label, image = read_case(tmp_path / "again", f"pseudo_{case}")[1], read_case(folder, case)[0]
    np.testing.assert_array_equal(label, np.round(image / 10))


@pytest.mark.parametrize("case", ["case_0", "other_name"])
def test_a_scan_of_the_data_set_itself_is_refused(case: str, folder: Path, teacher: Path, tmp_path: Path) -> None:
    image, _ = read_case(folder, read_index(folder / INDEX_NAME).split["evaluation"][0])
    scans = write_scans(tmp_path / "scans", {case: image[0]})
    with pytest.raises(UserError, match=rf"--unlabelled {case} is (a case of|the same scan as case_0)"):
        run(folder, teacher, tmp_path / "results", "--unlabelled", scans)
    assert not (tmp_path / "results" / INDEX_NAME).exists()
    assert not list((tmp_path / "results").glob("pseudo_*"))


def test_a_scan_that_cannot_be_labelled_is_named_and_the_others_are_added(
    folder: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = np.random.default_rng(1).integers(0, 3, (5, 6, 8))
    good, results = image_of(classes, 4.0), tmp_path / "results"
    images = {"a": good, "b_copy": read_case(folder, "case_0")[0][0], "c_nan": np.where(good > 20, np.nan, good)}
    images |= {"d": good[::-1].copy(), "e_unconfident": image_of(classes, 1.0)}
    scans = write_scans(tmp_path / "scans", images)
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    with pytest.raises(UserError, match=r"^3 of 6 scans could not be labelled, for the reasons above$"):
        run(folder, teacher, results, "--unlabelled", scans)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert errors[0] == "error: --unlabelled b_copy is the same scan as case_0 of --data_dir"
    assert "broken.nii.gz: " in errors[1]
    assert errors[2].startswith("error: c_nan: ")
    index = read_index(results / INDEX_NAME)
    assert index.pseudo_labels is not None
    assert index.pseudo_labels.cases == ["pseudo_a", "pseudo_d"]
    assert check_files(results, index.pseudo_labels.cases).changed == []
    written = {path.name for path in results.glob("pseudo_*")}
    assert written == {path.name for case in index.pseudo_labels.cases for path in case_files(results, case)}


def test_scans_of_which_none_can_be_added_leave_no_files(folder: Path, teacher: Path, tmp_path: Path) -> None:
    images = {"copy": read_case(folder, "case_0")[0][0], "unconfident": image_of(np.ones((4, 6, 8)), 1.0)}
    scans = write_scans(tmp_path / "scans", images)
    with pytest.raises(UserError, match=r"1 of 2 scans could not be labelled, .* and no other was added"):
        run(folder, teacher, tmp_path / "results", "--unlabelled", scans)
    assert not list((tmp_path / "results").glob("pseudo_*"))
    assert not (tmp_path / "results" / INDEX_NAME).exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "case_0"], "case_0 is a case of"), (["a", "b", "a"], "two scans are called a")],
)
def test_names_are_checked_before_anything_is_written(
    names: list[str], message: str, folder: Path, teacher: Path, tmp_path: Path
) -> None:
    scans = write_scans(tmp_path / "scans", {name: image_of(np.ones((4, 6, 8)), 4.0) for name in names})
    if names.count("a") > 1:
        (scans / "a.nii").write_bytes(gzip.decompress((scans / "a.nii.gz").read_bytes()))
    with pytest.raises(UserError, match=f"--unlabelled:? {message}"):
        run(folder, teacher, tmp_path / "results", "--unlabelled", scans)
    assert not (tmp_path / "results").exists()


def test_an_interrupted_labelling_leaves_no_half_of_a_case(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(image: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(pseudo_labels, "load_teacher", lambda *given: interrupted)
    scans = write_scans(tmp_path / "scans", {"a": image_of(np.ones((4, 6, 8)), 4.0)})
    with pytest.raises(KeyboardInterrupt):
        run(folder, teacher, tmp_path / "results", "--unlabelled", scans)
    assert not list((tmp_path / "results").glob("pseudo_*"))


def test_user_errors_are_one_line(folder: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(message: str, *more: Any, data: Path = folder, results: Path = tmp_path / "results") -> None:
        with pytest.raises(UserError, match=message):
            run(data, teacher, results, *more)

    refused("already holds a data set", results=folder)
    refused("no dataset.json in it", data=tmp_path)
    scans = write_scans(tmp_path / "scans", {"unconfident": image_of(np.ones((4, 6, 8)), 1.0)})
    refused("no scan is labelled with such confidence", "--unlabelled", scans)
    saved = torch.load(teacher, weights_only=True)
    save(teacher, {**saved, "data": "another"})
    refused("trained on another data set or split")
    save(teacher, {**saved, "data": split_digest(folder, read_spec_and_split(folder, [])[1])})
    run(folder, teacher, tmp_path / "results")
    refused("has pseudo-labels itself", data=tmp_path / "results", results=tmp_path / "more")


def test_the_teacher_has_not_seen_the_evaluation_cases_of_the_folder_that_it_labelled(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    assert run(folder, teacher, results) == 0
    index, loaded = read_index(results / INDEX_NAME), checkpoints.load(teacher)
    assert training_cases(loaded, results) == {*read_index(folder / INDEX_NAME).split["train"]}
    # As on any folder, another split or other volumes are those of a network that may have seen them.
    evaluated, (first, *others) = index.split["evaluation"], index.split["train"]
    swapped = replace(index, split={"train": [*evaluated, *others], "evaluation": [first]})
    other = replace(index, cases={**index.cases, first: replace(index.cases[first], digests={"x": "0", "y": "1"})})
    for changed in (swapped, other):
        write_json(results / INDEX_NAME, changed.to_json())
        assert training_cases(loaded, results) is None


def test_a_teacher_that_left_cases_out_is_known_in_the_folder_that_it_labelled(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    index = read_index(folder / INDEX_NAME)
    left_out, *others = index.split["train"]
    saved = torch.load(teacher, weights_only=True)
    data = split_digest(folder, {**index.split, "train": others})
    save(teacher, {**saved, "config": {**saved["config"], "exclude": [left_out]}, "data": data})
    assert run(folder, teacher, tmp_path / "results") == 0
    assert training_cases(checkpoints.load(teacher), tmp_path / "results") == {*others}


# Folds


@pytest.fixture
def fold_teacher(folder: Path, teacher: Path) -> Path:
    """Trained on a fold that holds out a training case of the folder, and trains on its evaluation case."""
    split = read_index(folder / INDEX_NAME).split
    held_out, *others = split["train"]
    fold = Fold(tuple(sorted([*others, *split["evaluation"]])), (held_out,))
    saved = torch.load(teacher, weights_only=True)
    save(teacher, {**saved, "fold": fold.to_json(), "data": split_digest(folder, split_of_fold(folder, fold, ()))})
    return teacher


def test_a_teacher_of_a_fold_is_for_runs_on_the_same_fold(
    folder: Path, fold_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    assert run(folder, fold_teacher, results) == 0
    assert "was trained on 1 of 1 evaluation case: train on --results_dir with the same fold" in capsys.readouterr().err
    split, fold = read_index(folder / INDEX_NAME).split, checkpoints.load(fold_teacher).fold
    assert fold is not None
    assert seen_by_teacher(results, split["evaluation"]) == split["evaluation"]
    assert seen_by_teacher(results, fold.val) == []


def test_a_teacher_of_other_volumes_of_the_same_fold_is_refused(
    folder: Path, fold_teacher: Path, tmp_path: Path
) -> None:
    index = read_index(folder / INDEX_NAME)
    case = index.split["train"][0]
    changed = replace(index.cases[case], digests={"x": "0" * 32, "y": "1" * 32})
    write_json(folder / INDEX_NAME, replace(index, cases={**index.cases, case: changed}).to_json())
    with pytest.raises(UserError, match="trained on another data set or split"):
        check_teacher(fold_teacher, folder, read_index(folder / INDEX_NAME))


def test_a_teacher_that_left_cases_out_has_not_seen_them(folder: Path, teacher: Path, tmp_path: Path) -> None:
    index = read_index(folder / INDEX_NAME)
    left_out, *others = index.split["train"]
    saved = torch.load(teacher, weights_only=True)
    data = split_digest(folder, {**index.split, "train": others})
    save(teacher, {**saved, "config": {**saved["config"], "exclude": [left_out]}, "data": data})
    assert check_teacher(teacher, folder, index) == others


def test_a_run_notes_evaluation_cases_that_the_teacher_was_trained_on(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    """A folder's own split and one fold of it: the teacher of the former was trained on cases of the latter."""
    results = tmp_path / "results"
    assert run(folder, teacher, results) == 0
    config, _ = parse_arguments(["--data_dir", str(results), "--batch_size", "2"])
    first, second, *_ = (split := read_index(folder / INDEX_NAME).split)["train"]

    def notes(evaluated: list[str]) -> list[str]:
        with notes_held():
            read_pseudo_labels(
                config, {"train": read_index(results / INDEX_NAME).split["train"], "evaluation": evaluated}
            )
            return take_notes()

    assert notes(split["evaluation"]) == []
    (line,) = notes([second, first, *split["evaluation"]])
    assert line.endswith(f"was trained on 2 of 3 evaluation cases, so these score too well: {first}, …")
    index = read_index(results / INDEX_NAME)
    assert index.pseudo_labels is not None
    earlier = replace(index.pseudo_labels, trained_on=None)  # of a version that did not record it
    write_json(results / INDEX_NAME, replace(index, pseudo_labels=earlier).to_json())
    assert notes([second, *split["evaluation"]]) == [line.replace("2 of 3", "1 of 2").replace(first, second)]
