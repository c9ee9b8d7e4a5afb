"""Writes a MONAI bundle: a folder with which `python3 -m monai.bundle run` predicts, without this project.

The network is a program of `torch.export`, since TorchScript is deprecated in torch 2.11 and later. MONAI's own
inferer weighs windows in another way and places them elsewhere, so `scripts/` holds this project's windows
(`predict_onnx.py`); masks are then the same.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_loading.index import write_json
from export.network import TrainedNetwork
from export.settings import Settings

# Lowest version of pyproject.toml's group.
MONAI_VERSION = "1.5.0"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
EXAMPLE = Path(__file__).with_name("predict_onnx.py")
# Names in `$…` are Python, which MONAI evaluates; nothing from a checkpoint may get there. The settings are read as
# data from a file of their own.
INFERENCE = {
    "imports": [
        "$import glob",
        "$import json",
        "$import os",
        "$import pathlib",
        "$import torch",
        "$from scripts import predict_scan",
    ],
    "bundle_root": "$os.path.dirname(os.path.dirname(os.path.abspath(predict_scan.__file__)))",
    "dataset_dir": "$@bundle_root + '/scans'",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "settings": "$json.loads(pathlib.Path(@bundle_root, 'configs', 'settings.json').read_text(encoding='utf-8'))",
    "network_def": "$torch.export.load(@bundle_root + '/models/model.pt2').module().to(@device)",
    "predictor": (
        "$torch.inference_mode()(lambda windows: @network_def(torch.from_numpy(windows).to(@device)).cpu().numpy())"
    ),
    "dataset": "$sorted(path for end in ('nii', 'nii.gz') for path in glob.glob(@dataset_dir + '/*.' + end))",
    "inferer": "$lambda image: predict_scan.sliding_window(image, @predictor, @settings)",
    "evaluator": (
        "$lambda scan: predict_scan.predict_file(pathlib.Path(scan), "
        "pathlib.Path(@output_dir, os.path.basename(scan)), @predictor, @settings)"
    ),
    "run": [
        "$os.makedirs(@output_dir, exist_ok=True)",
        "$predict_scan.predict_folder(@dataset, @dataset_dir, @output_dir, @evaluator)",
    ],
}


def write_bundle(trained: TrainedNetwork, folder: Path) -> None:
    """Writes the bundle's folder, which must not exist; it appears when it is complete.

    Raises:
        UserError: PyTorch cannot export the network.
        OSError: the folder cannot be written.
    """

    def export(network: nn.Module, example: tuple[torch.Tensor]) -> torch.export.ExportedProgram:
        return torch.export.export(network, example, dynamic_shapes=trained.dynamic_shapes())

    program = trained.capture(export)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name in ("configs", "models", "scripts"):
            (temporary / name).mkdir(parents=True)
        torch.export.save(program, temporary / "models" / "model.pt2")
        write_json(temporary / "configs" / "settings.json", trained.settings)
        write_json(temporary / "configs" / "metadata.json", make_metadata(trained.settings))
        write_json(temporary / "configs" / "inference.json", INFERENCE)
        # MONAI looks the module up as an attribute of its package.
        (temporary / "scripts" / "__init__.py").write_text("from scripts import predict_scan\n", encoding="utf-8")
        shutil.copyfile(EXAMPLE, temporary / "scripts" / "predict_scan.py")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_metadata(settings: Settings) -> dict[str, Any]:
    """Returns the content of MONAI's `metadata.json`."""
    dataset, *classes = (_inert(name) for name in (settings["dataset"], *settings["classes"]))
    shape = {"dtype": "float32", "spatial_shape": settings["window"], "is_patch_data": True}
    image = {"type": "image", "format": "magnitude", "num_channels": settings["channels"], "value_range": [], **shape}
    logits = {"type": "image", "format": "segmentation", "num_channels": len(classes), "value_range": [], **shape}
    return {
        "schema": SCHEMA,
        "version": "0.0.1",
        "changelog": {"0.0.1": "exported"},
        "monai_version": MONAI_VERSION,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.3.0"},
        "task": f"segmentation of {dataset}",
        "description": f"segments {', '.join(classes[1:])}",
        "authors": "",
        "copyright": "",
        "network_data_format": {
            "inputs": {"image": {**image, "channel_def": {str(n): "image" for n in range(settings["channels"])}}},
            "outputs": {"pred": {**logits, "channel_def": {str(n): name for n, name in enumerate(classes)}}},
        },
    }


def _inert(name: str) -> str:
    """Returns a checkpoint's name without the characters that mean something to MONAI's parser."""
    return re.sub(r"[$@%]", "", name)
