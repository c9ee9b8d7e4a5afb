"""Whether the folder is what preprocessing wrote: by stamps at once, by digests where a stamp is another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data_loading import integrity
from data_loading.dataset import case_file
from data_loading.index import INDEX_NAME, CaseRecord, read_index, write_json
from data_loading.integrity import (
    VERIFIED_NAME,
    FileWatch,
    check_files,
    file_md5,
    recorded_md5s,
    split_digest,
    verify_changed,
)
from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform

CASES = ["a", "b", "c"]
FILES = [f"{case}_{kind}.npy" for case in CASES for kind in "xy"]
SHAPE = (20, 12, 16)
SPLIT = {"train": ["b", "c"], "evaluation": ["a"]}

WritePreprocessed = Callable[..., Path]


def write(folder: Path, write_preprocessed: WritePreprocessed, index: bool = True) -> Path:
    rng = np.random.default_rng(0)
    cases = {case: (rng.normal(size=(1, *SHAPE)), rng.integers(0, 3, (1, *SHAPE))) for case in CASES}
    return write_preprocessed(folder, cases, index=index)


@pytest.fixture
def reference(tmp_path: Path, write_preprocessed: WritePreprocessed) -> Path:
    """As the MLPerf reference leaves it."""
    return write(tmp_path / "theirs", write_preprocessed, index=False)


@pytest.fixture
def folder(tmp_path: Path, write_preprocessed: WritePreprocessed) -> Path:
    """As preprocessing leaves it: with every file's MD5 and stamp."""
    folder = write(tmp_path / "ours", write_preprocessed)
    geometry = Geometry(np.eye(4), (4, 5, 6), (1.0, 1.0, 1.0))

    def describe(case: str, record: CaseRecord) -> CaseRecord:
        paths = {kind: case_file(folder, case, kind) for kind in "xy"}
        digests = {kind: hashlib.md5(path.read_bytes()).hexdigest() for kind, path in paths.items()}
        stamps = {kind: [path.stat().st_size, path.stat().st_mtime_ns] for kind, path in paths.items()}
        transform = GridTransform(source=geometry, resampled_shape=(4, 5, 6), padding_before=(0, 0, 0), shape=SHAPE)
        return replace(record, transform=transform, digests=digests, stamps=stamps)

    change_records(folder, describe)
    return folder


def change_records(folder: Path, change: Callable[[str, CaseRecord], CaseRecord]) -> None:
    index = read_index(folder / INDEX_NAME)
    cases = {case: change(case, record) for case, record in index.cases.items()}
    write_json(folder / INDEX_NAME, replace(index, cases=cases).to_json())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


# By stamps: nothing is read.


def test_a_folder_as_it_was_written_need_not_be_read(folder: Path) -> None:
    found = check_files(folder, CASES)
    assert (found.changed, found.without_digest) == ([], 0)
    assert found.sizes == {name: (folder / name).stat().st_size for name in FILES}
    assert found.shapes == dict.fromkeys(CASES, SHAPE)
    assert list(check_files(folder, ["b"]).sizes) == ["b_x.npy", "b_y.npy"]


OPENED: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        OPENED.append(str(arguments[0]))


def test_no_volume_is_opened_before_the_clock(folder: Path, reference: Path) -> None:
    sys.addaudithook(_listen)  # cannot be taken away again, and does no harm
    check_files(folder, CASES)
    os.utime(folder / FILES[0])
    check_files(folder, CASES)
    check_files(reference, CASES)
    opened = {Path(path).name for path in OPENED if path.startswith(str(folder.parent))}
    assert opened == {INDEX_NAME, VERIFIED_NAME}


def test_a_copied_touched_or_changed_file_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert check_files(copy, CASES).changed == [], "a copy that keeps the times"
    os.utime(folder / "b_y.npy")
    flip_byte(folder / "c_x.npy")
    assert check_files(folder, CASES).changed == ["b_y.npy", "c_x.npy"]
    assert check_files(folder, ["b"]).changed == ["b_y.npy"]
    change_records(copy, lambda _, record: replace(record, stamps={}))
    assert check_files(copy, CASES).changed == FILES, "a folder of an earlier version"


def test_without_digests_there_is_nothing_to_compare(folder: Path, reference: Path) -> None:
    found = check_files(reference, CASES)
    assert (found.changed, found.without_digest, found.shapes) == ([], 6, {})
    assert len(found.sizes) == 6
    os.utime(folder / "a_x.npy")
    change_records(folder, lambda case, record: replace(record, digests={}) if case == "a" else record)
    found = check_files(folder, CASES)
    assert (found.changed, found.without_digest) == ([], 2)
    for kind in "xy":
        shutil.copy(case_file(folder, "b", kind), case_file(folder, "new", kind))
    assert check_files(folder, ["new"]).without_digest == 2, "the index names no such case"


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    outside = {"x/../../../etc/passwd": "0" * 32}
    change_records(folder, lambda _, record: replace(record, digests=outside, stamps={"x/../..": [0, 0]}))
    assert (check_files(folder, CASES).changed, check_files(folder, CASES).without_digest) == ([], 6)


