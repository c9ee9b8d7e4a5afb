"""A checkpoint: one file with the last and the best state, written atomically, checksummed, read without running code.

The newest is at the path itself; those before it are at `path.1`, `path.2`, … A file is torch.save's archive, whose
comment is the SHA-256 of all bytes before it: any program reads it, and a cut or a flipped bit is noticed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import replacing
from model.finetune import differences
from runtime.train_state import TrainState

FORMAT = 2
DIGEST_MARK = b"sha256:"
DIGEST_LENGTH = len(DIGEST_MARK) + 64
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
        data: digest of the data set and its split, "" where the file holds none.
        spec: the data set's constants (a `DatasetSpec` as JSON), None where the file holds none.
        best, last: networks' state dicts; a file that holds a single one has it as both.
        best_epoch, last_epoch: 0 where the file does not say.
        best_dice: -1.0 where nothing was evaluated.
        batch, evaluated: of the last state, as in `TrainState`.
        loss_sums: of the last state, one a rank of the run.
        optimizer, scaler: state dicts of the last state, None where the file holds none.
        records: of the last state, {} where the file holds none.
    """

    path: Path
    config: dict[str, Any]
    seed: int | None
    data: str
    spec: dict[str, Any] | None
    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_epoch: int
    last_epoch: int
    best_dice: float
    batch: int
    evaluated: int
    loss_sums: list[float]
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def state(self, which: str) -> tuple[dict[str, Tensor], int]:
        """The network of the "best" or the "last" state, and its epoch."""
        return (self.last, self.last_epoch) if which == "last" else (self.best, self.best_epoch)


