"""Writes ONNX: the network in standard operators, with its settings as metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import replacing
from export.network import TrainedNetwork
from export.settings import as_metadata

# The lowest that torch's exporter writes without converting; onnxruntime 1.14 and later read it.
OPSET = 18
# Weights are stored in the file itself, which protobuf limits.
MAX_BYTES = 2**31 - 2**20


def write_onnx(trained: TrainedNetwork, path: Path) -> None:
    """Writes the network to a file.

    Raises:
        UserError: onnxscript is missing, the network is too large, or PyTorch cannot export it.
        OSError: the file cannot be written.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs both
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--output {path}: ONNX needs the package {error.name}: pip install '.[export]'") from None
    size = sum(tensor.numel() * tensor.element_size() for tensor in trained.network.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(f"--output {path}: weights of {size / 2**30:.1f} GiB do not fit an ONNX file, whose limit is 2")

    def export(network: nn.Module, example: tuple[Tensor]) -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            network,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=trained.dynamic_shapes(),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )

    program = trained.capture(export)
    assert program is not None
    program.model.metadata_props.update(as_metadata(trained.settings))
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
