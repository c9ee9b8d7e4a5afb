"""Writes safetensors: the weights alone, with the MLPerf reference's parameter names, and the settings as metadata."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.files import replacing
from export.network import TrainedNetwork
from export.settings import as_metadata


def write_safetensors(trained: TrainedNetwork, path: Path) -> None:
    """Writes the weights to a file.

    Raises:
        UserError: safetensors is missing.
        OSError: the file cannot be written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"--output {path}: needs the package {error.name}: pip install '.[export]'") from None
    # Copies, since the format refuses parameters that share memory.
    weights = {name: tensor.clone().contiguous() for name, tensor in trained.network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", **as_metadata(trained.settings)})
