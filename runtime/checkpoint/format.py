"""A checkpoint file: the last and the best state of a run, with a checksum, read without running code.

The file is an archive of `torch.save` whose comment is the SHA-256 of all bytes before it. Any program that reads
PyTorch files reads it, and a truncated file or a flipped bit is detected.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from common.compat import numpy_scalars_readable
from common.errors import UserError
from data_loading.folds import Fold
from model.finetune import differences
from runtime.arguments import with_current_names
from runtime.train_state import PendingEvaluation, TrainState

FORMAT = 3
# Format 2 has `records` for `callback_state`, and no `step`.
READABLE_FORMATS = (2, FORMAT)
DIGEST_MARK = b"sha256:"
DIGEST_LENGTH = len(DIGEST_MARK) + 64
# Keys under which other programs store a network's weights: MLPerf's reference first, then the common ones.
FOREIGN_KEYS = ("best_model_state_dict", "last_model_state_dict", "model_state_dict", "state_dict", "model")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. A file of another program has only the weights, and perhaps the epoch.

    Attributes:
        path: the file.
        config: the run's flags.
        seed: the run's master seed, None if the file has none.
        data: digest of the data set and its split, "" if the file has none.
        spec: the data set's constants (a `DatasetSpec` as JSON), None if the file has none.
        fold: the fold that it was trained on, None if the run used its data set's own split.
        best, last: state dicts of the networks; the same one twice if the file has only one.
        best_epoch, last_epoch: 0 if the file does not state the epoch.
        best_dice: -1.0 if nothing was evaluated.
        step, batch, evaluated, callback_state: of the last state, as in `TrainState`.
        loss_sums: of the last state, one per rank of the run.
        pending: the evaluation that was under way, see `TrainState`.
        optimizer, scaler: state dicts of the last state, None if the file has none.
        average: the averaged weights of the last state, None without `--ema_decay`.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data: str = ""
    spec: dict[str, Any] | None = None
    fold: Fold | None = None
    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_epoch: int = 0
    last_epoch: int = 0
    best_dice: float = -1.0
    step: int = 0
    batch: int = 0
    evaluated: int = 0
    loss_sums: list[float] = field(default_factory=list)
    pending: PendingEvaluation | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    average: dict[str, Tensor] | None = None
    callback_state: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def augment(self) -> list[str]:
        """The `--augment` of the run; that of the MLPerf reference if the file does not state it."""
        stored = self.config.get("augment", "mlperf")
        return [stored] if isinstance(stored, str) else list(stored)

    @property
    def best_score(self) -> tuple[int, float] | None:
        """Epoch and mean Dice of the best evaluation; None if nothing was evaluated."""
        return (self.best_epoch, self.best_dice) if self.best_dice >= 0 else None

    @property
    def place(self) -> str:
        """Where the run was when its last state was saved, as a phrase."""
        return f"batch {self.batch} of epoch {self.last_epoch + 1}" if self.batch else f"epoch {self.last_epoch}"

    def state(self, name: str) -> tuple[dict[str, Tensor], int]:
        """Returns the weights of the "best" or the "last" state, averages if the run makes them, and its epoch."""
        return (self.average or self.last, self.last_epoch) if name == "last" else (self.best, self.best_epoch)


def snapshot(
    state: TrainState,
    loss_sums: list[float],
    *,
    config: dict[str, Any],
    seed: int,
    data: str,
    spec: dict[str, Any] | None = None,
    fold: Fold | None = None,
) -> dict[str, Any]:
    """Returns the content of a checkpoint, copied to the host: training may go on while it is written.

    Args:
        state: the state to save.
        loss_sums: `TrainState.loss_sum` of every rank.
        config: the run's flags as plain Python values (str, numbers, lists), which are read without unpickling classes.
        seed: the run's master seed.
        data: digest of the data set and its split.
        spec: the data set's constants as plain values: prediction preprocesses a scan with them.
        fold: the fold that the run trains on; None: its data set's own split.
    """
    last = {
        "epoch": state.epoch,
        "step": state.step,
        "batch": state.batch,
        "evaluated": state.evaluated,
        "loss_sums": loss_sums,
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "average": state.average.weights if state.average else None,
        "callback_state": _plain(copy.deepcopy(state.callback_state), "callback_state"),
    }
    # The best network and the one under evaluation are on the host already, as copies.
    best = {"epoch": state.best_epoch, "mean_dice": state.best_dice, "network": state.best_network}
    pending = state.pending and {"epoch": state.pending.epoch, "network": state.pending.weights}
    run = {"format": FORMAT, "config": config, "seed": seed, "data": data, "spec": spec}
    run |= {"fold": fold.to_json()} if fold else {}
    return {**run, "last": _on_host(last), "best": best, "pending": pending}


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # keeps the memory order, which fused optimizers rely on
    if isinstance(value, Mapping):
        return {key: _on_host(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_host, value))
    return value


def _plain(value: Any, name: str) -> Any:
    """Returns a value that a checkpoint can hold: `load` unpickles no classes.

    Raises:
        UserError: a part of it is anything else.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            _plain(part, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for part in value:
            _plain(part, name)
    elif type(value) not in (str, int, float, bool, type(None)) and not isinstance(value, Tensor):
        raise UserError(f"{name} holds a {type(value).__name__}: a callback or schedule may keep plain values only")
    return value


def write_archive(content: dict[str, Any], file: Path) -> None:
    """Writes a `snapshot` to a file, appends the checksum and waits until the disk has both.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with file.open("w+b") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's writer hides a full disk behind a message about a position
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        _append_checksum(stream)
        os.fsync(stream.fileno())


def _append_checksum(stream: BufferedRandom) -> None:
    """Sets the archive's comment to the SHA-256 of all bytes before it, the comment's length (two bytes) included."""
    stream.seek(-2, os.SEEK_END)
    stream.write(struct.pack("<H", DIGEST_LENGTH))
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.write(DIGEST_MARK + digest.encode())
    stream.flush()


def load(path: Path, flag: str = "--load_ckpt_path") -> Checkpoint:
    """Reads a checkpoint of this program or of the MLPerf reference, or any state dict with its parameter names.

    Args:
        path: the file.
        flag: the flag that named the file, for error messages.

    Raises:
        UserError: the file is missing, damaged, or holds no network.
    """
    try:
        is_signed = _verify_checksum(path)
        with numpy_scalars_readable():  # MLPerf's reference saves its scores as such
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{flag} {path}: not a checkpoint, or one that holds more than tensors and plain values; "
            "such a file could run code and is not loaded"
        ) from None
    except Exception as error:  # a damaged file makes zip and unpickler fail in a dozen ways, struct.error among them
        raise UserError(f"{flag} {path}: damaged or no checkpoint ({error})") from None
    try:
        if not isinstance(content, Mapping) or "format" not in content:
            return _from_foreign(path, content, flag)
        if content["format"] not in READABLE_FORMATS:
            raise ValueError(f"format {content['format']!r}, not {' or '.join(map(str, READABLE_FORMATS))}")
        if not is_signed:
            raise ValueError("its checksum is missing")
        return _from_own(path, content)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {path}: damaged or of another version ({error})") from None


def _from_own(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    last, best = content["last"], content["best"]
    averaged = last.get("average")
    best_or_last = {**last, "network": averaged or last["network"]} if best["network"] is None else best
    pending = content.get("pending")
    return Checkpoint(
        path=path,
        config=with_current_names(content["config"]),
        seed=content["seed"],
        data=content["data"],
        spec=content.get("spec"),
        fold=Fold.from_json(content["fold"]) if "fold" in content else None,
        best=best_or_last["network"],
        last=last["network"],
        best_epoch=best_or_last["epoch"],
        last_epoch=last["epoch"],
        best_dice=best["mean_dice"],
        step=last.get("step", 0),
        batch=last["batch"],
        evaluated=last["evaluated"],
        loss_sums=last["loss_sums"],
        pending=pending and PendingEvaluation(pending["epoch"], pending["network"]),
        optimizer=last["optimizer"],
        scaler=last["scaler"],
        average=averaged,
        callback_state=last.get("callback_state", last.get("records", {})),
    )


def _from_foreign(path: Path, content: Any, flag: str) -> Checkpoint:
    networks = [content[key] for key in FOREIGN_KEYS if isinstance(content.get(key), Mapping)] or [content]
    plain = [{str(name).removeprefix("module."): tensor for name, tensor in weights.items()} for weights in networks]
    if not plain[0] or not all(isinstance(tensor, Tensor) for weights in plain for tensor in weights.values()):
        raise UserError(f"{flag} {path}: holds no network ({', '.join(map(str, list(content)[:5]))})")
    best, last = plain[0], plain[1] if len(plain) > 1 else plain[0]
    epoch = int(content.get("epoch") or 0) if not isinstance(content.get("epoch"), Tensor) else 0
    return Checkpoint(path=path, best=best, last=last, best_epoch=epoch, last_epoch=epoch, evaluated=epoch)


def read_step(path: Path) -> int:
    """Returns the step of a checkpoint's last state; 0 if the file does not state it or cannot be read.

    Reads the index and the plain values alone, no tensor (`mmap`), and does not verify the checksum.
    """
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["last"]["step"])
    except Exception:  # as in `load`
        return 0


def _verify_checksum(path: Path) -> bool:
    """Returns whether the file has a SHA-256; raises BadZipFile if it does not match.

    A file of another program is checked against the archive's own checksums, which torch.load ignores; torch's older
    format, which is no archive, has none.
    """
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - DIGEST_LENGTH))
        comment = stream.read()
        if comment.startswith(DIGEST_MARK):
            if _sha256(stream, size - DIGEST_LENGTH) != comment.removeprefix(DIGEST_MARK).decode(errors="replace"):
                raise zipfile.BadZipFile("its checksum does not match")
            return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
    return False


def _sha256(stream: IO[bytes], length: int) -> str:
    """Returns the SHA-256 of the first `length` bytes."""
    digest = hashlib.sha256()
    stream.seek(0)
    while length and (piece := stream.read(min(length, 1 << 20))):
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()


def load_network(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights into a network.

    Raises:
        UserError: the weights belong to another network; the message names the first difference.
    """
    if details := differences(network, weights):
        raise UserError(
            f"{path}: does not fit the network that --model, --normalization and the data set describe: "
            f"it {' and '.join(details)}"
        )
    network.load_state_dict(dict(weights))
