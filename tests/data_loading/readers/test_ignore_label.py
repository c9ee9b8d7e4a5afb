"""`--ignore_label`: the masks' value of voxels without a class, in every kind of raw data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data_loading.dataset import read_case
from data_loading.index import INDEX_NAME, read_index
from data_loading.io.volume import Geometry, Volume
from data_loading.readers.base import RawCase, ReaderOptions, ignore_voxels
from data_loading.spec import IGNORED, KITS19, DatasetSpec
from preprocess_dataset import main as preprocess_main

SHAPE = (5, 6, 7)
WriteScan = Callable[..., None]


def mask(seed: int, ignored: int = 7) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Two blocks, of classes 1 and 2; the first planes are ignored."""
    found = np.zeros(SHAPE, np.uint8)
    found[1:, :2, seed : seed + 4] = 1
    found[1:, 4:, seed : seed + 4] = 2
    found[:2] = ignored
    return found


def write_raw(kind: str, folder: Path, write_scan: WriteScan, ignored: int = 7) -> list[str]:
    """Writes two cases of a kind of raw data; returns the flags that read them."""
    flags = ["--dataset", kind, "--data_dir", str(folder / "imagesTr" if kind in ("nifti", "images") else folder)]
    for number in range(2):
        image = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
        if kind == "kits19":
            for name, array in (("imaging", image), ("segmentation", mask(number, ignored))):
                axes = [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]
                write_scan(folder / f"case_{number:05d}" / f"{name}.nii.gz", array, (3.0, 1.5, 2.0), axes)
            continue
        if kind == "images":
            for name, array in (
                ("imagesTr", (9 * image[3]).astype(np.uint8)),
                ("labelsTr", mask(number, ignored)[..., 3]),
            ):
                (folder / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array if name == "labelsTr" else np.resize(array, (5, 6))).save(
                    folder / name / f"{number}.png"
                )
            continue
        suffix = "_0000" if kind == "nnunet" else ""
        write_scan(folder / "imagesTr" / f"s{number}{suffix}.nii.gz", image)
        write_scan(folder / "labelsTr" / f"s{number}.nii.gz", mask(number, ignored))
    if kind in ("nifti", "images"):
        flags += ["--labels_dir", str(folder / "labelsTr")]
    names = ["background", "one", "two"]
    index = {
        "msd": {
            "modality": {"0": "CT"},
            "labels": dict(enumerate(names)),
            "training": [{"image": f"imagesTr/s{n}.nii.gz", "label": f"labelsTr/s{n}.nii.gz"} for n in range(2)],
        },
        "nnunet": {
            "channel_names": {"0": "CT"},
            "labels": {name: value for value, name in enumerate(names)} | {"ignore": ignored},
            "numTraining": 2,
        },
    }
    if kind in index:
        (folder / "dataset.json").write_text(json.dumps(index[kind]))
    return flags


def preprocess(out: Path, *flags: str) -> None:
    assert preprocess_main([*flags, "--results_dir", str(out), "--num_workers", "1"]) == 0


