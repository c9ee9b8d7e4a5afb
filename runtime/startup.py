"""Before MLPerf's clock starts: pre-flight checks, warm-up on dummy data, and the description of the run."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

from torch import nn

from common.errors import UserError
from common.messages import note, take_notes
from data_loading.base_loader import Batch
from model.kernels import dispatch as kernels
from runtime.arguments import checkpoint_path
from runtime.build import Emit, make_network, make_sliding_window_config
from runtime.environment import describe_environment, platform_name
from runtime.logging import events
from runtime.logging.mlperf import tensor_names
from runtime.preflight import Demand, checkpoint_bytes, failures, format_table, run_checks
from runtime.run_spec import RunSpec
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import calibrate, dummy_batch, warm_up, warm_up_evaluation

# run_and_time.sh sets it to 1 once it has dropped the page cache; MLPerf requires that in the log.
CACHES_CLEARED_VARIABLE = "CACHES_WERE_CLEARED"


def run_preflight(run: RunSpec, state: TrainState | None, emit: Emit) -> None:
    """Checks, on each machine, for conditions that would end the run later.

    Args:
        state: None on ranks that only evaluate. That one of them is the first of its machine means that all are there.

    Raises:
        UserError: a check failed; the message names all that did.
    """
    config = run.config
    if config.local_rank != 0:
        return
    path = checkpoint_path(config) if state else None
    networks = 3 if run.roles.has_evaluators else 2
    demand = Demand(
        data_dir=None if config.loader == "synthetic" else config.data_dir,
        training=run.split["train"] if state else [],
        evaluation=run.split["evaluation"] if run.schedule.first_evaluation else [],
        loader=config.loader if state else "synthetic",  # which reads no training volumes
        workers=config.num_workers if state else 0,
        batch_size=config.batch_size,
        patch=config.input_shape,
        channels=run.dataset.channels,
        scoring=make_sliding_window_config(config, run.dataset),
        checkpoint_dir=path.parent if path else None,
        checkpoints=config.ckpt_keep,
        checkpoint_bytes=checkpoint_bytes(state.network, state.optimizer, networks) if state else 0,
    )
    checks = run_checks(demand, run.world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    emit(events.PreflightEnd(format_table(checks), [dataclasses.asdict(check) for check in checks]))
    if problem := failures(checks):
        raise UserError(problem)


def prewarm(run: RunSpec, state: TrainState, step: StepConfig, emit: Emit) -> None:
    """Compiles, tunes and measures on dummy data before the clock starts; restores the state afterwards."""
    config, dataset, world = run.config, run.dataset, run.world
    shape = (config.batch_size, dataset.channels, *config.input_shape)
    batch = dummy_batch(shape, len(dataset.classes), world.device)
    warm_up(state, batch, _dummy_windows(run), step, steps=config.prewarm_steps)
    if config.benchmark:
        emit(calibrate(state, partial(make_network, config, dataset), batch, step, world=world))


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
    for text in (run.precision.note, kernels.note(world.device), "" if config.benchmark else run.schedule.note()):
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
    )
