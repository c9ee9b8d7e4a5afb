"""What prediction takes from a checkpoint: its data set's constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data_loading.index import INDEX_NAME, DatasetIndex, write_json
from data_loading.spec import KITS19, DatasetSpec
from prediction.predict import spec_of
from runtime.checkpoint.format import Checkpoint

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
