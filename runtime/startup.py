"""Before MLPerf's clock starts: pre-flight checks, warm-up on dummy data, and the description of the run."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

from common.errors import UserError
from common.messages import note, take_notes
from model.kernels import dispatch as kernels
from runtime.arguments import checkpoint_path
from runtime.build import Emit, make_network, make_sliding_window_config
from runtime.check_table import failures, format_table
from runtime.demand import Demand, NetworkMemory
from runtime.environment import describe_environment, platform_name
from runtime.logging import events
from runtime.logging.mlperf import tensor_names
from runtime.memory import batch_memory, state_bytes, step_memory, window_memory
from runtime.preflight import checkpoint_bytes, run_checks
from runtime.run_spec import RunSpec
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import calibrate, dummy_batch, warm_up

# run_and_time.sh sets it to 1 once it has dropped the page cache; MLPerf requires that in the log.
CACHES_CLEARED_VARIABLE = "CACHES_WERE_CLEARED"


def run_preflight(run: RunSpec, state: TrainState, step: StepConfig, emit: Emit) -> None:
    """Checks, on each machine, for conditions that would end the run later.

    Raises:
        UserError: a check failed; the message names all that did.
    """
    config = run.config
    if config.local_rank != 0:
        return
    path = checkpoint_path(config)
    demand = Demand(
        data_dir=None if config.loader == "synthetic" else config.data_dir,
        training=run.split["train"],
        evaluation=run.split["evaluation"] if run.schedule.first_evaluation else [],
        loader=config.loader,
        workers=config.num_workers,
        batch_size=config.batch_size,
        patch=run.slab_shape,
        channels=run.dataset.channels,
        scoring=make_sliding_window_config(config, run.dataset),
        network=estimate_memory(run, state, step),
        batches=run.samples_per_epoch // (config.batch_size * run.world.size),
        prewarms=config.prewarm_steps > 0,
        checkpoint_dir=path.parent if path else None,
        checkpoints=config.ckpt_keep,
        checkpoint_bytes=checkpoint_bytes(state.network, state.optimizer),
    )
    checks = run_checks(demand, run.world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    emit(events.PreflightEnd(format_table(checks), [dataclasses.asdict(check) for check in checks]))
    if problem := failures(checks):
        raise UserError(problem)


def estimate_memory(run: RunSpec, state: TrainState, step: StepConfig) -> NetworkMemory:
    """Returns what the network needs on a rank's device."""
    config, channels = run.config, run.dataset.channels
    sample, window = (channels, *config.input_shape), (channels, *config.val_input_shape)
    held = state_bytes(state.network, state.optimizer, run.world.size)
    if config.compile:  # takes less than operation by operation; how much is known only afterwards
        in_step, in_windows = batch_memory(sample, reason := "--compile fuses operations"), batch_memory(window, reason)
    else:
        as_triton = kernels.uses_triton(run.world.device)
        in_step = step_memory(state, step, sample, as_triton)
        in_windows = window_memory(state.network, run.precision, window, as_triton)
    return NetworkMemory(step=in_step, windows=in_windows, state_bytes=held)


def prewarm(run: RunSpec, state: TrainState, step: StepConfig, emit: Emit) -> None:
    """Compiles, tunes and measures on dummy data before the clock starts; restores the state afterwards."""
    config, dataset, world = run.config, run.dataset, run.world
    channels, classes = dataset.channels, len(dataset.classes)
    batch = dummy_batch((config.batch_size, channels, *run.slab_shape), classes, world.device)
    windows = dummy_batch((config.val_batch_size, channels, *config.val_input_shape), classes, world.device)
    warm_up(state, batch, windows, step, steps=config.prewarm_steps)
    if config.benchmark:
        sample = (channels, *config.input_shape)
        emit(calibrate(state, partial(make_network, config, dataset), batch, step, sample=sample, world=world))


def describe_start(run: RunSpec) -> events.InitStarted:
    """Returns the configuration and the environment, as the first event of the run."""
    were_cleared = os.environ.get(CACHES_CLEARED_VARIABLE) == "1"
    return events.InitStarted(run.config, describe_environment(run.world.device, run.world.size), were_cleared)


def describe_run(run: RunSpec, state: TrainState) -> events.InitStopped:
    """Returns everything known about a run before its clock starts; logs its notes."""
    config, world = run.config, run.world
    for text in (run.precision.note, kernels.note(world.device), "" if config.benchmark else run.schedule.note()):
        if text:
            note(text)
    return events.InitStopped(
        config=config,
        seeds=dataclasses.asdict(run.seeds),
        division=run.division,
        rule_violations=run.violations,
        platform=config.submission_platform or platform_name(world.device, world.size),
        tensors=tensor_names(state.network),
        samples_per_epoch=run.samples_per_epoch,
        notes=take_notes(),
    )
