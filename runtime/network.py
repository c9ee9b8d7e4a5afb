"""Builds the network of a run: by name, with its weights, on the rank's device, frozen or cut into slabs as asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from common.errors import UserError
from common.messages import counted, is_main_rank, note
from data_loading.spec import DatasetSpec
from model.finetune import freeze, load_part, output_layers
from model.fused_norms import fuse_norms
from model.registry import build_network, check_window, freeze_unused
from model.unet3d import Unet3d
from runtime.arguments import RunConfig
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.format import Checkpoint
from runtime.memory_format import to_device
from runtime.run_spec import RunSpec, seen_cases
from runtime.seeding import seed_process
from runtime.trained_cases import MAY_HAVE_SEEN, training_cases


def make_network(config: RunConfig, dataset: DatasetSpec) -> nn.Module:
    """Returns the network that the flags name, for this data set."""
    return build_network(
        config.model,
        dataset.channels,
        len(dataset.classes),
        normalization=config.normalization,
        activation=config.activation,
    )


def make_checked_network(config: RunConfig, dataset: DatasetSpec) -> nn.Module:
    """Does the same for training. Raises UserError if the network cannot take the windows."""
    network = make_network(config, dataset)
    for flag in ("input_shape", "val_input_shape"):
        shape = getattr(config, flag)
        check_window(network, shape, f"--{flag}", channels=dataset.channels, classes=len(dataset.classes))
    return network


def load_trained(checkpoint: Checkpoint, config: RunConfig, dataset: DatasetSpec, device: torch.device) -> nn.Module:
    """Returns a checkpoint's network on a device, for evaluation. Raises UserError if the flags describe another."""
    network, window = make_network(config, dataset), config.val_input_shape
    check_window(network, window, "--val_input_shape", channels=dataset.channels, classes=len(dataset.classes))
    fuse_foreign_norms(config, network, dataset, window)
    checkpoints.load_network(network, checkpoint.state(config.checkpoint)[0], checkpoint.path)
    # Without an evaluation, the last weights are the best as well.
    if checkpoint.batch and (config.checkpoint == "last" or checkpoint.best_score is None) and is_main_rank():
        note(f"{checkpoint.path}: the last weights, after {checkpoint.place}")
    return to_device(network.eval(), device, config.layout)


def prepare_network(run: RunSpec) -> nn.Module:
    """Returns the run's network on this rank's device, with new weights or those of `--init_from`."""
    config, dataset = run.config, run.dataset
    seed_process(run.seeds.master, deterministic=config.cudnn_deterministic, autotune=config.cudnn_benchmark)
    network = make_checked_network(config, dataset)
    if unused := freeze_unused(network, dataset.channels, config.input_shape):
        note(f"{counted(len(unused), 'parameter')} without influence on the output, not trained: {unused[0]}, …")
    if found := fuse_foreign_norms(config, network, dataset, config.input_shape):
        note(f"--fuse_norms: instance norms computed in channels-last: {found}; --no-fuse_norms leaves them")
    _share_windows(run, network)
    if config.checkpoint_activations:
        _recompute_activations(run, network)
    _start_from_weights(run, network)
    to_device(network, run.world.device, config.layout)
    if config.compile:
        network.compile()  # in place: names, state and every reference stay valid
    return network


def fuse_foreign_norms(config: RunConfig, network: nn.Module, dataset: DatasetSpec, shape: Sequence[int]) -> str:
    """Applies `--fuse_norms`; returns what it did, or "".

    Args:
        shape: (D, H, W) of a valid window.
    """
    if not config.fuse_norms or config.layout != "NDHWC" or isinstance(network, Unet3d):
        return ""
    return fuse_norms(network, dataset.channels, shape)


def _share_windows(run: RunSpec, network: nn.Module) -> None:
    """Applies `--ranks_per_sample`: training then takes slabs of windows."""
    flag, count = "--ranks_per_sample", run.groups.ranks
    if run.slabs is None:
        return
    if not isinstance(network, Unet3d):
        raise UserError(f"{flag} {count}: only --model unet3d can be computed by slabs, not {run.config.model}")
    network.check_slabs(run.config.input_shape[0], count, flag)
    network.share_windows(run.slabs)


def _recompute_activations(run: RunSpec, network: nn.Module) -> None:
    """Applies `--checkpoint_activations`."""
    flag, config = "--checkpoint_activations", run.config
    if not isinstance(network, Unet3d):
        raise UserError(f"{flag}: only the blocks of --model unet3d can be computed again, not {config.model}; drop it")
    for other, is_given in (("--ranks_per_sample", run.slabs is not None), ("--compile", config.compile)):
        if is_given:
            raise UserError(f"{flag} does not go with {other}; drop one")
    network.recompute_activations(flag)


def _start_from_weights(run: RunSpec, network: nn.Module) -> None:
    """Applies `--init_from`, unless the run continues from its own state, and `--freeze`; logs a note on each."""
    config = run.config
    if config.init_from is None and not config.freeze:
        return
    with torch.random.fork_rng(devices=[]):
        larger = make_network(config, replace(run.dataset, classes=(*run.dataset.classes, "one more")))
    outputs = output_layers(network, larger)
    if config.init_from is not None and run.loaded is None:
        loaded = checkpoints.load(config.init_from, "--init_from")
        weights, epoch = loaded.state(config.checkpoint)
        source, channels = f"--init_from {loaded.path}", run.dataset.channels
        before = DatasetSpec.from_json(loaded.spec).channels if loaded.spec else None
        summary = load_part(network, weights, outputs, source, channels=channels, trained_channels=before)
        note(f"{source}: the {config.checkpoint} weights, of epoch {epoch}; {summary}")
        evaluated = run.split["evaluation"]
        trained = training_cases(loaded, config.data_dir) if evaluated else set()
        if trained is None:
            note(f"{source}: {MAY_HAVE_SEEN}")
        elif seen := sorted(trained.intersection(evaluated)):
            note(seen_cases(f"{source}:", seen, evaluated))
    if config.freeze:
        note(f"--freeze: {freeze(network, config.freeze, outputs)}")
