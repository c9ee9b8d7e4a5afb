"""Damaged and dangerous files are refused in one line, and no code in them runs."""

from __future__ import annotations

import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from runtime.checkpoint.format import FORMAT, Checkpoint, load, snapshot
from runtime.checkpoint.writer import save
from tests.runtime.checkpoint.conftest import (
    CONFIG,
    SPEC,
    MakeBatches,
    MakeState,
    Weights,
    clone,
    keep_best,
    keep_state,
    same,
    train_epochs,
)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.witness), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(zipped: bool, path: Path, tmp_path: Path, weights: Weights) -> None:
    witness = tmp_path / "executed"
    content = {"state_dict": weights, "extra": Payload(witness)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Payload(witness)}, protocol=2))
    with pytest.raises(UserError, match="could run code and is not loaded"):
        load(path)
    assert not witness.exists()


def test_reading_is_restricted_whatever_torch_s_default(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment can override torch.load's default, but not an explicit argument."""
    keep_state(path, make_state())
    asked: list[dict[str, Any]] = []
    original = torch.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    load(path)
    assert [kwargs["weights_only"] for kwargs in asked] == [True]
    assert [str(kwargs["map_location"]) for kwargs in asked] == ["cpu"]


def test_what_we_write_is_tensors_and_plain_values(
    path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state("adam")
    train_epochs(state, make_batches(1, 1), 1, 1)
    keep_best(state, 1, 0.5)
    keep_state(path, state)
    assert isinstance(load(path), Checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"not a checkpoint\n",
        b"PK\x03\x04 half a zip",
        b"\x80\x02}q\x00.",
        b"0",
        b"\x80\x02(lp0\n",
        b"B1",
    ],
    ids=["empty", "zeros", "text", "zip head", "empty pickle", "pop", "open list", "struct"],
)
def test_garbage_is_a_user_error(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"^--load_ckpt_path {re.escape(str(path))}: (damaged|not a checkpoint|holds no)"
    ):
        load(path)


def rewrite(path: Path, content: bytes) -> None:
    """Writes a new file: some file systems wait for the disk when a file is truncated and rewritten."""
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def kept(path: Path, make_state: MakeState, make_batches: MakeBatches) -> bytes:
    """A checkpoint at `path` with every part that one can have."""
    state = make_state("adam")
    train_epochs(state, make_batches(1, 1), 1, 1)
    keep_best(state, 1, 0.5)
    keep_state(path, state)
    return path.read_bytes()


def test_a_file_cut_off_at_any_length(path: Path, make_state: MakeState) -> None:
    """With the smallest network, so that every length can be tried."""
    state = make_state()
    state.network = nn.Conv3d(1, 1, 1)
    state.optimizer = torch.optim.SGD(state.network.parameters(), 0.1)
    keep_state(path, state)
    whole = path.read_bytes()
    for length in range(len(whole)):
        rewrite(path, whole[:length])
        with pytest.raises(UserError, match=f"^--load_ckpt_path {path}: (damaged|not a checkpoint)"):
            load(path)
    rewrite(path, whole)
    assert same(load(path).last, clone(state))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(share: float, path: Path, kept: bytes) -> None:
    path.write_bytes(kept[: int(share * len(kept))])
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_flipped_bit_anywhere(path: Path, kept: bytes) -> None:
    """Every bit of the checksum and its mark, and 300 others at random."""
    drawn = random.Random(0)
    tail = range(8 * (len(kept) - 100), 8 * len(kept))
    for bit in [*drawn.sample(range(8 * len(kept)), 300), *tail]:
        damaged = bytearray(kept)
        damaged[bit // 8] ^= 1 << bit % 8
        rewrite(path, damaged)
        with pytest.raises(UserError, match="damaged"):
            load(path)


@pytest.mark.parametrize("length", [1, 22, 512, 4096])
def test_a_block_of_zeros_as_after_a_power_cut(length: int, path: Path, kept: bytes) -> None:
    drawn = random.Random(length)
    for first in [*drawn.sample(range(len(kept) - length), 20), len(kept) - length]:
        damaged = kept[:first] + bytes(length) + kept[first + length :]
        if damaged != kept:
            rewrite(path, damaged)
            with pytest.raises(UserError, match="damaged"):
                load(path)


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 71, b"sha256:", b"more of the same"])
def test_a_file_with_more_at_its_end(extra: bytes, path: Path, kept: bytes) -> None:
    path.write_bytes(kept + extra)
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_flipped_bit_in_a_weight(path: Path, make_state: MakeState) -> None:
    """torch.load would accept it silently."""
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(1234.5)
    keep_state(path, state)
    content = bytearray(path.read_bytes())
    at = content.find(state.network.output.conv.bias.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["seed"] == 1
    with pytest.raises(UserError, match="its checksum does not match"):
        load(path)


def test_a_flipped_bit_in_a_foreign_weight(path: Path) -> None:
    """The archive's own checksums are verified, which torch.load does not do."""
    torch.save({"state_dict": {"w": torch.full((50,), 1234.5)}}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((50,), 1234.5).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of .* does not match"):
        load(path)


def test_our_format_without_its_checksum_is_damaged(path: Path, kept: bytes) -> None:
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(UserError, match="its checksum is missing"):
        load(path)


@pytest.mark.parametrize("version", [1, FORMAT + 1, "2", None])
def test_another_format_is_refused(version: object, path: Path, make_state: MakeState) -> None:
    content = snapshot(make_state(), [0.0], config=CONFIG, seed=1, data="", spec=SPEC)
    assert content["format"] == 3
    save(path, content | {"format": version})
    with pytest.raises(UserError, match=re.escape(f"format {version!r}, not 2 or 3")):
        load(path)


def test_any_program_reads_the_file(path: Path, kept: bytes) -> None:
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert same(content["last"]["network"], load(path).last)
    assert same(content["best"]["network"], load(path).best)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert re.fullmatch(rb"sha256:[0-9a-f]{64}", archive.comment)
