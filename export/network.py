"""The network of a checkpoint, in the form that is exported: on the CPU, fp32, NCDHW, PyTorch's own operators."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.errors import UserError, one_line
from export.settings import Settings, describe
from model.kernels.dispatch import OPERATORS, plain
from prediction.predict import load_member, spec_of
from runtime.arguments import RunConfig, with_checkpoint_network
from runtime.checkpoint import format as checkpoints

Result = TypeVar("Result")
# Batch of the example: an exporter takes a length of 1 for a constant.
EXAMPLE_BATCH = 2
WINDOW_AXES = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network to export.

    Attributes:
        network: (N, C, D, H, W) float32 -> logits (N, K, D, H, W), on the CPU, in evaluation mode.
        is_dynamic: whether D, H and W are left open as well as N.
    """

    network: nn.Module
    settings: Settings
    is_dynamic: bool

    def example(self) -> Tensor:
        """Returns an image of the shape of its windows."""
        return torch.zeros(EXAMPLE_BATCH, self.settings["channels"], *self.settings["window"])

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Returns the axes of the image that are left open, as `torch.export` wants them."""
        dim = torch.export.Dim
        axes: dict[int, Any] = {0: dim("batch")}
        if self.is_dynamic:
            axes |= dict.fromkeys(WINDOW_AXES, dim.DYNAMIC)
        return (axes,)

    def capture(self, export: Callable[[nn.Module, tuple[Tensor]], Result]) -> Result:
        """Calls an exporter. Raises UserError if it cannot follow the network."""
        try:
            with torch.no_grad(), plain(OPERATORS), _quiet():
                return export(self.network, (self.example(),))
        except ImportError:
            raise
        except Exception as error:  # torch.export raises dozens of types, whose texts have many lines
            hint = "; try --export_window fixed" if self.is_dynamic else ""
            raise UserError(
                f"--output: PyTorch cannot export this network ({type(error).__name__}: {one_line(error)[:200]}){hint}"
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torch's exporters say: warnings about their own parts, and the graph as far as they came."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def load(config: RunConfig, given: frozenset[str]) -> tuple[TrainedNetwork, str]:
    """Loads the checkpoint's network and settings; returns them with a note for the user or "".

    Raises:
        UserError: the checkpoint is missing or damaged, lacks its data set's constants or belongs to another network.
    """
    (path,) = config.load_ckpt_path
    checkpoint = checkpoints.load(path)
    spec, note = spec_of(checkpoint, config.data_dir if "data_dir" in given else None)
    evaluated = replace(with_checkpoint_network(config, given, checkpoint.config), layout="NCDHW")
    member = load_member(checkpoint, spec, evaluated, torch.device("cpu"))
    epoch = checkpoint.state(config.checkpoint)[1]
    settings = describe(member, spec, evaluated, checkpoint=path, epoch=epoch)
    is_dynamic = config.export_window == "dynamic"
    return TrainedNetwork(network=member.network, settings=settings, is_dynamic=is_dynamic), note