@pytest.mark.parametrize("kind", ["folder", "reference"])
def test_missing_files_are_counted_and_the_first_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    data_dir: Path = request.getfixturevalue(kind)
    (data_dir / "b_y.npy").unlink()
    with pytest.raises(UserError, match=r"b_y\.npy: missing; run preprocess_dataset\.py again"):
        check_files(data_dir, CASES)
    (data_dir / "c_x.npy").unlink()
    with pytest.raises(UserError, match=r"b_y\.npy: missing \(and 1 more\); run "):
        check_files(data_dir, CASES)
    assert len(check_files(data_dir, ["a"]).sizes) == 2, "of another case"


def test_a_folder_that_is_gone_is_one_clear_line(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"a_x\.npy: missing \(and 5 more\)"):
        check_files(folder, CASES)
    folder.touch()
    with pytest.raises(UserError, match=r"a_x\.npy: cannot be read: Not a directory"):
        check_files(folder, CASES)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_than_was_written_cannot_be_right(folder: Path, change: int) -> None:
    for name in ("a_y.npy", "b_x.npy"):
        os.truncate(folder / name, (folder / name).stat().st_size + change)
    with pytest.raises(UserError, match=r"a_y\.npy: truncated or overwritten, .* \(and 1 more\); run "):
        check_files(folder, CASES)


@pytest.mark.parametrize("sizes", [{"x": 500}, {"y": 128}, {"x": 0, "y": 0}])
def test_image_and_label_must_be_of_the_same_voxels(folder: Path, reference: Path, sizes: dict[str, int]) -> None:
    change_records(folder, lambda _, record: replace(record, stamps={}))
    for data_dir in (folder, reference):
        for kind, size in sizes.items():
            os.truncate(case_file(data_dir, "b", kind), size)
        with pytest.raises(UserError, match=r"b_x\.npy: its \d+ bytes and the \d+ of b_y\.npy cannot hold the same"):
            check_files(data_dir, CASES)


def test_channels_are_not_taken_for_a_wrong_size(tmp_path: Path, write_preprocessed: WritePreprocessed) -> None:
    cases = {"a": (np.zeros((4, *SHAPE)), np.zeros((1, *SHAPE)))}
    folder = write_preprocessed(tmp_path, cases)
    with pytest.raises(UserError, match="cannot hold the same number of voxels"):
        check_files(folder, ["a"])
    index = read_index(folder / INDEX_NAME)
    write_json(folder / INDEX_NAME, replace(index, spec=replace(index.spec, channels=4)).to_json())
    assert len(check_files(folder, ["a"]).sizes) == 2


# By digests.


def test_a_file_that_was_hashed_once_need_not_be_again(folder: Path) -> None:
    for name in FILES[:3]:
        os.utime(folder / name)
    verify_changed(folder, check_files(folder, CASES).changed)
    kept = json.loads((folder / VERIFIED_NAME).read_text())
    assert kept == {name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in FILES[:3]}
    assert check_files(folder, CASES).changed == []
    os.utime(folder / FILES[4])
    verify_changed(folder, [FILES[4]])
    assert check_files(folder, CASES).changed == [], "the others are still known"
    os.utime(folder / FILES[1])
    assert check_files(folder, CASES).changed == [FILES[1]]


def test_a_damaged_file_is_named_and_the_good_ones_are_kept(folder: Path) -> None:
    for name in ("a_x.npy", "b_x.npy", "b_y.npy"):
        os.utime(folder / name)
    flip_byte(folder / "b_x.npy")
    with pytest.raises(UserError, match=r"b_x\.npy: content differs from what preprocessing wrote; run ") as caught:
        verify_changed(folder, check_files(folder, CASES).changed)
    assert "--mode verify" in str(caught.value)
    assert check_files(folder, CASES).changed == ["b_x.npy"]
    flip_byte(folder / "c_x.npy")
    with pytest.raises(UserError, match=r"b_x\.npy: content .* \(and 1 more\)"):
        verify_changed(folder, check_files(folder, CASES).changed)
    with pytest.raises(UserError, match=r"c_x\.npy: content differs from what preprocessing wrote; "):
        verify_changed(folder, ["a_y.npy", "c_x.npy"])


def test_nothing_to_hash_leaves_no_trace(folder: Path, reference: Path) -> None:
    for data_dir in (folder, reference):
        before = sorted(os.listdir(data_dir))
        verify_changed(data_dir, check_files(data_dir, CASES).changed)
        assert sorted(os.listdir(data_dir)) == before


def test_a_file_that_goes_while_it_is_hashed_is_one_clear_line(folder: Path) -> None:
    os.utime(folder / "c_y.npy")
    changed = check_files(folder, CASES).changed
    (folder / "c_y.npy").unlink()
    with pytest.raises(UserError, match=r"c_y\.npy: cannot be read: No such file"):
        verify_changed(folder, changed)