@pytest.mark.parametrize("kind", ["msd", "nnunet", "nifti", "images"])
def test_ignored_voxels_keep_a_label_of_their_own(
    kind: str, tmp_path: Path, write_scan: WriteScan, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write_raw(kind, tmp_path / "raw", write_scan)
    preprocess(tmp_path / "out", *flags, *([] if kind == "nnunet" else ["--ignore_label", "7"]))
    index = read_index(tmp_path / "out" / INDEX_NAME)
    assert index.spec.ignore_label == IGNORED
    assert len(index.spec.classes) == 3
    for case, record in index.cases.items():
        number = int(case[-1])
        expected = mask(number)[..., 3][np.newaxis] if kind == "images" else mask(number)
        expected = np.where(expected == 7, IGNORED, expected)
        label = read_case(tmp_path / "out", case)[1][0]
        np.testing.assert_array_equal(label, expected)
        assert record.voxels == tuple(np.bincount(expected[expected != IGNORED], minlength=3).tolist())
        assert record.statistics["ignored_voxels"] == np.count_nonzero(expected == IGNORED)
        assert set(record.boxes) <= {1, 2}  # crops are never centred on ignored voxels
    assert "; with the ignore label " in capsys.readouterr().out


def test_kits19_with_an_ignore_label_is_another_data_set(tmp_path: Path, write_scan: WriteScan) -> None:
    flags = write_raw("kits19", tmp_path / "raw", write_scan)
    preprocess(tmp_path / "out", *flags, "--ignore_label", "7", "--split_ratios", "0.5", "0.5")
    spec = read_index(tmp_path / "out" / INDEX_NAME).spec
    assert spec.ignore_label == IGNORED
    assert "ignore_label" in spec.name


def test_labels_and_an_ignore_label_of_0_read_scribbles(tmp_path: Path, write_scan: WriteScan) -> None:
    """0 is not annotated, 1 the background that somebody drew, 2 the structure."""
    flags = write_raw("nifti", tmp_path / "raw", write_scan, ignored=0)
    preprocess(tmp_path / "out", *flags, "--labels", "2=1:organ", "--ignore_label", "0")
    label = read_case(tmp_path / "out", "s1")[1][0]
    np.testing.assert_array_equal(label, np.choose(mask(1, 0), [IGNORED, 0, 1]))


def test_a_mask_with_nothing_but_background_and_ignored_voxels_is_empty(tmp_path: Path, write_scan: WriteScan) -> None:
    flags = write_raw("nifti", tmp_path / "raw", write_scan)
    only = np.zeros(SHAPE, np.uint8)
    only[0] = 7
    write_scan(tmp_path / "raw" / "imagesTr" / "s2.nii.gz", np.indices(SHAPE).sum(0).astype(np.float32))
    write_scan(tmp_path / "raw" / "labelsTr" / "s2.nii.gz", only)
    more = ["--ignore_label", "7", "--split_ratios", "1", "0"]
    for drop, cases in (("--no-drop_empty", ["s0", "s1", "s2"]), ("--drop_empty", ["s0", "s1"])):  # in one folder
        preprocess(tmp_path / "out", *flags, *more, drop)
        assert sorted(read_index(tmp_path / "out" / INDEX_NAME).cases) == cases


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("msd", ["--ignore_label", "2"], "--ignore_label 2 is a label of a class too"),
        ("nifti", ["--labels", "1,7=1", "--ignore_label", "7"], "--ignore_label 7 is a label of a class too"),
        ("msd", ["--ignore_label", "9"], "labels from 0 to 7|label 7, but the highest class is 2"),
    ],
)
def test_a_label_that_cannot_be_ignored_is_one_clear_line(
    kind: str, flags: list[str], message: str, tmp_path: Path, write_scan: WriteScan
) -> None:
    raw = write_raw(kind, tmp_path / "raw", write_scan)
    with pytest.raises(UserError, match=message):
        preprocess(tmp_path / "out", *raw, *flags)


def test_structures_with_masks_of_their_own_have_no_ignore_label(tmp_path: Path, write_scan: WriteScan) -> None:
    for number in range(2):
        write_scan(tmp_path / "scans" / f"s{number}.nii.gz", np.ones(SHAPE, np.float32))
        for organ in ("liver", "spleen"):
            write_scan(tmp_path / "masks" / f"s{number}" / f"{organ}.nii.gz", np.ones(SHAPE, np.uint8))
    flags = ["--dataset", "nifti", "--data_dir", str(tmp_path / "scans"), "--labels_dir", str(tmp_path / "masks")]
    with pytest.raises(UserError, match="has a mask for each structure, which has no such value"):
        preprocess(tmp_path / "out", *flags, "--ignore_label", "7")


def test_a_changed_ignore_label_preprocesses_again(tmp_path: Path, write_scan: WriteScan) -> None:
    flags = write_raw("nifti", tmp_path / "raw", write_scan)
    preprocess(tmp_path / "out", *flags)
    assert read_index(tmp_path / "out" / INDEX_NAME).spec.classes == ("background", "1", "2", "7")
    preprocess(tmp_path / "out", *flags, "--ignore_label", "7")
    assert read_case(tmp_path / "out", "s0")[1].max() == IGNORED


def test_a_folder_without_one_is_written_as_before() -> None:
    assert "ignore_label" not in KITS19.to_json()


def test_no_class_has_the_number_of_ignored_voxels() -> None:
    raw = RawCase(case="a", image=Path("a"), label=Path("b"), ignore_label=7)

    def classes_of(*values: int) -> list[int]:
        array = np.array(values, np.int32).reshape(1, 1, 1, 2)
        found: list[int] = (
            raw.to_classes(Volume(array, Geometry(np.eye(4), (1, 1, 2), (1, 1, 1)))).array.ravel().tolist()
        )
        return found

    assert classes_of(7, IGNORED - 1) == [IGNORED, IGNORED - 1]
    with pytest.raises(UserError, match="labels from 0 to 255; expected 0 to 254"):
        classes_of(7, IGNORED)
    names = tuple(map(str, range(IGNORED)))
    options = ReaderOptions(ignore_label=300)
    assert ignore_voxels(DatasetSpec(name="s", classes=names), [], options)[0].ignore_label == IGNORED
    with pytest.raises(UserError, match="beside it there may be 255 classes, found 256"):
        ignore_voxels(DatasetSpec(name="s", classes=(*names, "more")), [], options)
