"""One file with the last and the best state: written atomically, read without unpickling code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from files import replacing
from runtime.training import TrainState

FORMAT = 1
# Where checkpoints of the field keep the network: MLPerf's reference first, then the common ones.
FOREIGN_KEYS = ("best_model_state_dict", "last_model_state_dict", "model_state_dict", "state_dict", "model")
# Settings that tell SGD, Adam and LAMB apart; to compare all would refuse the checkpoint of another torch version.
TELLTALE_SETTINGS = {"momentum", "betas", "eps"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        config: the run's flags, {} where a foreign file holds none.
        seed: the run's master seed, None where the file holds none.
        best, last: networks' state dicts; a file that holds a single one has it as both.
        best_epoch, last_epoch: 0 where the file does not say.
        best_dice: -1.0 where nothing was evaluated.
        optimizer, scaler: state dicts of the last state, None where the file holds none.
    """

    path: Path
    config: dict[str, Any]
    seed: int | None
    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_epoch: int
    last_epoch: int
    best_dice: float
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None


def prepare(path: Path) -> None:
    """Makes the checkpoint's folder before the run: a path that cannot be written must not be found out at its end.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--save_ckpt_path {path}: its folder cannot be written: {error.strerror or error}") from None


def save(path: Path, state: TrainState, config: dict[str, Any], seed: int) -> None:
    """Replaces `path` by the state's checkpoint; killed at any moment, it leaves the old file or the new one.

    Args:
        config: plain Python only (str, numbers, lists), so that reading needs no unpickling of classes.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    content = {
        "format": FORMAT,
        "config": config,
        "seed": seed,
        "last": {
            "epoch": state.epoch,
            "network": state.network.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
        },
        "best": {"epoch": state.best_epoch, "mean_dice": state.best_dice, "network": state.best_network},
    }
    with replacing(path) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable: after a power cut, the file alone would not be enough."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> Checkpoint:
    """Reads our checkpoint, or one of the MLPerf reference (or any state dict with its parameter names).

    Raises:
        UserError: missing, damaged, or without a network.
    """
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--load_ckpt_path {path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"--load_ckpt_path {path}: not a checkpoint, or one that holds more than tensors and plain values; "
            "such a file could run code and is not loaded"
        ) from None
    except Exception as error:  # damage makes zip and unpickler fail in a dozen ways, struct.error among them
        raise UserError(f"--load_ckpt_path {path}: damaged or no checkpoint ({error})") from None
    try:
        if isinstance(content, Mapping) and content.get("format") == FORMAT:
            last, best = content["last"], content["best"]
            trained = best["network"] is not None
            return Checkpoint(
                path, content["config"], content["seed"],
                best["network"] if trained else last["network"], last["network"],
                best["epoch"] if trained else last["epoch"], last["epoch"], best["mean_dice"],
                last["optimizer"], last["scaler"],
            )  # fmt: skip
        return _foreign(path, content)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"--load_ckpt_path {path}: damaged or of another version ({error!r})") from None


def _check_sums(path: Path) -> None:
    """Raises BadZipFile where a bit has flipped: torch.load never looks at the sums that torch.save wrote."""
    if zipfile.is_zipfile(path):  # torch.load also reads an older format, which has none
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def _foreign(path: Path, content: Any) -> Checkpoint:
    networks = [content[key] for key in FOREIGN_KEYS if isinstance(content.get(key), Mapping)] or [content]
    plain = [{str(name).removeprefix("module."): tensor for name, tensor in found.items()} for found in networks]
    if not plain[0] or not all(isinstance(tensor, Tensor) for found in plain for tensor in found.values()):
        raise UserError(f"--load_ckpt_path {path}: holds no network ({', '.join(map(str, list(content)[:5]))})")
    best, last = plain[0], plain[1] if len(plain) > 1 else plain[0]
    epoch = int(content.get("epoch") or 0) if not isinstance(content.get("epoch"), Tensor) else 0
    return Checkpoint(path, {}, None, best, last, epoch, epoch, -1.0, None, None)


def load_network(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights into a network. Raises UserError, naming the first difference, if they are of another network."""
    own = network.state_dict()
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or extra or other:
        details = [f"{what} {names[0]}" for what, names in (("lacks", missing), ("also holds", extra)) if names]
        details += [f"has {n} as {tuple(weights[n].shape)}, not {tuple(own[n].shape)}" for n in other[:1]]
        raise UserError(
            f"--load_ckpt_path {path}: of another network than --model, --normalization and the data set give: "
            f"it {' and '.join(details)}"
        )
    network.load_state_dict(dict(weights))


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Loads the moments alone: momentum, decay and betas stay those of this run's flags, which its log states."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    for group, settings in zip(stored["param_groups"], own, strict=True):
        if other := sorted((group.keys() ^ settings.keys()) & TELLTALE_SETTINGS):
            raise ValueError(f"only one of the two has {', '.join(other)}")
    optimizer.load_state_dict(stored)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Sets the state to the checkpoint's last one. Raises UserError when optimizer or network are others."""
    load_network(state.network, checkpoint.last, checkpoint.path)
    if checkpoint.optimizer is not None and checkpoint.scaler is not None:
        try:
            _load_optimizer(state.optimizer, checkpoint.optimizer)
        except (ValueError, KeyError) as error:
            raise UserError(f"--load_ckpt_path {checkpoint.path}: of another --optimizer ({error})") from None
        if checkpoint.scaler and state.scaler.is_enabled():
            state.scaler.load_state_dict(checkpoint.scaler)
    state.epoch = checkpoint.last_epoch
    state.best_epoch, state.best_dice = checkpoint.best_epoch, checkpoint.best_dice
    state.best_network = checkpoint.best if checkpoint.best_dice >= 0 else None
