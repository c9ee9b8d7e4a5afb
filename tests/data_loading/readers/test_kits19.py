"""How raw data sets lie on disk: which cases are found, how they are split, and which folder was meant."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data_loading.readers.kits19 import RAW_LAYOUTS, RawDataset, read_kits19, read_msd
from data_loading.spec import KITS19

# MLPerf's 42 evaluation cases.
EVALUATION = """
    0 3 5 6 12 24 34 41 44 49 52 56 61 65 66 70 76 78 80 84 86
    87 92 111 112 125 128 138 157 160 161 162 169 171 176 185 187 189 198 203 206 207
"""

WriteRaw = Callable[..., Path]


def touch_kits19(folder: Path, *numbers: int | str) -> Path:
    for number in numbers:
        case = folder / (f"case_{number:05d}" if isinstance(number, int) else f"case_{number}")
        case.mkdir(parents=True)
        (case / "imaging.nii.gz").touch()
        (case / "segmentation.nii.gz").touch()
    return folder


def names(raw: RawDataset) -> list[str]:
    return [case.case for case in raw.cases]


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes fields of a Decathlon's dataset.json; None removes one."""
    content = {**json.loads((folder / "dataset.json").read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def test_kits19_is_found_and_split_by_mlperfs_list(tmp_path: Path) -> None:
    raw = read_kits19(touch_kits19(tmp_path, 4, 0, 3, 209), ["00000", "00003", "00206"], seed=0)
    assert raw.spec == KITS19
    assert names(raw) == ["case_00000", "case_00003", "case_00004", "case_00209"]
    assert raw.split == {"train": ["case_00004", "case_00209"], "evaluation": ["case_00000", "case_00003"]}
    assert raw.cases[0].image == tmp_path / "case_00000" / "imaging.nii.gz"
    assert raw.cases[0].label == tmp_path / "case_00000" / "segmentation.nii.gz"
    assert read_kits19(tmp_path, ["00000", "00003", "00206"], seed=1).split == raw.split


def test_kits19_without_labels_and_other_things_are_passed_over(tmp_path: Path) -> None:
    touch_kits19(tmp_path, 1, "copy", "²")
    (tmp_path / "case_00210").mkdir()
    (tmp_path / "case_00299").mkdir()
    (tmp_path / "case_00002").touch()  # a file
    (tmp_path / "kits.json").touch()
    assert names(read_kits19(tmp_path, [], seed=0)) == ["case_00001"]


def test_the_evaluation_list_is_mlperfs() -> None:
    listed = (Path(__file__).resolve().parents[3] / "evaluation_cases.txt").read_text().split()
    assert len(listed) == 42
    assert listed == [f"{int(number):05d}" for number in EVALUATION.split()]


@pytest.mark.parametrize(("missing", "present"), [("segmentation", "imaging"), ("imaging", "segmentation")])
def test_a_kits19_case_needs_both_files(tmp_path: Path, missing: str, present: str) -> None:
    touch_kits19(tmp_path, 0, 1)
    (tmp_path / "case_00001" / f"{missing}.nii.gz").unlink()
    what = "mask" if missing == "segmentation" else "image"
    path = tmp_path / "case_00001" / f"{missing}.nii.gz"
    with pytest.raises(UserError, match=f"case_00001: its {what} {path} is missing beside {present}.nii.gz"):
        read_kits19(tmp_path, [], seed=0)


def test_a_wrong_kits19_folder_names_the_one_that_was_meant(tmp_path: Path, write_msd: WriteRaw) -> None:
    data = touch_kits19(tmp_path / "kits19" / "data", 0)
    with pytest.raises(UserError, match=f"did you mean {data}\\?"):
        read_kits19(data.parent, [], seed=0)
    with pytest.raises(UserError, match=f"did you mean its parent {data}\\?"):
        read_kits19(data / "case_00000", [], seed=0)
    decathlon = write_msd(tmp_path / "Task04", 2)
    with pytest.raises(UserError, match="it has the Decathlon's layout, use --dataset msd"):
        read_kits19(decathlon, [], seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no case_00000 … in it; give the folder that holds case_00000/imaging"):
        read_kits19(tmp_path / "empty", [], seed=0)


def test_the_decathlon_is_found_by_its_list(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path / "task", 5)
    (folder / "imagesTr" / "._scan_0.nii.gz").touch()  # macOS leaves these; the list does not name it
    raw = read_msd(folder, ["00000"], seed=0)
    assert names(raw) == [f"scan_{number}" for number in range(5)]
    assert raw.cases[3].image.samefile(folder / "imagesTr" / "scan_3.nii.gz")
    assert raw.cases[3].label.samefile(folder / "labelsTr" / "scan_3.nii.gz")
    spec = raw.spec
    assert (spec.name, spec.classes, spec.channels) == ("scans", ("background", "kidney", "tumour"), 1)
    assert spec.spacing_mm is spec.intensity_window is spec.mean is spec.deviation is spec.min_shape is None
    assert spec.padding_value is None
    assert not spec.crops_remainder


def test_class_names_follow_their_numbers_and_channels_the_modalities(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    rewrite(folder, labels={"2": "cyst", "0": "nothing", "1": "organ"}, modality={"0": "T1", "1": "T2"})
    assert read_msd(folder, [], seed=0).spec.classes == ("nothing", "organ", "cyst")
    assert read_msd(folder, [], seed=0).spec.channels == 2


def test_the_decathlons_split_is_80_to_20_by_seed(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 20)
    splits = [read_msd(folder, [], seed).split for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert len({tuple(split["evaluation"]) for split in splits}) > 1
    for split in splits:
        assert (len(split["train"]), len(split["evaluation"])) == (16, 4)
        assert sorted(split["train"] + split["evaluation"]) == sorted(f"scan_{number}" for number in range(20))


@pytest.mark.real_data
def test_the_real_hippocampus_set_is_read_whole(real_data: Callable[[str], Path]) -> None:
    raw = read_msd(real_data("hippocampus"), [], seed=0)
    assert len(raw.cases) == 200
    assert (len(raw.split["train"]), len(raw.split["evaluation"])) == (160, 40)
    assert raw.spec.classes == ("background", "Anterior", "Posterior")


def test_a_decathlon_case_needs_both_files(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    for kind, what in (("labelsTr", "mask"), ("imagesTr", "image")):
        path = folder / kind / "scan_1.nii.gz"
        path.rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"scan_1: its {what} .* is missing beside scan_1.nii.gz"):
            read_msd(folder, [], seed=0)
        (tmp_path / "away").rename(path)


def test_a_wrong_decathlon_folder_names_the_one_that_was_meant(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path / "msd" / "Task04", 2)
    with pytest.raises(UserError, match=f"no dataset.json in it; did you mean {folder}\\?"):
        read_msd(folder.parent, [], seed=0)
    with pytest.raises(UserError, match=f"did you mean {folder}\\?"):
        read_msd(folder / "imagesTr", [], seed=0)
    with pytest.raises(UserError, match="it has KiTS19's layout, use --dataset kits19"):
        read_msd(touch_kits19(tmp_path / "kits19", 0), [], seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="give the folder of one Decathlon task"):
        read_msd(tmp_path / "empty", [], seed=0)


@pytest.mark.parametrize(("read", "looks"), [(read_kits19, "iterdir"), (read_msd, "glob")])
def test_a_folder_that_may_not_be_looked_into_gets_no_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., RawDataset], looks: str
) -> None:
    def refuse(self: Path, *arguments: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, looks, refuse)  # root, who runs the tests in a container, may look into every folder
    with pytest.raises(UserError, match="in it; give the folder"):
        read(tmp_path, [], seed=0)


GOOD = {"image": "imagesTr/scan_0.nii.gz", "label": "labelsTr/scan_0.nii.gz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "not a Decathlon dataset.json .*labels"),
        ({"training": None}, "not a Decathlon dataset.json .*training"),
        ({"modality": None}, "not a Decathlon dataset.json .*modality"),
        ({"labels": ["background"]}, "not a Decathlon dataset.json"),
        ({"labels": {"zero": "background"}}, "not a Decathlon dataset.json"),
        ({"labels": {"0": "background", "2": "organ"}}, r"labels must be numbered 0, 1, …, found \[0, 2\]"),
        ({"labels": {"0": "background"}}, "labels must be numbered"),
        ({"labels": {"0": "background", "1": ["organ"]}}, r"not a Decathlon dataset.json .*\['organ'\] in place of a"),
        ({"modality": {}}, "dataset.json: names no modality"),
        ({"modality": "CT"}, "not a Decathlon dataset.json"),
        ({"name": 5}, "not a Decathlon dataset.json .*5 in place of a text"),
        ({"training": ["imagesTr/scan_0.nii.gz"]}, "not a Decathlon dataset.json"),
        ({"training": []}, "dataset.json: a split needs at least 2 cases, found 0"),
        ({"training": [GOOD]}, "a split needs at least 2 cases, found 1"),
        ({"training": [GOOD, GOOD]}, "lists a case twice"),
        ({"training": [{**GOOD, "image": 5}]}, "not a Decathlon dataset.json .*5 in place of a text"),
        ({"training": [{**GOOD, "image": f"imagesTr/{'x' * 5000}.nii.gz"}]}, "cannot be looked up: File name too long"),
        ({"training": [{**GOOD, "image": "../outside.nii.gz"}]}, r"'\.\./outside\.nii\.gz' leaves the data folder"),
        ({"training": [{**GOOD, "label": "labelsTr/../../x.nii.gz"}]}, "leaves the data folder"),
        ({"training": [{**GOOD, "image": "{tmp}/outside.nii.gz"}]}, "leaves the data folder"),
        ({"training": [{**GOOD, "label": "{tmp}/outside.nii.gz"}]}, "leaves the data folder"),
        ({"training": [{**GOOD, "image": ""}]}, "leaves the data folder"),
        ({"training": [{**GOOD, "image": "imagesTr/.nii.gz"}]}, "leaves the data folder"),
    ],
)
def test_a_bad_decathlon_list_is_one_clear_line(
    tmp_path: Path, write_msd: WriteRaw, changes: dict[str, Any], message: str
) -> None:
    folder = write_msd(tmp_path / "task", 2)
    shutil.copy(folder / "imagesTr" / "scan_0.nii.gz", tmp_path / "outside.nii.gz")
    rewrite(folder, **json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path))))
    with pytest.raises(UserError, match=message) as caught:
        read_msd(folder, [], seed=0)
    assert "\n" not in str(caught.value)


