"""Checkpoints: exact, atomic, foreign ones welcome, damaged and dangerous ones refused in one line."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errors import UserError
from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime.callbacks import KeepBest
from runtime.checkpoint import Checkpoint, load, load_network, prepare, restore, save
from runtime.distributed import World
from runtime.events import EvaluationStopped
from runtime.precision import Precision
from runtime.training import StepSettings, TrainingLoader, TrainState, train_epoch

MakeState = Callable[..., TrainState]
MakeBatches = Callable[..., TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]
Weights = dict[str, Tensor]

CONFIG: dict[str, Any] = {"model": "unet3d(filters=(3,4))", "val_input_shape": (4, 4, 8), "lr_decay_epochs": ()}


def train_epochs(state: TrainState, loader: TrainingLoader, first: int, last: int) -> None:
    cpu = torch.device("cpu")
    settings = StepSettings(DiceCELoss(), Precision(cpu, None), 1, "NCDHW")
    for epoch in range(first, last + 1):
        train_epoch(state, epoch, loader, 0.05, settings, World(0, 1, cpu), lambda event: None)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def clone(state: TrainState) -> Weights:
    return {name: tensor.clone() for name, tensor in state.network.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def weights(make_state: MakeState) -> Weights:
    return clone(make_state())


# Our own


def test_last_and_best_come_back_each_with_its_epoch(
    path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, loader = make_state(), make_batches(2, 1)
    train_epochs(state, loader, 1, 2)
    KeepBest().on(EvaluationStopped(2, 0.75, [0.75], 0.1, 1.0), state)
    best = clone(state)
    train_epochs(state, loader, 3, 3)
    save(path, state, CONFIG, seed=42)
    loaded = load(path)
    assert same(loaded.best, best)
    assert same(loaded.last, clone(state))
    assert not same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (2, 3, 0.75)
    assert (loaded.config, loaded.seed, loaded.path) == (CONFIG, 42, path)


def test_without_an_evaluation_the_last_is_the_best(path: Path, make_state: MakeState) -> None:
    state = make_state()
    state.epoch = 5
    save(path, state, CONFIG, seed=1)
    loaded = load(path)
    assert same(loaded.best, loaded.last)
    assert (loaded.best_epoch, loaded.last_epoch, loaded.best_dice) == (5, 5, -1.0)
    fresh = make_state()
    restore(fresh, loaded)
    assert (fresh.best_epoch, fresh.best_dice, fresh.best_network) == (5, -1.0, None)


@pytest.mark.parametrize(
    ("optimizer", "settings"), [("sgd", {"momentum": 0.9}), ("adam", {}), ("lamb", {"weight_decay": 0.01})]
)
def test_resuming_equals_never_stopping_bit_for_bit(
    optimizer: str, settings: dict[str, float], path: Path, make_state: MakeState, make_batches: MakeBatches,
    same_weights: SameWeights,
) -> None:  # fmt: skip
    straight, loader = make_state(optimizer, **settings), make_batches(3, 1)
    train_epochs(straight, loader, 1, 4)
    first = make_state(optimizer, **settings)
    train_epochs(first, loader, 1, 1)
    KeepBest().on(EvaluationStopped(1, 0.5, [0.5], 0.1, 1.0), first)
    train_epochs(first, loader, 2, 2)
    save(path, first, CONFIG, seed=1)
    second = make_state(optimizer, **settings)
    restore(second, load(path))
    assert (second.epoch, second.best_epoch, second.best_dice) == (2, 1, 0.5)
    assert second.best_network is not None
    assert first.best_network is not None
    assert same(second.best_network, first.best_network)
    train_epochs(second, loader, 3, 4)
    assert same_weights(second.network, straight.network)


def test_a_loss_scale_comes_back(path: Path, make_state: MakeState) -> None:
    state, fresh = make_state(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    state.scaler.scale(torch.ones(1))  # the scale becomes a tensor with its first use
    save(path, state, CONFIG, seed=1)
    fresh.scaler = torch.amp.GradScaler("cpu", enabled=True)
    restore(fresh, load(path))
    assert fresh.scaler.get_scale() == 512.0
    restore(make_state(), load(path))  # without a scaler: fp32 goes on from fp16


def test_momentum_and_decay_are_this_runs_own(path: Path, make_state: MakeState, make_batches: MakeBatches) -> None:
    """The log states the flags: a checkpoint's settings must not silently replace them."""
    state = make_state("sgd", momentum=0.9, weight_decay=0.0)
    train_epochs(state, make_batches(1, 1), 1, 1)
    save(path, state, CONFIG, seed=1)
    fresh = make_state("sgd", momentum=0.95, weight_decay=0.1)
    restore(fresh, load(path))
    (group,) = fresh.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.95, 0.1)
    bias = fresh.network.output.conv.bias
    buffer = state.optimizer.state[state.network.output.conv.bias]["momentum_buffer"]
    assert torch.equal(fresh.optimizer.state[bias]["momentum_buffer"], buffer)


