"""What prediction takes from a checkpoint: its data set's constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from data_loading.index import INDEX_NAME, DatasetIndex, write_json
from data_loading.spec import KITS19, DatasetSpec
from prediction import predict
from prediction.predict import spec_of
from runtime.arguments import parse_arguments
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World

PLAIN = DatasetSpec(name="synthetic", classes=("background", "object"), mean=0.0, std=1.0)


def checkpoint(**values: Any) -> Checkpoint:
    empty: dict[str, Any] = dict.fromkeys(Checkpoint.__dataclass_fields__)
    return Checkpoint(**{**empty, "path": Path("c.pth"), "config": {"model": "unet3d"}, **values})


def test_the_spec_comes_from_the_checkpoint() -> None:
    spec = replace(PLAIN, spacing_mm=(1.0, 2.0, 3.0), orientation="LPS")
    assert spec_of(checkpoint(spec=spec.to_json()), None) == (spec, "")
    with pytest.raises(UserError, match=r"c\.pth: its data set's spec is of another version"):
        spec_of(checkpoint(spec={"name": "x", "colour": 1}), None)


def test_an_older_checkpoint_needs_its_data_set_s_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold its data set's constants.*give --data_dir"):
        spec_of(checkpoint(spec=None), None)
    write_json(tmp_path / INDEX_NAME, DatasetIndex(spec=PLAIN, split={"train": []}, cases={}).to_json())
    assert spec_of(checkpoint(spec=None), tmp_path) == (PLAIN, "")


def test_another_program_s_checkpoint_is_assumed_to_be_for_kits19(tmp_path: Path) -> None:
    spec, note = spec_of(checkpoint(spec=None, config={}), None)
    assert spec == replace(KITS19, orientation="IPL")
    assert "written by another program: assuming that it was trained on KiTS19" in note
    write_json(tmp_path / INDEX_NAME, DatasetIndex(spec=PLAIN, split={"train": []}, cases={}).to_json())
    assert spec_of(checkpoint(spec=None, config={}), tmp_path) == (PLAIN, "")


def test_probabilities_of_two_scans_of_one_name_would_be_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        predict, "load_ensemble", lambda *given: (SimpleNamespace(spec=SimpleNamespace(channels=1)), [])
    )
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    arguments = ["--exec_mode", "predict", "--load_ckpt_path", "c.pth", "--scan", str(tmp_path)]
    config, given = parse_arguments([*arguments, "--output", str(tmp_path / "out"), "--save_probabilities"])
    with pytest.raises(UserError, match="--save_probabilities: two scans are called a;"):
        predict.main(config, given, World(0, 1, torch.device("cpu")))
