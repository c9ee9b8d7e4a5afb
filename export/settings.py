"""The settings of an exported network: what makes a mask of a scan, beside the weights. Every format holds the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_loading.spec import DatasetSpec
from prediction.ensemble import Member
from runtime.arguments import RunConfig

FORMAT = 1
# The fields of a data set's spec with which a scan is preprocessed.
PREPROCESSING = (
    "orientation",
    "foreground_crop",
    "spacing_mm",
    "size",
    "intensity_window",
    "intensity",
    "mean",
    "std",
    "min_shape",
)
Settings = dict[str, Any]


def describe(member: Member, spec: DatasetSpec, config: RunConfig, *, checkpoint: Path, epoch: int) -> Settings:
    """Returns the settings as plain JSON values; `docs/export.md` says what each means.

    Args:
        config: with the network's flags as the checkpoint has them.
        epoch: of the exported weights.
    """
    record, windows = spec.to_json(), member.windows
    with checkpoint.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    settings = {
        "settings_format": FORMAT,
        "dataset": spec.name,
        "classes": spec.classes,
        "channels": spec.channels,
        "preprocessing": {name: record[name] for name in PREPROCESSING},
        "window": windows.window,
        "overlap": windows.overlap,
        "padding_value": windows.padding_value,
        "test_time_flips": windows.flips,
        "crops_remainder": spec.crops_remainder,
        "model": str(config.model),
        "normalization": config.normalization,
        "activation": config.activation,
        "epoch": epoch,
        "checkpoint_sha256": digest,
    }
    plain: Settings = json.loads(json.dumps(settings))
    return plain


def as_metadata(settings: Settings) -> dict[str, str]:
    """Returns the settings as the metadata of a file: each value as JSON text under its own name."""
    return {name: json.dumps(value) for name, value in settings.items()}
