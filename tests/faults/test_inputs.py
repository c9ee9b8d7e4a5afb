"""Damaged inputs: the real programs keep the promise, and the harness detects programs that do not."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from tests.faults import inputs
from tests.faults.damage import MARKER, NIFTI_FIELDS, NPY_HEADERS, WEIGHTS, damage, kinds_for
from tests.faults.inputs import HANG, HARMLESS, REFUSED, SILENT, STRAY, TRACEBACK, UNCLEAR, damaged_inputs, judge
from tests.faults.subjects import Program, Subject, make_subject, make_subjects

FILE = Path("scan_1.npy")


def test_damaged_inputs(tmp_path: Path) -> None:
    row = damaged_inputs(tmp_path, tries=40)
    assert row.failures == ()
    assert (row.tried, row.kept) == (40, 40)


def copy(data: Path, out: Path) -> int:
    """A program that accepts every input."""
    shutil.copytree(data, out)
    return 0


def digest(out: Path) -> str:
    return hashlib.sha256((out / FILE).read_bytes()).hexdigest()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    np.save(folder / FILE, np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))
    return folder


def outcome_of(good: Path, program: Program, content: bytes | None = None, limit_s: float = 5.0) -> str:
    """Returns the outcome of a program for a file with this content; None: the undamaged one."""
    subject = Subject(
        name="good", good=good, program=program, result=digest, expected=digest(good), share=1.0, has_checksum=()
    )
    folder = good.parent / "try"
    shutil.copytree(good, folder / "data")
    if content is not None:
        (folder / "data" / FILE).write_bytes(content)
    return judge(subject, folder, FILE, limit_s).outcome


def refuse(*lines: str) -> Program:
    def program(data: Path, out: Path) -> int:
        for line in lines[:-1]:
            print(line, file=sys.stderr)
        raise UserError(lines[-1])

    return program


def fail(data: Path, out: Path) -> int:
    raise ValueError("damaged")


def give_up(data: Path, out: Path) -> int:
    raise SystemExit("scan_1.npy: damaged")


def sleep(data: Path, out: Path) -> int:
    time.sleep(60)
    return 0


def swallow(data: Path, out: Path) -> int:
    try:
        return sleep(data, out)
    except Exception:
        return 0


def warn(data: Path, out: Path) -> int:
    warnings.warn("scan_1.npy looks odd", RuntimeWarning, stacklevel=1)
    raise UserError("scan_1.npy: damaged")


def unpickle(data: Path, out: Path) -> int:
    (data / MARKER).touch()  # as a hostile pickle does
    raise UserError("scan_1.npy: damaged")


def leave_the_folder(data: Path, out: Path) -> int:
    (data / ".." / ".." / "x").touch()
    raise UserError("scan_1.npy: damaged")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (copy, SILENT),
        (refuse("scan_1.npy: damaged"), REFUSED),
        (refuse("scan_1: its image is damaged"), REFUSED),
        (refuse("some file is damaged"), UNCLEAR),
        (refuse("scan_1.npy is read", "scan_1.npy: damaged"), UNCLEAR),
        (warn, UNCLEAR),
        (lambda data, out: 3, UNCLEAR),
        (fail, TRACEBACK),
        (give_up, TRACEBACK),
        (unpickle, STRAY),
        (leave_the_folder, STRAY),
    ],
)
def test_every_reaction_to_a_damaged_file_is_classified(good: Path, program: Program, outcome: str) -> None:
    assert outcome_of(good, program, b"damaged") == outcome


@pytest.mark.parametrize("program", [sleep, swallow])
def test_a_program_that_does_not_end_is_a_hang(good: Path, program: Program) -> None:
    assert outcome_of(good, program, b"damaged", limit_s=0.1) == HANG


def test_the_same_result_is_harmless(good: Path) -> None:
    def ignore_damage(data: Path, out: Path) -> int:
        return copy(good, out)

    assert outcome_of(good, ignore_damage, b"damaged") == HARMLESS


def test_a_program_that_accepts_everything_fails_every_try(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(data: Path, out: Path) -> int:
        out.mkdir()
        (out / FILE).write_text(repr((data / FILE).lstat()) + str((data / FILE).is_file()))
        return 0

    subject = make_subject(good, take, digest, has_checksum=(".npy",))
    monkeypatch.setattr(inputs, "make_subjects", lambda work_dir: [subject])
    row = damaged_inputs(tmp_path, tries=5, seed=3)
    assert (row.tried, row.kept, len(row.failures)) == (5, 0, 5)
    assert all(line.startswith(f"{SILENT}: good/scan_1.npy: ") for line in row.failures)
    assert [line.split("(")[-1].split(")")[0] for line in row.failures] == [f"seed 3, try {n}" for n in range(5)]
    assert not (tmp_path / "try").exists()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return make_subjects(tmp_path_factory.mktemp("subjects"))


def test_the_subjects_results_are_reproducible(subjects: list[Subject], tmp_path: Path) -> None:
    for subject in subjects:
        subject.program(subject.good, tmp_path / subject.name)
        assert subject.result(tmp_path / subject.name) == subject.expected


def every_file(subjects: list[Subject]) -> list[tuple[Subject, Path]]:
    return [(subject, path) for subject in subjects for path in sorted(subject.good.rglob("*")) if path.is_file()]


def state(path: Path) -> tuple[str, bytes]:
    is_plain = path.is_file() and not path.is_symlink()
    return oct(path.lstat().st_mode), path.read_bytes() if is_plain else b""


def test_every_kind_of_damage_changes_the_file_and_is_seeded(subjects: list[Subject], tmp_path: Path) -> None:
    seen = set()
    for subject, path in every_file(subjects):
        for kind, apply in kinds_for(path, path.suffix in subject.has_checksum).items():
            states = []
            for _ in range(2):
                folder = tmp_path / "folder"  # the same name, which a pickle and a link contain
                folder.mkdir()
                shutil.copy(path, folder)
                apply(folder / path.name, np.random.default_rng(0))
                states.append(state(folder / path.name))
                shutil.rmtree(folder)
            assert states[0] == states[1]
            assert states[0] != state(path), f"{kind} did not change {path}"
            seen.add(kind)
    assert seen == set(WEIGHTS)


def test_one_to_three_bits_flip(subjects: list[Subject], tmp_path: Path) -> None:
    path = next(subjects[2].good.glob("*_x.npy"))
    good = np.frombuffer(path.read_bytes(), np.uint8)
    counts = set()
    for seed in range(20):
        shutil.copy(path, tmp_path / "a.npy")
        kinds_for(tmp_path / "a.npy", True)["flipped bits"](tmp_path / "a.npy", np.random.default_rng(seed))
        damaged = np.frombuffer((tmp_path / "a.npy").read_bytes(), np.uint8)
        counts.add(int(np.unpackbits(good ^ damaged).sum()))
    assert counts == {1, 2, 3}


def test_bits_are_flipped_only_in_files_with_a_checksum(subjects: list[Subject]) -> None:
    flipped = {
        (subject.name, path.suffix)
        for subject, path in every_file(subjects)
        if "flipped bits" in kinds_for(path, path.suffix in subject.has_checksum)
    }
    expected = {("msd", ".gz"), ("kits19", ".gz"), ("preprocessed", ".npy"), ("preprocessed", ".json")}
    assert flipped == expected


@pytest.mark.parametrize(
    ("suffix", "names"), [(".nii.gz", NIFTI_FIELDS), (".nii", NIFTI_FIELDS), (".npy", NPY_HEADERS)]
)
def test_every_hostile_header_is_drawn(
    subjects: list[Subject], tmp_path: Path, suffix: str, names: dict[str, object]
) -> None:
    path = next(path for _, path in every_file(subjects) if path.name.endswith(suffix))
    seen = set()
    for seed in range(400):
        shutil.copy(path, tmp_path)
        hostile: Callable[[Path, np.random.Generator], str] = kinds_for(path, False)["hostile header"]
        seen.add(hostile(tmp_path / path.name, np.random.default_rng(seed)).removeprefix("header with "))
    assert set(names) < seen


def test_only_applicable_kinds_of_damage_are_drawn(good: Path) -> None:
    content = (good / FILE).read_bytes()
    seen = set()
    for seed in range(100):
        shutil.rmtree(good)
        good.mkdir()
        (good / FILE).write_bytes(content)
        seen.add(damage(good / FILE, True, np.random.default_rng(seed))[0])
    assert seen == set(WEIGHTS) - {"gzip bomb"}
