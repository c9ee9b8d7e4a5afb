"""The preprocessed folder: its index, its arrays, and what is said when it is another folder or a damaged one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import UserError
from data_loading import dataset as dataset_module
from data_loading.dataset import case_file, load_boxes, map_array, map_case, read_case, read_spec_and_split
from data_loading.index import (
    INDEX_NAME,
    PARTIAL_INDEX_NAME,
    CaseRecord,
    DatasetIndex,
    PseudoLabels,
    is_safe_case_id,
    read_index,
    write_json,
)
from data_loading.io.volume import Geometry
from data_loading.preprocessing import Boxes, GridTransform
from data_loading.spec import KITS19, DatasetSpec

TRANSFORM = GridTransform(
    source=Geometry(np.diag([3.0, 2.0, 1.0, 1.0]), (4, 5, 6), (3.0, 2.0, 1.0)),
    resampled_shape=(7, 8, 9),
    padding_before=(1, 2, 3),
    shape=(9,) * 3,
)
RECORD = CaseRecord(
    transform=TRANSFORM,
    boxes={1: [(0, 1, 2, 3, 4, 5), (1, 1, 1, 2, 2, 2)], 2: [(0, 0, 0, 1, 1, 1)]},
    digests={"x": "a" * 32, "y": "b" * 32},
    source_stamp=[[10, 1_700_000_000_123_456_789], [20, 5]],
    statistics={"mean": -0.25, "std": 1.5},
    stamps={"x": [2916, 1_700_000_000_123_456_789], "y": [857, 7]},
)
INDEX = DatasetIndex(spec=KITS19, split={"train": ["case_1", "case_2"], "evaluation": ["case_0"]}, cases={})
INDEX.cases.update({f"case_{number}": RECORD for number in (2, 0, 1)})


# Outside of the case, empty, or no box.
NO_BOXES = ((0, 0, 0, 9, 9, 10), (-1, 0, 0, 3, 3, 3), (0, 0, 0, 10**30, 2, 2), (2, 2, 2, 2, 3, 3), (0, 0, 3, 3), ())


def changed(**changes: Any) -> str:
    """An index with other contents, as of the first version: without its own digest."""
    content = json.loads(json.dumps(INDEX.to_json()))
    content.pop("digest", None)
    return json.dumps({**content, **changes})


def test_an_index_comes_back_whole(tmp_path: Path) -> None:
    write_json(tmp_path / INDEX_NAME, INDEX.to_json())
    read = read_index(tmp_path / INDEX_NAME)
    assert (read.spec, read.split, list(read.cases)) == (KITS19, INDEX.split, ["case_0", "case_1", "case_2"])
    record = read.cases["case_1"]
    assert record.transform is not None
    np.testing.assert_array_equal(record.transform.source.affine, TRANSFORM.source.affine)
    assert replace(record.transform, source=TRANSFORM.source) == TRANSFORM
    assert replace(record, transform=None) == replace(RECORD, transform=None)
    write_json(
        tmp_path / INDEX_NAME, replace(INDEX, cases={"case_1": replace(RECORD, transform=None)}, split={}).to_json()
    )
    assert read_index(tmp_path / INDEX_NAME).cases["case_1"].transform is None


def test_an_index_of_an_earlier_version_has_no_stamps(tmp_path: Path) -> None:
    records = {case: record.to_json() for case, record in INDEX.cases.items()}
    for record in records.values():
        del record["stamps"]
    (tmp_path / INDEX_NAME).write_text(changed(cases=records))
    read = read_index(tmp_path / INDEX_NAME).cases["case_1"]
    assert replace(read, transform=None) == replace(RECORD, transform=None, stamps={})


def test_keys_of_an_earlier_version_are_read_under_their_present_names(tmp_path: Path) -> None:
    new = replace(INDEX, spec=replace(KITS19, intensity="none"), provenance={"made": 1})
    pseudo = PseudoLabels(cases=["case_2"], teacher="a" * 64, threshold=0.9, max_share=0.25)
    content = json.loads(json.dumps(replace(new, pseudo_labels=pseudo).to_json()))
    content["made"], content["pseudo"] = content.pop("provenance"), content.pop("pseudo_labels")
    content["spec"]["deviation"] = content["spec"].pop("std")
    for record in content["cases"].values():
        record["statistics"]["deviation"] = record["statistics"].pop("std")
        record["transform"]["by_area"] = record["transform"].pop("half_pixel")
    content["digest"] = hashlib.sha256(
        json.dumps({key: value for key, value in content.items() if key != "digest"}, sort_keys=True).encode()
    ).hexdigest()
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    read = read_index(tmp_path / INDEX_NAME)
    assert (read.spec, read.split, read.provenance, read.pseudo_labels) == (new.spec, INDEX.split, {"made": 1}, pseudo)
    assert read.to_json() == replace(new, pseudo_labels=pseudo).to_json()


@pytest.mark.parametrize(
    "spec",
    [
        KITS19,
        DatasetSpec(name="own", classes=("background", "one"), channels=4),
        replace(KITS19, spacing_mm=None, mean=None),
    ],
)
def test_a_spec_comes_back_whole(spec: DatasetSpec) -> None:
    assert DatasetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(INDEX.to_json())[:-20], "damaged"),
        ("\udcff", "damaged"),
        (changed(format=2), "format 2, expected 1; preprocess again"),
        (changed(spec={"name": "kits19"}), r"spec has unknown or missing fields"),
        (changed(spec={**KITS19.to_json(), "colour": 1}), r"unknown or missing fields \['colour'\]"),
        (changed(cases={"case_0": {}}), "damaged"),
        (changed(cases=[]), "damaged"),
        (changed(cases={"case_0": {**RECORD.to_json(), "digests": None}}), "damaged"),
        (changed(cases={"case_0": {**RECORD.to_json(), "stamps": {"x": [1]}}}), "damaged"),
        (changed(cases={"case_0": {**RECORD.to_json(), "stamps": {"x": [1, "soon"]}}}), "damaged"),
        *((changed(cases={"case_0": {**RECORD.to_json(), "boxes": {"1": [box]}}}), "damaged") for box in NO_BOXES),
        (changed(cases={"case_0": {**RECORD.to_json(), "stamps": {"x": [2915, 7], "y": [857, 7]}}}), "damaged"),
        (changed(split={"train": ["case_1", "case_9"]}), "lists a case twice or one that does not exist"),
        (changed(split={"train": ["case_1"], "evaluation": ["case_1"]}), "lists a case twice"),
        (changed(cases={"../case_0": RECORD.to_json()}, split={}), r"'\.\./case_0' is not a case id"),
    ],
)
def test_a_damaged_index_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_index(tmp_path / INDEX_NAME)
    assert INDEX_NAME in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_index_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: cannot be read: No such file"):
        read_index(tmp_path / INDEX_NAME)


def test_an_index_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / INDEX_NAME
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == [INDEX_NAME]


@pytest.mark.parametrize("case", ["case_00000", "hippocampus_001", "a.b", "patient 7", "äö"])
def test_case_ids_that_are_file_names(case: str) -> None:
    assert is_safe_case_id(case)


@pytest.mark.parametrize("case", ["", ".", "..", ".hidden", "a/b", "/etc/passwd", "..\\x", "a\0b"])
def test_case_ids_that_leave_the_folder(case: str) -> None:
    assert not is_safe_case_id(case)


def test_peek_reads_the_index_and_no_volume(tmp_path: Path) -> None:
    write_json(tmp_path / INDEX_NAME, INDEX.to_json())
    assert read_spec_and_split(tmp_path, ["00007"]) == (replace(KITS19, orientation="RAS"), INDEX.split)


def test_peek_finds_the_orientation_that_all_cases_have(tmp_path: Path) -> None:
    turned = replace(TRANSFORM, source=replace(TRANSFORM.source, affine=np.diag([-1.0, -1.0, 1.0, 1.0])))
    for case, orientation in (("case_0", None), ("case_1", None), ("case_2", "LPS")):
        INDEX.cases[case] = replace(RECORD, transform=turned)
        write_json(tmp_path / INDEX_NAME, INDEX.to_json())
        assert read_spec_and_split(tmp_path, [])[0].orientation == orientation
    INDEX.cases.update({f"case_{number}": RECORD for number in (2, 0, 1)})


def test_peek_opens_a_folder_of_the_reference_by_its_file_names(tmp_path: Path) -> None:
    for number in (3, 0, 7, 5):
        for kind in "xy":
            case_file(tmp_path, f"case_{number:05d}", kind).touch()
    (tmp_path / "checksum.json").touch()
    spec, split = read_spec_and_split(tmp_path, ["00000", "00005", "00206"])
    assert spec == replace(KITS19, orientation="IPL")
    assert split == {"train": ["case_00003", "case_00007"], "evaluation": ["case_00000", "case_00005"]}


def test_peek_does_not_take_half_a_data_set_for_one_of_the_reference(tmp_path: Path) -> None:
    for kind in "xy":
        case_file(tmp_path, "case_00000", kind).touch()
    write_json(tmp_path / PARTIAL_INDEX_NAME, {})
    with pytest.raises(UserError, match="preprocessing is incomplete; run preprocess_dataset"):
        read_spec_and_split(tmp_path, [])
    write_json(tmp_path / INDEX_NAME, INDEX.to_json())
    assert read_spec_and_split(tmp_path, [])[1] == INDEX.split


def test_peek_names_the_folder_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder"):
        read_spec_and_split(tmp_path / "none", [])
    with pytest.raises(UserError, match=r"no preprocessed cases in it; run preprocess_dataset\.py first"):
        read_spec_and_split(tmp_path, [])
    data = tmp_path / "data" / "kits19"
    inner = data / "logs"
    inner.mkdir(parents=True)
    write_json(data / INDEX_NAME, INDEX.to_json())
    with pytest.raises(UserError, match=f"no preprocessed cases in it; did you mean {data}\\?"):
        read_spec_and_split(data.parent, [])
    with pytest.raises(UserError, match=f"did you mean {data}\\?"):
        read_spec_and_split(inner, [])
    (data / INDEX_NAME).unlink()
    case_file(data, "case_00000", "x").touch()
    with pytest.raises(UserError, match=f"did you mean {data}\\?"):
        read_spec_and_split(data.parent, [])
    for raw in ("raw/case_00000/imaging.nii.gz", "msd/imagesTr/a.nii.gz"):
        (tmp_path / raw).parent.mkdir(parents=True)
        (tmp_path / raw).touch()
        with pytest.raises(UserError, match=r"these are raw scans, run preprocess_dataset\.py on them first"):
            read_spec_and_split(tmp_path / raw.split("/")[0], [])


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    np.save(tmp_path / "a_x.npy", array)
    mapped = map_array(tmp_path / "a_x.npy", np.float32)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, array)


class Trap:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_opened(tmp_path: Path) -> None:
    path, sprung = tmp_path / "a_x.npy", tmp_path / "sprung"
    with path.open("wb") as stream:
        np.save(stream, np.array([[[[Trap(sprung)]]]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a_x\.npy: damaged"):
        map_array(path, np.float32)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match=r"a_x\.npy: damaged"):
        map_array(path, np.float32)
    assert not sprung.exists()


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a_x.npy").mkdir()
    with pytest.raises(UserError, match=r"a_x\.npy: cannot be read: Is a directory"):
        map_array(tmp_path / "a_x.npy", np.float32)


def test_a_case_is_read_whole(tmp_path: Path) -> None:
    image = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    label = np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(1, 3, 4, 5))
    np.save(tmp_path / "a_x.npy", image)
    np.save(tmp_path / "a_y.npy", label)
    for read, written in zip(read_case(tmp_path, "a"), (image, label), strict=True):
        assert not isinstance(read, np.memmap)
        assert (read.dtype, read.flags.writeable) == (written.dtype, True)
        np.testing.assert_array_equal(read, written)


@pytest.mark.parametrize("shape", [None, (1, 9, 8, 8), (1, 4, 4, 4)])
def test_a_case_that_changes_while_it_is_read_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...] | None
) -> None:
    for kind, dtype in (("x", np.float32), ("y", np.uint8)):
        np.save(case_file(tmp_path, "a", kind), np.zeros((1, 8, 8, 8), dtype))

    def map_and_change(data_dir: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        mapped = map_case(data_dir, case)
        if shape is None:
            os.truncate(case_file(data_dir, case, "y"), 300)
        else:
            np.save(tmp_path / "other.npy", np.zeros(shape, np.uint8))
            os.replace(tmp_path / "other.npy", case_file(data_dir, case, "y"))
        return mapped

    monkeypatch.setattr(dataset_module, "map_case", map_and_change)
    with pytest.raises(UserError, match=r"a_y\.npy: vanished or changed while it was read; run "):
        read_case(tmp_path, "a")


def npy_bytes(array: NDArray[Any]) -> bytes:
    with tempfile.TemporaryFile() as stream:
        np.save(stream, array)
        stream.seek(0)
        return stream.read()


GOOD = npy_bytes(np.zeros((1, 2, 3, 4), np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"no array", "damaged"),
        (GOOD[:-1], "damaged"),
        (GOOD[:60], "damaged"),
        (GOOD.replace(b"(1, 2, 3, 4)", b"(1, 2, 3, 9)"), "damaged"),
        (GOOD.replace(b"(1, 2, 3, 4)", b"(1, 2, 3, 4 "), "damaged"),
        (GOOD.replace(b"'<f4'", b"'<,4'"), "damaged"),
        (npy_bytes(np.zeros((1, 2, 3, 4))), "expected a 4-D float32 array, found 4-D float64"),
        (npy_bytes(np.zeros((1, 2, 3, 4), np.uint8)), "expected a 4-D float32 array, found 4-D uint8"),
        (npy_bytes(np.zeros((2, 3, 4), np.float32)), "expected a 4-D float32 array, found 3-D float32"),
    ],
)
def test_a_damaged_array_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a_x.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"a_x\.npy: {message}"):
        map_array(tmp_path / "a_x.npy", np.float32)


def test_no_array_and_an_archive_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a_y\.npy: missing; run preprocess_dataset\.py again"):
        map_array(tmp_path / "a_y.npy", np.uint8)
    with zipfile.ZipFile(tmp_path / "a_y.npy", "w") as archive:
        archive.writestr("array.npy", GOOD)
    with pytest.raises(UserError, match=r"a_y\.npy: damaged; run preprocess_dataset.py --mode verify, then again$"):
        map_array(tmp_path / "a_y.npy", np.uint8)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 127), st.sampled_from(b"'(),:{}<|fO0129 \n\xff")), min_size=1, max_size=4)
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_any_corruption_of_an_arrays_header_is_refused_or_harmless(edits: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, value in edits:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a_x.npy"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert map_array(path, np.float32).ndim == 4


def test_boxes_come_from_the_index_or_from_the_labels(
    tmp_path: Path, write_preprocessed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    label = np.zeros((1, 6, 7, 8), np.uint8)
    label[0, 1:3, 1:3, 1:3], label[0, 5, 5, 5] = 1, 2
    empty = np.zeros_like(label)
    cases = {"case_00001": (empty, empty), "case_00002": (label, label), "case_00003": (label, label)}
    indexed = write_preprocessed(tmp_path / "ours", cases)
    reference = write_preprocessed(tmp_path / "theirs", cases, index=False)
    wanted = ["case_00003", "case_00001"]
    expected = [{1: [(1, 1, 1, 3, 3, 3)], 2: [(5, 5, 5, 6, 6, 6)]}, {}]
    assert load_boxes(reference, wanted, 3) == expected
    monkeypatch.setattr(dataset_module, "map_array", lambda *_: pytest.fail("the index has them"))
    assert load_boxes(indexed, wanted, 3) == expected


def test_a_reference_folders_boxes_are_found_once(
    tmp_path: Path, write_preprocessed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    label = np.zeros((1, 8, 8, 8), np.uint8)
    label[0, 1:3, 1:3, 1:3] = 1
    folder = write_preprocessed(tmp_path, {case: (label.astype(np.float32), label) for case in ("a", "b")}, index=False)
    seen: list[int] = []
    find = dataset_module.foreground_boxes

    def counted(mask: np.ndarray, classes: int) -> Boxes:
        seen.append(int(mask.sum()))
        return find(mask, classes)

    monkeypatch.setattr(dataset_module, "foreground_boxes", counted)
    expected = [{1: [(1, 1, 1, 3, 3, 3)]}] * 2
    assert load_boxes(folder, ["a", "b"], 3) == load_boxes(folder, ["a", "b"], 3) == expected
    assert seen == [8, 8]
    label[0, 6, 6, 6] = 1
    np.save(folder / "b_y.npy", label)
    os.utime(folder / "b_y.npy", ns=(0, 1))
    assert load_boxes(folder, ["b"], 3) == [{1: [(1, 1, 1, 3, 3, 3), (6, 6, 6, 7, 7, 7)]}]
    assert load_boxes(folder, ["a"], 3) == expected[:1], "a's are still kept"
    assert seen == [8, 8, 9]
    assert load_boxes(folder, ["a"], 2) == expected[:1]
    assert len(seen) == 4, "other classes may have other boxes"
    (folder / dataset_module.BOXES_NAME).write_text("{damaged")
    assert load_boxes(folder, ["a"], 3) == expected[:1]
    assert len(seen) == 5


def test_boxes_are_found_where_nothing_can_be_kept(
    tmp_path: Path, write_preprocessed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    label = np.ones((1, 4, 4, 4), np.uint8)
    folder = write_preprocessed(tmp_path, {"a": (label.astype(np.float32), label)}, index=False)

    def refuse(path: Path, content: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(dataset_module, "write_json", refuse)
    assert load_boxes(folder, ["a"], 2) == [{1: [(0, 0, 0, 4, 4, 4)]}]
    assert not (folder / dataset_module.BOXES_NAME).exists()
