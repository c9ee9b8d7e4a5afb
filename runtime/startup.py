"""Before MLPerf's clock starts: pre-flight checks, warm-up on dummy data, and the description of the run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial

from torch import nn

from common.errors import UserError
from common.messages import note, take_notes
from data_loading.base_loader import Batch
from model.kernels import dispatch as kernels
from runtime.arguments import checkpoint_path
from runtime.build import Emit, make_sliding_window_config
from runtime.check_table import failures, format_table
from runtime.convolution_probe import check_convolutions
from runtime.demand import Demand, NetworkMemory
from runtime.environment import describe_environment, platform_name
from runtime.logging import events
from runtime.logging.mlperf import tensor_names
from runtime.memory import BatchMemory, batch_memory, state_bytes, step_memory, window_memory
from runtime.memory_checks import check_window_fits, free_bytes
from runtime.network import make_network
from runtime.precision import Precision
from runtime.preflight import checkpoint_bytes, run_checks
from runtime.run_spec import RunSpec
from runtime.test_time_flips import untrained_flips
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import calibrate, dummy_batch, warm_up, warm_up_evaluation

# run_and_time.sh sets it to 1 once it has dropped the page cache; MLPerf requires that in the log.
CACHES_CLEARED_VARIABLE = "CACHES_WERE_CLEARED"
# Why the memory of a compiled network is not estimated: it takes less than operation by operation, by an unknown part.
COMPILED = "--compile fuses operations"


def run_preflight(run: RunSpec, state: TrainState, step: StepConfig, emit: Emit) -> None:
    """Checks, on each machine, for conditions that would end the run later.

    Raises:
        UserError: a check failed; the message names all that did.
    """
    config, path = run.config, checkpoint_path(run.config)
    if config.local_rank != 0:
        return
    networks = 2 + run.roles.has_evaluators + (state.average is not None)
    demand = dataclasses.replace(
        evaluation_demand(run, state.network),
        training=run.split["train"],
        loader=config.loader,
        workers=config.num_workers,
        network=estimate_memory(run, state, step),
        checkpoint_dir=path.parent if path else None,
        checkpoint_bytes=checkpoint_bytes(state.network, state.optimizer, networks),
    )
    run_demanded_checks(run, demand, emit)


def run_evaluator_preflight(run: RunSpec, network: nn.Module, emit: Emit) -> None:
    """Does the same on a rank that only evaluates: if it is the first of its machine, all ranks there are like it."""
    if run.config.local_rank == 0:
        run_demanded_checks(run, evaluation_demand(run, network), emit)


def evaluation_demand(run: RunSpec, network: nn.Module) -> Demand:
    """Returns what a rank needs that only evaluates."""
    config = run.config
    return Demand(
        data_dir=None if config.loader == "synthetic" else config.data_dir,
        training=[],
        evaluation=run.split["evaluation"] if run.schedule.first_evaluation else [],
        loader="synthetic",  # which reads no training volumes
        workers=0,
        batch_size=config.batch_size,
        patch=run.slab_shape,
        channels=run.dataset.channels,
        scoring=make_sliding_window_config(config, run.dataset),
        network=NetworkMemory(step=BatchMemory(((0, 0),)), windows=estimate_windows(run, network), state_bytes=0),
        batches=run.samples_per_epoch // (config.batch_size * run.groups.count),
        prewarms=config.prewarm_steps > 0,
        checkpoint_dir=None,
        checkpoints=config.ckpt_keep,
        checkpoint_bytes=0,
    )


def run_demanded_checks(run: RunSpec, demand: Demand, emit: Emit) -> None:
    """Runs the checks, reports their table, and raises UserError if one failed."""
    checks = run_checks(demand, run.world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if run.world.device.type == "cuda" and run.precision.dtype is not None:
        checks.append(check_convolutions(run.precision, run.config.layout))
    emit(events.PreflightEnd(format_table(checks), [dataclasses.asdict(check) for check in checks]))
    if problem := failures(checks):
        raise UserError(problem)


def estimate_memory(run: RunSpec, state: TrainState, step: StepConfig) -> NetworkMemory:
    """Returns what training takes on a rank's device."""
    sample = (run.dataset.channels, *run.slab_shape)
    if run.config.compile:
        in_step = batch_memory(sample, COMPILED)
    elif run.slabs:  # whose layers would communicate
        in_step = batch_memory(sample, "several ranks share each sample")
    else:
        in_step = step_memory(state, step, sample, kernels.uses_triton(run.world.device))
    held = state_bytes(state.network, state.optimizer, run.world.size)
    if state.average:  # an evaluation sets the network's own weights aside
        held += sum(tensor.nbytes for tensor in state.average.weights.values())
    return NetworkMemory(step=in_step, windows=estimate_windows(run, state.network), state_bytes=held)