NESTED = [b"[" * 100_000, b'{"a":' * 100_000, b'{"labels": ' + b"[" * 100_000]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"labels": 1}', *NESTED])
def test_a_damaged_decathlon_list_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json: not a Decathlon dataset\.json"):
        read_msd(tmp_path, [], seed=0)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_decathlon_list_that_is_no_file_is_one_clear_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json: not a Decathlon dataset\.json .*a folder, a pipe or a device"):
        read_msd(tmp_path, [], seed=0)


def test_a_stamp_tells_a_changed_source(tmp_path: Path) -> None:
    raw = read_kits19(touch_kits19(tmp_path, 0), [], seed=0).cases[0]
    stamps = [raw.stamp()]
    raw.label.write_bytes(b"longer")
    stamps.append(raw.stamp())
    os.utime(raw.image, ns=(0, 1_234_567_890_123_456_789))
    stamps.append(raw.stamp())
    assert stamps[2] == [[0, 1_234_567_890_123_456_789], [6, raw.label.stat().st_mtime_ns]]
    assert len({json.dumps(stamp) for stamp in stamps}) == 3


def test_both_layouts_have_a_name() -> None:
    assert RAW_LAYOUTS["kits19"] is read_kits19
    assert RAW_LAYOUTS["msd"] is read_msd
