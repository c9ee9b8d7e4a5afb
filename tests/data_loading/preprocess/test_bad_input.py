"""Bad input of preprocess_dataset.py: one line on stderr and exit status 2."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError, run_program
from data_loading.index import INDEX_NAME
from data_loading.io.volume import Geometry, Volume
from data_loading.readers.base import RawCase, RawDataset
from data_loading.spec import DatasetSpec
from data_loading.writer import preprocess
from preprocess_dataset import main
from tests.data_loading.preprocess.program import (
    F32,
    PROGRAM,
    RunPython,
    WriteRaw,
    flip_byte,
)


class Raw:
    """A synthetic data set to damage; `arguments` is the command line that reads it."""

    def __init__(self, root: Path, layout: str, data: Path) -> None:
        self.root, self.data, self.out = root, data, root / "out"
        self.arguments: list[object] = ["--data_dir", data, "--results_dir", self.out, "--dataset", layout]

    def scan(self, kind: str) -> Path:
        return self.data / {"image": "imagesTr", "label": "labelsTr"}[kind] / "scan_1.nii.gz"

    def change(self, kind: str, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
        nib.save(change(nib.load(self.scan(kind))), self.scan(kind))

    def values(self, kind: str, value: float) -> None:
        """Writes one value into a scan, which becomes float32."""
        array = np.asarray(nib.load(self.scan(kind)).dataobj, dtype=F32).copy()
        array[1, 2, 3] = value
        self.change(kind, lambda scan: nib.Nifti1Image(array, scan.affine))

    def cases(self, **first: str) -> None:
        path = self.data / "dataset.json"
        content = json.loads(path.read_text())
        content["training"][0].update(first)
        path.write_text(json.dumps(content))


def other_grid(scan: nib.Nifti1Image, shape: int = 0, shift_mm: float = 0.0, scale: float = 1.0) -> nib.Nifti1Image:
    array = np.asarray(scan.dataobj)
    affine = scan.affine.copy()
    affine[1, 3] += shift_mm
    affine[2, 2] *= scale
    return nib.Nifti1Image(np.pad(array, [(0, 0), (0, shape), (0, 0)]), affine)


def huge(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes())[:348])
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def below_a_file(raw: Raw) -> None:
    (raw.root / "file").touch()
    raw.arguments[3] = raw.root / "file" / "out"


def a_file(raw: Raw) -> None:
    raw.out.touch()


def replace_argument(raw: Raw, name: str, value: object) -> None:
    raw.arguments[raw.arguments.index(name) + 1] = value


DAMAGED: dict[str, tuple[str, Callable[[Raw], Any], str]] = {
    "no folder": ("msd", lambda raw: replace_argument(raw, "--data_dir", raw.root / "none"), "none: no such folder"),
    "no data_dir": ("msd", lambda raw: raw.arguments.__delitem__(slice(0, 2)), "--data_dir None: no such folder"),
    "msd: too high": ("msd", lambda raw: replace_argument(raw, "--data_dir", raw.root), "did you mean {data}?"),
    "msd: too low": (
        "msd",
        lambda raw: replace_argument(raw, "--data_dir", raw.data / "imagesTr"),
        "did you mean {data}?",
    ),
    "kits19: too high": ("kits19", lambda raw: replace_argument(raw, "--data_dir", raw.root), "did you mean {data}?"),
    "kits19: too low": (
        "kits19",
        lambda raw: replace_argument(raw, "--data_dir", raw.data / "case_00000"),
        "did you mean its parent {data}?",
    ),
    "kits19 as msd": ("kits19", lambda raw: replace_argument(raw, "--dataset", "msd"), "use --dataset kits19"),
    "msd as kits19": ("msd", lambda raw: replace_argument(raw, "--dataset", "kits19"), "use --dataset msd"),
    "no cases": ("kits19", lambda raw: shutil.rmtree(raw.data / "case_00000"), "no case_00000 … in it"),
    "no mask": (
        "kits19",
        lambda raw: (raw.data / "case_00000" / "segmentation.nii.gz").unlink(),
        "case_00000: its mask",
    ),
    "no image": ("kits19", lambda raw: (raw.data / "case_00000" / "imaging.nii.gz").unlink(), "case_00000: its image"),
    "msd: no mask": ("msd", lambda raw: raw.scan("label").unlink(), "scan_1: its mask"),
    "no list": ("msd", lambda raw: (raw.data / "dataset.json").unlink(), "no dataset.json in it"),
    "damaged list": ("msd", lambda raw: (raw.data / "dataset.json").write_text("{"), "not a Decathlon dataset.json"),
    "a path outside": ("msd", lambda raw: raw.cases(image="../x.nii.gz"), "'../x.nii.gz' is outside the data folder"),
    "an absolute path": ("msd", lambda raw: raw.cases(label="/etc/hostname"), "is outside the data folder"),
    "shapes differ": (
        "msd",
        lambda raw: raw.change("label", lambda scan: other_grid(scan, shape=1)),
        "scan_1: the image has shape (8, 10, 10) but its mask (8, 11, 10)",
    ),
    "origins differ": (
        "msd",
        lambda raw: raw.change("label", lambda scan: other_grid(scan, shift_mm=0.5)),
        "scan_1: the affines of image and mask differ by 0.5 mm at the origin",
    ),
    "spacings differ": (
        "msd",
        lambda raw: raw.change("image", lambda scan: other_grid(scan, scale=1.5)),
        "scan_1: the affines of image and mask differ by 0.5 mm at axis 2",
    ),
    "damaged image": ("msd", lambda raw: flip_byte(raw.scan("image"), 2000), "imagesTr/scan_1.nii.gz: damaged"),
    "damaged mask": ("msd", lambda raw: flip_byte(raw.scan("label"), -5), "labelsTr/scan_1.nii.gz: damaged"),
    "huge header": ("msd", lambda raw: huge(raw.scan("image")), "claims (32767, 32767, 32767) voxels"),
    "empty image": ("msd", lambda raw: raw.scan("image").write_bytes(b""), "scan_1.nii.gz: not a NIfTI file"),
    "NaN in the image": ("msd", lambda raw: raw.values("image", np.nan), "the scan contains NaN or infinity"),
    "infinity in the image": ("msd", lambda raw: raw.values("image", np.inf), "the scan contains NaN or infinity"),
    "NaN in the mask": ("msd", lambda raw: raw.values("label", np.nan), "the mask holds NaN or infinity"),
    "half a class": ("msd", lambda raw: raw.values("label", 0.5), "a mask must hold whole numbers"),
    "a class too many": (
        "msd",
        lambda raw: raw.values("label", 3),
        "scan_1.nii.gz: label 3, but the highest class is 2",
    ),
    "another modality": (
        "msd",
        lambda raw: raw.change("image", lambda scan: nib.Nifti1Image(np.zeros((8, 10, 10, 2), F32), scan.affine)),
        "scan_1.nii.gz: has 2 channels, but the data set states 1",
    ),
    "results below a file": ("msd", below_a_file, "file/out: cannot be written: Not a directory"),
    "results in a file": ("msd", a_file, "out: cannot be written: File exists"),
    "results in the data": (
        "msd",
        lambda raw: replace_argument(raw, "--results_dir", raw.data / "imagesTr" / ".."),
        "is the folder of the raw scans; choose another folder",
    ),
    "no workers": ("msd", lambda raw: raw.arguments.extend(["--num_workers", "0"]), "--num_workers must be at least 1"),
    "negative seed": ("msd", lambda raw: raw.arguments.extend(["--seed", "-1"]), "--seed at least 0"),
    "no such data set": (
        "msd",
        lambda raw: replace_argument(raw, "--dataset", "kist19"),
        "--dataset 'kist19': unknown data set; available: kits19",
    ),
    "a flag of another data set": (
        "msd",
        lambda raw: raw.arguments.extend(["--slices_per_case", "5"]),
        "--slices_per_case does not apply to --dataset msd, which accepts --drop_empty, --foreground_crop, "
        "--ignore_label, --intensity, --intensity_window, --labels, --orientation, --spacing, --split_ratios",
    ),
    "no number": (
        "msd",
        lambda raw: raw.arguments.extend(["--intensity_window", "low", "9"]),
        "invalid float value: 'low'",
    ),
    "no shares": (
        "msd",
        lambda raw: raw.arguments.extend(["--split_ratios", "0.5", "0.6"]),
        "two or three ratios that add up",
    ),
    "too few for three": (
        "msd",
        lambda raw: raw.arguments.extend(["--split_ratios", "0.6", "0.2", "0.2"]),
        "a ratio of 0.2 leaves none of 2 patients for evaluation",
    ),
    "a label too many": (
        "msd",
        lambda raw: raw.arguments.extend(["--labels", "7=1"]),
        "--labels 7=1: 7 is not a label from 0 to 2",
    ),
    "nothing to verify": ("msd", lambda raw: raw.arguments.extend(["--mode", "verify"]), "no preprocessed cases in it"),
}


@pytest.fixture
def damage(tmp_path: Path, write_msd: WriteRaw, write_kits19: WriteRaw) -> Callable[[str], tuple[Raw, str]]:
    """Makes a damaged data set; returns it with the expected message."""

    def make(how: str) -> tuple[Raw, str]:
        layout, change, message = DAMAGED[how]
        data = tmp_path / "raw" / "data"
        raw = Raw(tmp_path / "raw", layout, write_msd(data, 2) if layout == "msd" else write_kits19(data, [0]))
        change(raw)
        return raw, message.replace("{data}", str(data))

    return make


def assert_refused(status: int, stderr: str, message: str) -> None:
    assert (status, stderr.count("\n")) == (2, 1), stderr
    assert stderr.startswith("preprocess_dataset.py: error: ")
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("how", DAMAGED)
def test_bad_input_is_reported_in_one_line_with_status_2(
    how: str, damage: Callable[[str], tuple[Raw, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    raw, message = damage(how)
    arguments = list(map(str, ["--num_workers", 1, *raw.arguments]))
    status = run_program(lambda: main(arguments), PROGRAM)
    assert_refused(status, capsys.readouterr().err, message)
    assert not (raw.out / INDEX_NAME).exists()


@pytest.mark.parametrize(("how", "workers"), [("damaged image", 2), ("huge header", 1), ("kits19: too low", 1)])
def test_the_process_reports_it_too(
    how: str, workers: int, damage: Callable[[str], tuple[Raw, str]], run_python: RunPython
) -> None:
    raw, message = damage(how)
    ran = run_python(PROGRAM, *raw.arguments, "--num_workers", workers)
    assert_refused(ran.returncode, ran.stderr, message)


def test_results_in_the_data_folder_leave_the_data_alone(damage: Callable[[str], tuple[Raw, str]]) -> None:
    raw, _ = damage("results in the data")
    before = (raw.data / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="choose another folder"):
        main(list(map(str, raw.arguments)))
    assert (raw.data / "dataset.json").read_bytes() == before


def test_masks_of_kits23_are_named(copy: tuple[Path, Path]) -> None:
    raw, out = copy
    path = raw / "case_00001" / "segmentation.nii.gz"
    mask = nib.load(path)
    array = np.asarray(mask.dataobj).copy()
    array[0, 0, 0] = 3
    nib.save(nib.Nifti1Image(array, mask.affine), path)
    with pytest.raises(
        UserError, match=r"label 3, but the highest class is 2; the masks of KiTS21 and KiTS23 have cysts"
    ):
        main(["--data_dir", str(raw), "--results_dir", str(out), "--num_workers", "1"])


class Odd(RawCase):
    """A case that fails in a way nobody expected."""

    def read(self) -> tuple[Volume, Volume]:
        if self.case == "odd":
            raise np.linalg.LinAlgError("Singular matrix")
        grid = Geometry(np.eye(4), (2, 2, 2), (1.0, 1.0, 1.0))
        array = np.arange(8, dtype=F32).reshape(1, 2, 2, 2)
        return Volume(array, grid), Volume((array > 3).astype(np.uint8), grid)


def test_an_unexpected_error_in_one_case_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = [Odd(case=name, image=tmp_path / "file", label=tmp_path / "file") for name in ("odd", "other")]
    spec = DatasetSpec(name="x", classes=("background", "one"), mean=0.0, std=1.0)
    raw = RawDataset(spec=spec, cases=cases, split={"train": ["odd", "other"], "evaluation": []})
    with pytest.raises(UserError, match=r"^1 of 2 cases failed, .*; the first: odd: unexpected LinAlgError \(Sing"):
        preprocess(raw, tmp_path / "out", 1)
    assert (tmp_path / "out" / "other_x.npy").exists()
    assert not (tmp_path / "out" / INDEX_NAME).exists()