@pytest.mark.parametrize("trained", ["sgd", "adam", "lamb"])
@pytest.mark.parametrize("asked", ["sgd", "adam", "lamb"])
def test_another_optimizer_is_refused(
    trained: str, asked: str, path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, fresh, loader = make_state(trained), make_state(asked), make_batches(1, 1)
    train_epochs(state, loader, 1, 1)
    save(path, state, CONFIG, seed=1)
    if trained == asked:
        restore(fresh, load(path))
        train_epochs(fresh, loader, 2, 2)
        assert fresh.epoch == 2
    else:
        with pytest.raises(UserError, match="of another --optimizer"):
            restore(fresh, load(path))


# Atomic


def test_a_save_that_fails_midway_leaves_the_old_file_and_nothing_else(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    save(path, state, CONFIG, seed=1)
    before = path.read_bytes()

    def disk_full(content: Any, stream: Any) -> None:
        stream.write(b"half of it")
        stream.flush()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    state.epoch = 9
    with pytest.raises(OSError, match="No space left"):
        save(path, state, CONFIG, seed=1)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert load(path).last_epoch == 0


def test_the_file_is_complete_and_synced_before_it_takes_the_name(
    path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append("replace")
        assert Path(source).parent == Path(target).parent, "a rename across file systems is a copy"
        assert load(Path(source)).seed == 7
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(path, make_state(), CONFIG, seed=7)
    assert steps == ["file", "replace", "folder"]
    assert os.listdir(path.parent) == [path.name]


def test_saving_again_replaces(path: Path, make_state: MakeState) -> None:
    state = make_state()
    for epoch in (1, 2):
        state.epoch = epoch
        save(path, state, CONFIG, seed=epoch)
    assert (load(path).last_epoch, load(path).seed) == (2, 2)


# Foreign


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
    ("content", "told"),
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
def test_a_file_without_a_network(content: Any, told: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(UserError, match=f"^--load_ckpt_path {path}: {told}"):
        load(path)


# Another network


@pytest.mark.parametrize(
    ("network", "told"),
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
    network: nn.Module, told: str, weights: Weights
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"^--load_ckpt_path old\.pth: of another network than --model.*{told}"):
        load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), before), "half loaded is worse than not"


def test_load_network_copies_every_value(weights: Weights) -> None:
    network = Unet3d(1, 3, filters=(3, 4))
    load_network(network, weights, Path("old.pth"))
    assert same(network.state_dict(), weights)


# Dangerous and damaged


class Payload:
    """Unpickling it would make a file."""

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
    """The environment can turn torch.load's own default off; an explicit argument it cannot."""
    save(path, make_state(), CONFIG, seed=1)
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
    KeepBest().on(EvaluationStopped(1, 0.5, [0.5], 0.1, 1.0), state)
    save(path, state, CONFIG, seed=1)
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
def test_garbage_is_a_users_mistake(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"^--load_ckpt_path {re.escape(str(path))}: (damaged|not a checkpoint|holds no)"
    ):
        load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(share: float, path: Path, make_state: MakeState) -> None:
    save(path, make_state(), CONFIG, seed=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_flipped_bit_in_a_weight(path: Path, make_state: MakeState) -> None:
    """torch.load would take it in silence."""
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(1234.5)
    save(path, state, CONFIG, seed=1)
    content = bytearray(path.read_bytes())
    place = content.find(state.network.output.conv.bias.detach().numpy().tobytes())
    assert place > 0
    content[place] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["seed"] == 1
    with pytest.raises(UserError, match="checksum"):
        load(path)


def test_a_missing_file_and_a_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.pth: no such file$"):
        load(path)
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load(tmp_path)


def test_a_checkpoint_s_folder_is_made_and_tried_before_the_run(tmp_path: Path) -> None:
    prepare(tmp_path / "new" / "folder" / "c.pth")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="its folder cannot be written"):
        prepare(tmp_path / "file" / "c.pth")
