"""`--exec_mode export`: writes a checkpoint's network for other programs.

    python3 main.py --exec_mode export --load_ckpt_path C --output NET.onnx | NET.safetensors | BUNDLE/

The name of the output chooses the format. `NET.json`, beside a file, holds the settings: how a scan becomes a mask with
this network; `predict_onnx.py`, beside an ONNX file, does it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.messages import note
from data_loading.index import write_json
from export.monai_bundle import EXAMPLE, write_bundle
from export.network import TrainedNetwork, load
from export.onnx_file import write_onnx
from export.safetensors_file import write_safetensors
from runtime.arguments import RunConfig
from runtime.distributed.world import World

# By the suffix that `arguments.EXPORT_SUFFIXES` allows; "": a folder.
WRITERS: dict[str, Callable[[TrainedNetwork, Path], None]] = {
    ".onnx": write_onnx,
    ".safetensors": write_safetensors,
    "": write_bundle,
}


def main(config: RunConfig, given: frozenset[str], world: World) -> int:
    """Exports the checkpoint's network; of several ranks, one does.

    Args:
        given: names of the flags that were on the command line.
    """
    if not world.is_main:
        return 0
    assert config.output is not None
    output = config.output
    trained, about = load(config, given)
    if about:
        note(about)
    beside = output.with_suffix(".json") if output.suffix else None
    if beside and beside.exists() and _read(beside) != trained.settings:
        raise UserError(f"--output {output}: {beside.name} exists already and differs; remove it, or give another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[output.suffix](trained, output)
        if beside:
            write_json(beside, trained.settings)
        if output.suffix == ".onnx":
            copy_example(output.parent)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    print(f"exported epoch {trained.settings['epoch']} of {config.load_ckpt_path[0]}: {output}")
    return 0


def _read(path: Path) -> object:
    """Returns the content of a JSON file; None if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def copy_example(folder: Path) -> None:
    """Copies the example into the folder, unless one that was changed is there."""
    copy = folder / EXAMPLE.name
    if not copy.exists():
        shutil.copyfile(EXAMPLE, copy)
    elif copy.read_bytes() != EXAMPLE.read_bytes():
        note(f"{copy} exists and differs from this version's; it is left as it is")