def estimate_windows(run: RunSpec, network: nn.Module) -> BatchMemory:
    """Returns what a batch of evaluation windows takes on a rank's device."""
    window = (run.dataset.channels, *run.config.val_input_shape)
    if run.config.compile:
        return batch_memory(window, COMPILED)
    return window_memory(network, run.precision, window, kernels.uses_triton(run.world.device))


def require_window_memory(network: nn.Module, precision: Precision, window: Sequence[int]) -> None:
    """Raises UserError if an evaluation window (C, D, H, W) takes more memory than is free on the network's device."""
    windows = window_memory(network, precision, window, kernels.uses_triton(precision.device))
    if problem := failures([check_window_fits(windows, free_bytes(precision.device))]):
        raise UserError(problem)


def prewarm(run: RunSpec, state: TrainState, step: StepConfig, emit: Emit) -> None:
    """Compiles, tunes and measures on dummy data before the clock starts; restores the state afterwards."""
    config, dataset, world = run.config, run.dataset, run.world
    shape = (config.batch_size, dataset.channels, *run.slab_shape)
    batch = dummy_batch(shape, len(dataset.classes), world.device)
    warm_up(state, batch, _dummy_windows(run), step, steps=config.prewarm_steps)
    if config.benchmark:
        sample = (dataset.channels, *config.input_shape)
        emit(calibrate(state, partial(make_network, config, dataset), batch, step, sample=sample, world=world))


def prewarm_evaluation(run: RunSpec, network: nn.Module) -> None:
    """Does the same on a rank that only evaluates."""
    windows = _dummy_windows(run)["image"]
    warm_up_evaluation(network, windows, run.precision, steps=run.config.prewarm_steps)


def _dummy_windows(run: RunSpec) -> Batch:
    config, dataset = run.config, run.dataset
    shape = (config.val_batch_size, dataset.channels, *config.val_input_shape)
    return dummy_batch(shape, len(dataset.classes), run.world.device)


def describe_start(run: RunSpec) -> events.InitStarted:
    """Returns the configuration and the environment, as the first event of the run."""
    were_cleared = os.environ.get(CACHES_CLEARED_VARIABLE) == "1"
    return events.InitStarted(run.config, describe_environment(run.world.device, run.roles.everyone.size), were_cleared)


def describe_run(run: RunSpec, state: TrainState) -> events.InitStopped:
    """Returns everything known about a run before its clock starts; logs its notes."""
    config, world = run.config, run.world
    flips = untrained_flips(config.test_time_flips, config.augment, "the network")
    schedule = "" if config.benchmark else run.schedule.note()
    for text in (run.precision.note, kernels.note(world.device), schedule, flips):
        if text:
            note(text)
    return events.InitStopped(
        config=config,
        seeds=dataclasses.asdict(run.seeds),
        division=run.division,
        rule_violations=run.violations,
        platform=config.submission_platform or platform_name(world.device, run.roles.everyone.size),
        tensors=tensor_names(state.network),
        samples_per_epoch=run.samples_per_epoch,
        notes=take_notes(),
        doubtful_cases=run.doubtful_cases,
        data_digest=run.data_digest,
    )
