"""A checkpoint's content: every field comes back; files of other programs are read."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.unet3d import Unet3d
from runtime.checkpoint.format import Checkpoint, load, load_network, read_step, snapshot, write_archive
from runtime.checkpoint.resume import restore
from runtime.memory_format import to_device
from tests.runtime.checkpoint.conftest import (
    CONFIG,
    CPU,
    SPEC,
    MakeBatches,
    MakeState,
    Weights,
    clone,
    equal,
    keep_best,
    keep_state,
    leaves,
    same,
    train_epochs,
)


def test_last_and_best_come_back_each_with_its_epoch(
    path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, loader = make_state(), make_batches(2, 1)
    train_epochs(state, loader, 1, 2)
    keep_best(state, 2, 0.75)
    best = clone(state)
    train_epochs(state, loader, 3, 3)
    keep_state(path, state, seed=42)
    loaded = load(path)
    assert same(loaded.best, best)
    assert same(loaded.last, clone(state))
    assert not same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (2, 3, 0.75)
    assert (loaded.config, loaded.seed, loaded.path) == (CONFIG, 42, path)


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
def test_every_field_comes_back_bit_for_bit(
    optimizer: str, layout: str, path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state(optimizer)
    to_device(state.network, CPU, layout)
    train_epochs(state, make_batches(2, 1), 1, 1, layout)
    keep_best(state, 1, 0.1 + 0.2)
    assert state.best_network is not None
    best = {name: tensor.clone() for name, tensor in state.best_network.items()}
    train_epochs(state, make_batches(3, 1), 2, 3, layout, leave_after=1)
    state.evaluated = 1
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    state.callback_state["early_stopping"] = {"best": 0.3, "stale": 2}
    assert state.loss_sum is not None
    sums = [state.loss_sum.item(), 1 / 3]
    keep_state(path, state, seed=2**31 - 1, loss_sums=sums)
    expected = Checkpoint(
        path=path,
        config=CONFIG,
        seed=2**31 - 1,
        data="d1635",
        spec=SPEC,
        best=best,
        last=dict(state.network.state_dict()),
        best_epoch=1,
        last_epoch=2,
        best_dice=0.1 + 0.2,
        step=7,
        batch=2,
        evaluated=1,
        loss_sums=sums,
        optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(),
        callback_state={"early_stopping": {"best": 0.3, "stale": 2}},
    )
    loaded = load(path)
    for field in dataclasses.fields(Checkpoint):
        assert equal(getattr(loaded, field.name), getattr(expected, field.name)), field.name
    moments = [tensor for _, tensor in leaves(loaded.optimizer) if isinstance(tensor, Tensor) and tensor.dim() == 5]
    assert len(moments) >= 5
    order = torch.contiguous_format if layout == "NCDHW" else torch.channels_last_3d
    assert all(moment.is_contiguous(memory_format=order) for moment in moments if moment[0, 0].numel() > 1)


def test_a_snapshot_does_not_change_with_the_state(make_state: MakeState, make_batches: MakeBatches) -> None:
    """It is written while training continues."""
    state = make_state("adam")
    train_epochs(state, make_batches(2, 1), 1, 1)
    taken = snapshot(state, [0.0], config=CONFIG, seed=1, data="", spec=SPEC)
    copied = pickle.loads(pickle.dumps(taken))
    train_epochs(state, make_batches(2, 1), 2, 2)
    assert equal(taken["last"], copied["last"])
    assert not same(taken["last"]["network"], clone(state))


def test_without_an_evaluation_the_last_is_the_best(path: Path, make_state: MakeState) -> None:
    state = make_state()
    state.epoch = 5
    keep_state(path, state)
    loaded = load(path)
    assert same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (5, 5, -1.0)
    fresh = make_state()
    restore(fresh, loaded)
    assert (fresh.best_epoch, fresh.best_dice, fresh.best_network) == (5, -1.0, None)


def test_format_2_is_read(path: Path, make_state: MakeState) -> None:
    content = snapshot(make_state(), [0.0], config=CONFIG, seed=1, data="d1635", spec=SPEC)
    write_archive(content, path)
    new = load(path)
    last = {name: value for name, value in content["last"].items() if name not in ("step", "callback_state")}
    write_archive(content | {"format": 2, "last": last | {"records": {"top_k": {"kept": []}}}}, path)
    old = load(path)
    assert old.callback_state == {"top_k": {"kept": []}}
    for field in dataclasses.fields(Checkpoint):
        if field.name != "callback_state":
            assert equal(getattr(old, field.name), getattr(new, field.name)), field.name
    write_archive(content | {"format": 2, "last": last}, path)
    assert (load(path).step, load(path).callback_state, read_step(path)) == (0, {}, 0)


def test_a_plain_state_dict_loads(path: Path, weights: Weights) -> None:
    torch.save(weights, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, weights)
    assert (loaded.config, loaded.seed, loaded.last_epoch, loaded.optimizer) == ({}, None, 0, None)


def test_the_references_checkpoint_loads(path: Path, weights: Weights) -> None:
    last = {name: tensor + 1 for name, tensor in weights.items()}
    content = {"epoch": 7, "best_model_state_dict": weights, "last_model_state_dict": last, "optimizer_state_dict": {}}
    torch.save(content, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (7, 7, -1.0)


def test_the_references_best_alone_loads(path: Path, weights: Weights) -> None:
    torch.save({"best_model_state_dict": weights, "epoch": 7}, path)
    loaded = load(path)
    assert same(loaded.best, weights)
    assert same(loaded.last, weights)
    assert loaded.best_epoch == 7


# As the reference adds them to the file: `**metrics` of the best evaluation.
SCORES = {
    "epoch": np.int64(7),
    "L1 dice": np.float64(0.95),
    "L2 dice": np.float32(0.8),
    "mean_dice": np.float64(0.875),
    "halves": np.array(0.5, ">f4")[()],
    "success": np.bool_(True),
}


@pytest.mark.parametrize("path_in_numpy", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_the_references_scores_are_read(path_in_numpy: bytes, path: Path, weights: Weights) -> None:
    torch.save({**SCORES, "best_model_state_dict": weights}, path)
    rewrite(path, lambda pickled: pickled.replace(b"numpy._core.multiarray", path_in_numpy))
    loaded = load(path)
    assert same(loaded.best, weights)
    assert (loaded.best_epoch, loaded.last_epoch) == (7, 7)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickle in a file of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.0]),
        np.str_("text"),
        np.bytes_(b"bytes"),
        np.datetime64("2026-01-01"),
        np.array((1, 2.0), "i4,f8")[()],
        np.dtype("O"),
        np.dtype([("pointer", "O")]),
    ],
)
def test_nothing_else_of_numpy_is_read(value: Any, path: Path, weights: Weights) -> None:
    torch.save({"model": weights, "value": value}, path)
    with pytest.raises(UserError, match="could run code and is not loaded"):
        load(path)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("extra", [{}, {"epoch": None}, {"epoch": torch.tensor(3)}, {"loss": 0.5}])
def test_the_common_keys_load(key: str, extra: dict[str, Any], path: Path, weights: Weights) -> None:
    torch.save({key: weights, **extra}, path)
    loaded = load(path)
    assert same(loaded.last, weights)
    assert loaded.last_epoch == 0


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"best_model_state_dict": w}])
def test_names_of_a_wrapped_network_lose_their_prefix(
    wrap: Callable[[Weights], Any], path: Path, weights: Weights
) -> None:
    torch.save(wrap({f"module.{name}": tensor for name, tensor in weights.items()}), path)
    assert same(load(path).last, weights)


def test_a_foreign_checkpoint_starts_a_training(
    path: Path, make_state: MakeState, make_batches: MakeBatches, weights: Weights
) -> None:
    torch.save({"state_dict": {name: tensor + 0.5 for name, tensor in weights.items()}, "epoch": 7}, path)
    state = make_state()
    restore(state, load(path))
    assert same(clone(state), {name: tensor + 0.5 for name, tensor in weights.items()})
    assert (state.epoch, state.best_network) == (7, None)
    train_epochs(state, make_batches(1, 1), 8, 8)
    assert state.epoch == 8


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "holds no network"),
        ({"a": 1, "b": "c"}, r"holds no network \(a, b\)"),
        ({"state_dict": {"w": 1.0}}, "holds no network"),
        ({"state_dict": {}}, "holds no network"),
        ({"state_dict": {"w": torch.ones(1)}, "epoch": "seven"}, "damaged or of another version"),
        ([1, 2], "damaged or of another version"),
        (torch.ones(2), "damaged or of another version"),
        ("text", "damaged or of another version"),
        ({"format": 1}, "damaged or of another version"),
        ({"format": 1, "config": {}, "seed": 1, "last": None, "best": None}, "damaged or of another version"),
        ({"format": torch.ones(2)}, "damaged or of another version"),
    ],
)
def test_a_file_without_a_network(content: Any, problem: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(UserError, match=f"^--load_ckpt_path {path}: {problem}"):
        load(path)


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (Unet3d(1, 3, filters=(3, 4, 4)), "lacks downsample.0.conv1.0.weight"),
        (Unet3d(1, 3, filters=(3, 5)), r"has bottleneck.conv1.0.weight as \(4, 3, 3, 3, 3\), not \(5, 3, 3, 3, 3\)"),
        (Unet3d(2, 3, filters=(3, 4)), r"has input_block.conv1.0.weight as \(3, 1, 3, 3, 3\), not \(3, 2, 3, 3, 3\)"),
        (Unet3d(1, 4, filters=(3, 4)), r"has output.conv.weight as \(3, 3, 1, 1, 1\), not \(4, 3, 1, 1, 1\)"),
        (Unet3d(1, 3, "batchnorm", filters=(3, 4)), "lacks input_block.conv1.1.running_mean"),
        (nn.Identity(), "also holds input_block.conv1.0.weight"),
    ],
)
def test_another_networks_weights_are_refused_with_the_first_difference(
    network: nn.Module, problem: str, weights: Weights
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"^old\.pth: does not fit the network that --model.*{problem}"):
        load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), before), "half loaded is worse than not"


def test_load_network_copies_every_value(weights: Weights) -> None:
    network = Unet3d(1, 3, filters=(3, 4))
    load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), weights)


def test_an_error_names_the_flag_of_the_file(path: Path) -> None:
    with pytest.raises(UserError, match=f"^--resume {path}: no such file$"):
        load(path, "--resume")
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"^--resume {path}: "):
        load(path, "--resume")


def test_a_missing_file_and_a_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.pth: no such file$"):
        load(path)
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"folder": Path("x")}, r"^callback_state\['mine'\]\['folder'\] holds a .*Path"),
        ({"values": [1.0, (2, np.float64(3))]}, r"^callback_state\['mine'\]\['values'\] holds a float64"),
        ({"values": [1.0, (2, None, "x", True), {"t": torch.zeros(2)}]}, None),
    ],
)
def test_what_a_callback_keeps_is_refused_at_the_first_save_unless_it_can_be_loaded(
    kept: dict[str, Any], message: str | None, path: Path, make_state: MakeState
) -> None:
    state = make_state()
    state.callback_state["mine"] = kept
    with pytest.raises(UserError, match=message) if message else nullcontext():
        keep_state(path, state, seed=1, loss_sums=[0.0])
        assert equal(load(path).callback_state["mine"], kept)