def test_a_change_while_hashing_is_not_taken_for_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_and_touch(path: Path) -> str:
        md5 = file_md5(path)
        os.utime(path, ns=(5, 5))
        return md5

    monkeypatch.setattr(integrity, "file_md5", hash_and_touch)
    os.utime(folder / "a_x.npy")
    verify_changed(folder, ["a_x.npy"])
    assert check_files(folder, CASES).changed == ["a_x.npy"]


def test_where_nothing_can_be_kept_each_run_hashes(folder: Path) -> None:
    (folder / VERIFIED_NAME).mkdir()
    os.utime(folder / "a_x.npy")
    for _ in range(2):
        verify_changed(folder, check_files(folder, CASES).changed)
        assert check_files(folder, CASES).changed == ["a_x.npy"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a_x.npy": 3}', '{"a_x.npy": [[]]}', "\udcff"])
def test_a_damaged_list_of_verified_files_is_as_none(folder: Path, content: str) -> None:
    os.utime(folder / "a_x.npy")
    (folder / VERIFIED_NAME).write_bytes(content.encode(errors="surrogateescape"))
    assert check_files(folder, CASES).changed == ["a_x.npy"]
    verify_changed(folder, ["a_x.npy"])
    assert check_files(folder, CASES).changed == []


def test_md5_is_hashlibs_over_any_size(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        content = np.random.default_rng(size).bytes(size)
        (tmp_path / "a").write_bytes(content)
        assert file_md5(tmp_path / "a") == hashlib.md5(content).hexdigest()
    with pytest.raises(UserError, match="none: cannot be read: No such file"):
        file_md5(tmp_path / "none")


# Which data a run trains on.


def test_the_splits_digest_tells_data_and_split_apart(folder: Path, tmp_path: Path) -> None:
    ours = split_digest(folder, SPLIT)
    assert len(ours) == 64
    assert set(ours) <= set("0123456789abcdef")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    change_records(copy, lambda _, record: replace(record, stamps={}))
    assert split_digest(copy, SPLIT) == ours, "a copy of other times"
    assert split_digest(folder, dict(reversed(SPLIT.items()))) == ours
    other_splits: list[dict[str, list[str]]] = [
        {"train": ["c", "b"], "evaluation": ["a"]},  # a sample follows from its case's place
        {"train": ["a", "b"], "evaluation": ["c"]},
        {"train": ["b", "c"], "evaluation": []},
        {"train": ["b"], "evaluation": ["c", "a"]},
    ]
    assert len({ours, *(split_digest(folder, split) for split in other_splits)}) == 5
    only_b = split_digest(folder, {"train": ["b"]})
    change_records(folder, lambda case, r: replace(r, digests={**r.digests, "y": "0" * 32}) if case == "c" else r)
    assert split_digest(folder, SPLIT) != ours
    assert split_digest(folder, {"train": ["b"]}) == only_b, "c is in no subset"


def test_of_a_folder_of_the_reference_it_is_the_splits_alone(folder: Path, reference: Path, tmp_path: Path) -> None:
    theirs = split_digest(reference, SPLIT)
    assert theirs == split_digest(tmp_path / "nowhere", SPLIT) != split_digest(folder, SPLIT)
    assert theirs != split_digest(reference, {"train": ["b", "c"]})


# Files that change under way.


def vanish(path: Path) -> None:
    path.unlink()


def lose_the_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def cut_off(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 200)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 1))


def replace_by_a_twin(path: Path) -> None:
    shutil.copy2(path, path.with_name("twin"))
    os.replace(path.with_name("twin"), path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (vanish, "vanished"),
        (lose_the_folder, "vanished"),
        (cut_off, "changed"),
        (rewrite, "changed"),
        (replace_by_a_twin, "changed"),
    ],
)
def test_a_watch_tells_what_became_of_a_file(folder: Path, change: Callable[[Path], None], word: str) -> None:
    watched = [folder / "a_x.npy", folder / "a_y.npy"]
    watch = FileWatch(watched)
    watch.check()
    assert len((folder / "a_y.npy").read_bytes()) > 200
    watch.check()
    change(folder / "a_y.npy")
    first = "a_x" if change is lose_the_folder else "a_y"
    with pytest.raises(UserError, match=rf"{first}\.npy: {word} while training.*; run .* start again with --resume"):
        watch.check()


def test_a_file_that_was_missing_is_no_change_until_it_comes(tmp_path: Path) -> None:
    watch = FileWatch([tmp_path / "a"])
    watch.check()
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a: changed while training"):
        watch.check()


def test_recorded_md5s_are_those_of_all_files_or_none(folder: Path, tmp_path: Path) -> None:
    """No volume is there to be read."""
    digests = {name: file_md5(folder / name) for name in FILES}
    for name in FILES:
        (folder / name).unlink()
    assert recorded_md5s(folder, CASES) == digests
    assert recorded_md5s(folder, CASES[:1]) == {name: md5 for name, md5 in digests.items() if name[0] == CASES[0][0]}
    assert recorded_md5s(folder, [*CASES, "d"]) == recorded_md5s(folder, []) == {}
    change_records(folder, lambda case, record: replace(record, digests={}) if case == "b" else record)
    assert recorded_md5s(folder, CASES) == recorded_md5s(tmp_path / "nowhere", CASES) == {}
