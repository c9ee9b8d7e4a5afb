"""What `--exec_mode export` writes: the same logits, the same settings in each format, and one line for a mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from export import predict_onnx
from export.monai_bundle import EXAMPLE, make_metadata
from export.write import copy_example
from tests import programs
from tests.export.conftest import FLAGS, NETWORK, SPEC, Export, export_of, logits_of

EXPECTED = {
    "settings_format": 1,
    "dataset": "made",
    "classes": list(SPEC.classes),
    "channels": 1,
    "preprocessing": {
        "orientation": "RAS",
        "foreground_crop": False,
        "spacing_mm": [1.5, 1.0, 1.0],
        "size": None,
        "intensity_window": [-10.0, 10.0],
        "intensity": "zscore",
        "mean": 1.0,
        "std": 2.0,
        "min_shape": [8, 8, 8],
    },
    "window": [8, 6, 4],
    "overlap": 0.25,
    "padding_value": -2.0,
    "test_time_flips": [[], [4]],
    "crops_remainder": False,
    "model": NETWORK,
    "normalization": "instancenorm",
    "activation": "relu",
    "epoch": 0,
}


def without_digest(settings: Any) -> dict[str, Any]:
    """The settings but for the checkpoint's digest, which must be one."""
    assert len(settings["checkpoint_sha256"]) == 64
    return {name: value for name, value in settings.items() if name != "checkpoint_sha256"}


@pytest.mark.parametrize("window", ["fixed", "dynamic"])
def test_onnx_computes_the_network_s_logits(export: Export, checkpoint: Path, window: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    path = export("NET.onnx", "--export_window", window)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}  # standard operators alone
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    session = onnxruntime.InferenceSession(path)
    shapes = [(1, 8, 6, 4), (3, 8, 6, 4), *([(2, 4, 10, 12)] if window == "dynamic" else [])]
    for count, *shape in shapes:
        image = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(count))
        (logits,) = session.run(["logits"], {"image": image.numpy()})
        np.testing.assert_allclose(logits, logits_of(checkpoint, image).numpy(), rtol=1e-4, atol=1e-5)


def test_settings_are_in_the_metadata_and_beside_the_file(export: Export) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export("NET.onnx")
    _, stored = predict_onnx.load_network(path)
    beside = json.loads((path.parent / "NET.json").read_text())
    assert stored == beside
    assert without_digest(stored) == EXPECTED
    assert (path.parent / "predict_onnx.py").read_bytes() == EXAMPLE.read_bytes()


def test_safetensors_has_the_reference_s_names(export: Export, checkpoint: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = export("NET.safetensors")
    weights = torch.load(checkpoint / "checkpoint.pth", weights_only=True)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(weights)
        assert "upsample.0.upsample_conv.0.weight" in weights
        for name in weights:
            assert torch.equal(file.get_tensor(name), weights[name])
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    stored = {name: json.loads(text) for name, text in metadata.items()}
    assert stored == json.loads(path.with_suffix(".json").read_text())
    assert without_digest(stored) == EXPECTED


def test_a_bundle_holds_the_network_and_its_settings(export: Export, checkpoint: Path) -> None:
    folder = export("bundle")
    assert without_digest(json.loads((folder / "configs" / "settings.json").read_text())) == EXPECTED
    network = torch.export.load(folder / "models" / "model.pt2").module()
    image = torch.randn(3, 1, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(image), logits_of(checkpoint, image), rtol=1e-4, atol=1e-5)
    assert [file.name for file in folder.parent.iterdir()] == ["bundle"]


def test_no_name_of_a_checkpoint_is_an_expression_in_a_bundle() -> None:
    text = json.dumps(make_metadata({**EXPECTED, "dataset": "$os.system('x')", "classes": ["@a", "b%c", "$d"]}))
    assert not set("$@%") & set(text)
    assert "segmentation of os.system('x')" in text


def test_nothing_is_overwritten(export: Export, checkpoint: Path) -> None:
    pytest.importorskip("safetensors")
    path = export("NET.safetensors")
    before = path.read_bytes()
    done = export_of(checkpoint, path)
    assert done.returncode == 2
    assert done.stderr == f"main.py: error: --output {path} exists already; remove it, or give another name\n"
    assert path.read_bytes() == before
    path.unlink()
    (path.parent / "NET.json").write_text("{}")
    done = export_of(checkpoint, path)
    assert "NET.json exists already and differs" in done.stderr
    assert not path.exists()


def test_an_example_that_was_changed_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    example = tmp_path / "predict_onnx.py"
    for _ in range(2):
        copy_example(tmp_path)
        assert example.read_bytes() == EXAMPLE.read_bytes()
    example.write_text("# mine\n")
    assert "differs" not in caplog.text
    copy_example(tmp_path)
    assert "predict_onnx.py exists and differs" in caplog.text
    assert example.read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no checkpoint", "not a checkpoint"), (b"", "damaged or no checkpoint"), (None, "no such file")],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "checkpoint.pth").write_bytes(content)
    done = export_of(tmp_path, tmp_path / "NET.onnx")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "NET.onnx").exists()


@pytest.mark.parametrize("name", ["NET.onnx", "NET.safetensors"])
def test_a_missing_package_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for package in ("onnx", "onnxscript", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    done = export_of(checkpoint, tmp_path / name)
    assert done.returncode == 2
    assert "pip install '.[export]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_network_that_cannot_be_followed_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--model", "tests.export.test_write:ValueDependent")
    torch.save(ValueDependent(1, 3).state_dict(), tmp_path / "checkpoint.pth")
    (tmp_path / "dataset.json").write_bytes((checkpoint / "dataset.json").read_bytes())
    done = export_of(tmp_path, tmp_path / "bundle", *flags)
    assert done.returncode == 2
    assert "PyTorch cannot export this network" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


class ValueDependent(torch.nn.Module):
    """A network whose operations depend on the image's values."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(channels, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv(image)
        return logits if float(image.detach().sum()) >= 0 else -logits


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "NET.onnx").write_bytes(b"no network")
    with pytest.raises(predict_onnx.ScanError, match="damaged, or not exported with its settings"):
        predict_onnx.load_network(tmp_path / "NET.onnx")


def test_the_file_makes_the_mask_of_a_prediction(export: Export, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, scan = export("NET.onnx"), tmp_path / "scan.nii.gz"
    affine = np.array([[0, 2.0, 0.1, 5], [-1.5, 0, 0, 6], [0, -0.1, 3.0, 7], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(1, 6, (13, 11, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), scan)
    loaded = ("--load_ckpt_path", checkpoint / "checkpoint.pth", "--data_dir", checkpoint, *FLAGS)
    done = programs.call(
        "main.py", "--exec_mode", "predict", *loaded, "--scan", scan, "--output", tmp_path / "expected.nii.gz"
    )
    assert done.returncode == 0, done.stderr
    assert predict_onnx.main([str(network), str(scan), str(tmp_path / "found.nii.gz")]) == 0
    expected, found = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("expected", "found"))
    np.testing.assert_array_equal(found.affine, expected.affine)
    masks = [np.asarray(mask.dataobj) for mask in (expected, found)]
    assert len(np.unique(masks[0])) == 3
    assert np.count_nonzero(masks[0] != masks[1]) <= 2


def test_a_mistake_in_the_example_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert predict_onnx.main([str(tmp_path / "NET.onnx"), "scan.nii.gz", "mask.nii.gz"]) == 2
    assert capsys.readouterr().err == f"predict_onnx.py: error: {tmp_path / 'NET.onnx'}: no such file\n"
    assert predict_onnx.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: predict_onnx.py")