def prepare(path: Path) -> None:
    """Makes the checkpoint's folder before the run: a path that cannot be written must not be found out at its end.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in path.parent.iterdir():  # of a run that was killed while saving
            if file.name.startswith(f".{path.name}.") and file.suffix == ".tmp":
                file.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--save_ckpt_path {path}: its folder cannot be written: {error.strerror or error}") from None


def generations(path: Path) -> list[Path]:
    """The files that are there, the newest first."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(re.escape(path.name) + r"\.([1-9]\d*)")
    numbered = [(int(match[1]), file) for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    return [path] * path.exists() + [file for _, file in sorted(numbered)]


def set_aside(path: Path) -> None:
    """Keeps an earlier run's newest checkpoint under a free name (checkpoint.1.pth, …) and drops the older ones."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix or '.pth'}")).exists():
        number += 1
    for index, file in enumerate(generations(path)):
        file.rename(kept) if index == 0 else file.unlink()


def snapshot(
    state: TrainState,
    loss_sums: list[float],
    config: dict[str, Any],
    seed: int,
    data: str,
    spec: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, copied to the host: training may go on while it is written.

    Args:
        loss_sums: every rank's.
        config: plain Python only (str, numbers, lists), so that reading needs no unpickling of classes.
        data: digest of the data set and its split.
        spec: the data set's constants, plain like `config`: what prediction must do to a scan.
    """
    last = {
        "epoch": state.epoch,
        "batch": state.batch,
        "evaluated": state.evaluated,
        "loss_sums": loss_sums,
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "records": copy.deepcopy(state.records),
    }
    # The best network is a copy on the host already.
    best = {"epoch": state.best_epoch, "mean_dice": state.best_dice, "network": state.best_network}
    run = {"format": FORMAT, "config": config, "seed": seed, "data": data, "spec": spec}
    return {**run, "last": _on_host(last), "best": best}


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # keeps the memory order, which fused optimizers rely on
    if isinstance(value, Mapping):
        return {key: _on_host(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_host, value))
    return value


def save(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Writes a `snapshot` to `path`, the file that was there becoming the first of `keep - 1` older ones.

    Killed at any moment, it leaves whole files only, and at least one of those that were there.

    Raises:
        OSError: the folder cannot be written or the disk is full; every older file is untouched.
    """
    with replacing(path) as temporary:
        with temporary.open("w+b") as stream:
            _write_archive(content, stream)
            _sign(stream)
            os.fsync(stream.fileno())
        older = [path.with_name(f"{path.name}.{number}") for number in range(1, keep)]
        for newer, file in reversed(list(zip([path, *older], older, strict=False))):
            if newer.exists():
                _give_second_name(newer, file)
    for file in generations(path)[keep:]:
        file.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _give_second_name(file: Path, name: Path) -> None:
    """A link, so that the first name is never without a file; a renaming where the file system has no links."""
    step = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    step.unlink(missing_ok=True)
    try:
        step.hardlink_to(file)
    except OSError:
        file.replace(name)
        return
    step.replace(name)
    step.unlink(missing_ok=True)  # where both names were the same file's already, the line above has done nothing


def _write_archive(content: dict[str, Any], stream: BufferedRandom) -> None:
    """torch's writer meets a full disk with a RuntimeError about a position; this says what the disk said."""
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sign(stream: BufferedRandom) -> None:
    """Makes the SHA-256 of all bytes the archive's comment; its length, the archive's last two bytes, is part of it."""
    stream.seek(-2, os.SEEK_END)
    stream.write(struct.pack("<H", DIGEST_LENGTH))
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.write(DIGEST_MARK + digest.encode())
    stream.flush()


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable: after a power cut, the file alone would not be enough."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, flag: str = "--load_ckpt_path") -> Checkpoint:
    """Reads our checkpoint, or one of the MLPerf reference (or any state dict with its parameter names).

    Args:
        flag: that named the file, for the message.

    Raises:
        UserError: missing, damaged, or without a network.
    """
    try:
        is_signed = _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{flag} {path}: not a checkpoint, or one that holds more than tensors and plain values; "
            "such a file could run code and is not loaded"
        ) from None
    except Exception as error:  # damage makes zip and unpickler fail in a dozen ways, struct.error among them
        raise UserError(f"{flag} {path}: damaged or no checkpoint ({error})") from None
    try:
        if not isinstance(content, Mapping) or "format" not in content:
            return _foreign(path, content, flag)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        if not is_signed:
            raise ValueError("its checksum is missing")
        last, best = content["last"], content["best"]
        trained = best["network"] is not None
        return Checkpoint(
            path,
            content["config"],
            content["seed"],
            content["data"],
            content.get("spec"),
            best["network"] if trained else last["network"],
            last["network"],
            best["epoch"] if trained else last["epoch"],
            last["epoch"],
            best["mean_dice"],
            last["batch"],
            last["evaluated"],
            last["loss_sums"],
            last["optimizer"],
            last["scaler"],
            last.get("records", {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {path}: damaged or of another version ({error})") from None


def _check_sums(path: Path) -> bool:
    """Whether the file bears its SHA-256; raises BadZipFile where it does not match.

    A foreign file has the archive's own sums, which torch.load never looks at; its older format has none at all.
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
    digest = hashlib.sha256()
    stream.seek(0)
    while length and (piece := stream.read(min(length, 1 << 20))):
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()


def _foreign(path: Path, content: Any, flag: str) -> Checkpoint:
    networks = [content[key] for key in FOREIGN_KEYS if isinstance(content.get(key), Mapping)] or [content]
    plain = [{str(name).removeprefix("module."): tensor for name, tensor in found.items()} for found in networks]
    if not plain[0] or not all(isinstance(tensor, Tensor) for found in plain for tensor in found.values()):
        raise UserError(f"{flag} {path}: holds no network ({', '.join(map(str, list(content)[:5]))})")
    best, last = plain[0], plain[1] if len(plain) > 1 else plain[0]
    epoch = int(content.get("epoch") or 0) if not isinstance(content.get("epoch"), Tensor) else 0
    return Checkpoint(path, {}, None, "", None, best, last, epoch, epoch, -1.0, 0, epoch, [], None, None)


def load_network(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights into a network. Raises UserError, naming the first difference, if they are of another network."""
    if details := differences(network, weights):
        raise UserError(
            f"{path}: of another network than --model, --normalization and the data set give: "
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


def restore(state: TrainState, checkpoint: Checkpoint, rank: int = 0) -> None:
    """Sets the state to the checkpoint's last one. Raises UserError when optimizer or network are others."""
    load_network(state.network, checkpoint.last, checkpoint.path)
    if checkpoint.optimizer is not None and checkpoint.scaler is not None:
        try:
            _load_optimizer(state.optimizer, checkpoint.optimizer)
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint.path}: of another --optimizer ({error})") from None
        if checkpoint.scaler and state.scaler.is_enabled():
            state.scaler.load_state_dict(checkpoint.scaler)
    state.epoch, state.batch, state.evaluated = checkpoint.last_epoch, checkpoint.batch, checkpoint.evaluated
    sums = checkpoint.loss_sums
    state.loss_sum = torch.tensor(sums[rank]) if checkpoint.batch and rank < len(sums) else None
    state.best_epoch, state.best_dice = checkpoint.best_epoch, checkpoint.best_dice
    state.best_network = checkpoint.best if checkpoint.best_dice >= 0 else None
    state.records.clear()
    state.records.update(copy.deepcopy(checkpoint.records))
