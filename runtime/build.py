"""What a run is made of: each part from the command line and the data set. `main.py` puts them together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from common.errors import UserError
from common.files import rotate
from common.messages import note, take_notes
from data_loading.data_loader import EvaluationCases, make_training_loader
from data_loading.integrity import check_files, verify_changed
from data_loading.pytorch_loader import LoaderSettings, TrainingLoader, shape_of
from data_loading.spec import DatasetSpec
from data_loading.transforms import make_augmentation
from model.finetune import freeze, load_part, output_layer
from model.kernels import dispatch as kernels
from model.losses import build_loss
from model.registry import build_network, check_window, freeze_unused
from runtime.arguments import RunConfig, checkpoint_path
from runtime.callbacks.base import (
    Callback,
    Diverged,
    EventDispatcher,
    KeepBest,
    RunContext,
    StopOnSignal,
    TargetReached,
    build_callbacks,
)
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint import resume
from runtime.checkpoint.writer import CheckpointWriter, find_checkpoints, prepare, save
from runtime.distributed.signals import SignalHandler
from runtime.distributed.watchdog import Watchdog
from runtime.distributed.world import World
from runtime.environment import describe_environment, platform_name
from runtime.eval_schedule import make_schedule
from runtime.evaluation import CaseAssignment, SlidingWindowConfig, evaluate
from runtime.flags import parse_interval
from runtime.logging import events, trackers
from runtime.logging.console import ConsoleTracker
from runtime.logging.throughput import ThroughputTracker
from runtime.memory_format import to_device
from runtime.objective import make_objective, split_specs
from runtime.optimizer import LRSchedule, LRScheduleConfig, build_lr_schedule, make_optimizer
from runtime.preflight import Demand, checkpoint_bytes, failures, format_table, run_checks
from runtime.run_spec import RunSpec
from runtime.seeding import seed_process
from runtime.train_state import TrainState
from runtime.training import StepSettings
from runtime.warmup import calibrate, dummy_batch, warm_up

# run_and_time.sh sets it to 1 once it has dropped the page cache; MLPerf wants that in the log.
CACHES_CLEARED_VARIABLE = "CACHES_WERE_CLEARED"


def make_network(config: RunConfig, spec: DatasetSpec) -> nn.Module:
    return build_network(
        config.model,
        spec.channels,
        len(spec.classes),
        normalization=config.normalization,
        activation=config.activation,
    )


def make_loss(config: RunConfig, spec: DatasetSpec, world: World) -> nn.Module:
    return build_loss(config.loss, config.include_background, len(spec.classes)).to(world.device)


def make_step(config: RunConfig, plan: RunSpec, world: World) -> StepSettings:
    """How a micro-batch becomes a loss."""
    _, specs = split_specs(config.augment)
    objective = make_objective(specs, config.batch_size, config.compile)
    return StepSettings(
        make_loss(config, plan.spec, world),
        plan.precision,
        config.ga_steps,
        config.layout,
        plan.seeds.ranks[world.rank],
        objective,
    )


def build_state(config: RunConfig, plan: RunSpec, world: World) -> TrainState:
    """Network, optimizer and scaler, as they stand before the first step: new, or as the checkpoint has them."""
    seed_process(plan.seeds.master, config.cudnn_deterministic, config.cudnn_benchmark)
    network = make_network(config, plan.spec)
    for flag in ("input_shape", "val_input_shape"):
        shape, spec = getattr(config, flag), plan.spec
        check_window(network, shape, f"--{flag}", channels=spec.channels, classes=len(spec.classes))
    freeze_unused(network, plan.spec.channels, config.input_shape)
    _transfer(config, plan, network)
    to_device(network, world.device, config.layout)
    if config.compile:
        network.compile()  # in place: names, state and everyone's references stay
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = make_optimizer(
        config.optimizer, trained, config.learning_rate, config.momentum, config.lamb_betas, config.weight_decay
    )
    state = TrainState(network, world.wrap(network), optimizer, plan.precision.make_scaler())
    if plan.loaded:
        resume.restore(state, plan.loaded, world.rank)
        resume.skip_partial_epoch(state, plan.loaded, config.to_json(), ranks=world.size, seed=plan.seeds.master)
    return state


def _transfer(config: RunConfig, plan: RunSpec, network: nn.Module) -> None:
    """Applies `--init_from`, unless the run continues from its own state, and `--freeze`; notes each."""
    if config.init_from is None and not config.freeze:
        return
    output = output_layer(network, plan.spec.channels, config.input_shape)
    if config.init_from is not None and plan.loaded is None:
        loaded = checkpoints.load(config.init_from, "--init_from")
        weights, epoch = loaded.state(config.checkpoint)
        taken = load_part(network, weights, output, f"--init_from {loaded.path}")
        note(f"--init_from {loaded.path}: the {config.checkpoint} weights, of epoch {epoch}; {taken}")
    if config.freeze:
        note(f"--freeze: {freeze(network, config.freeze, output)}")


def pre_flight(config: RunConfig, plan: RunSpec, state: TrainState, world: World, announce: EventDispatcher) -> None:
    """Looks, on each machine, for what would end the run later. Raises UserError, naming all of it."""
    if config.local_rank != 0:
        return
    path = checkpoint_path(config)
    demand = Demand(
        data_dir=None if config.loader == "synthetic" else config.data_dir,
        training=plan.split["train"],
        evaluation=plan.split["evaluation"] if plan.schedule.first_evaluation else [],
        loader=config.loader,
        workers=config.num_workers,
        batch_size=config.batch_size,
        patch=config.input_shape,
        channels=plan.spec.channels,
        scoring=make_sliding_window_config(config, plan.spec),
        checkpoint_dir=path.parent if path else None,
        checkpoints=config.ckpt_keep,
        checkpoint_bytes=checkpoint_bytes(state.network, state.optimizer),
    )
    checks = run_checks(demand, world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    announce(events.PreflightEnd(format_table(checks), [dataclasses.asdict(check) for check in checks]))
    if problem := failures(checks):
        raise UserError(problem)


def prepare_device(
    config: RunConfig, plan: RunSpec, state: TrainState, settings: StepSettings, world: World, announce: EventDispatcher
) -> None:
    """Compiles, tunes and measures on made-up data, before the clock; the state is afterwards what it was."""
    spec = plan.spec
    batch = dummy_batch(config.batch_size, spec.channels, len(spec.classes), config.input_shape, world.device)
    windows = dummy_batch(config.val_batch_size, spec.channels, 1, config.val_input_shape, world.device)
    warm_up(state, batch, windows, settings, config.untimed_steps)
    if config.benchmark:
        announce(calibrate(state, partial(make_network, config, spec), batch, settings, world))


def describe_start(config: RunConfig, world: World) -> events.InitStarted:
    were_cleared = os.environ.get(CACHES_CLEARED_VARIABLE) == "1"
    return events.InitStarted(config, describe_environment(world.device, world.size), were_cleared)


def describe_run(config: RunConfig, plan: RunSpec, state: TrainState, world: World) -> events.InitStopped:
    """All that can be told of a run before its clock starts."""
    platform = config.submission_platform or platform_name(world.device, world.size)
    for text in (plan.precision.note, kernels.note(world.device), "" if config.benchmark else plan.schedule.note()):
        if text:
            note(text)
    return events.InitStopped(
        config,
        dataclasses.asdict(plan.seeds),
        plan.division,
        plan.reasons,
        platform,
        trackers.tensor_names(state.network),
        plan.samples_per_epoch,
        take_notes(),
    )


def open_data(config: RunConfig, plan: RunSpec, world: World) -> tuple[TrainingLoader, events.DataOpened]:
    """The training loader, the first to look at the volumes; and what to tell of the data."""
    training, evaluation = plan.split["train"], plan.split["evaluation"]
    if config.loader != "synthetic" and config.local_rank == 0:
        verify_changed(config.data_dir, check_files(config.data_dir, [*training, *evaluation]).changed)
    settings = LoaderSettings(
        config.input_shape,
        config.oversampling,
        config.batch_size,
        config.num_workers,
        world.rank,
        world.size,
        plan.seeds.order,
        plan.seeds.samples,
        world.device,
        make_augmentation(split_specs(config.augment)[0]),
        plan.steps,
        plan.capped,
    )
    loader = make_training_loader(config.loader, config.data_dir, training, plan.spec, settings)
    return loader, events.DataOpened(
        len(training),
        len(evaluation),
        plan.samples_per_epoch,
        config.batch_size * world.size * config.ga_steps,
        config.ga_steps,
        list(plan.spec.classes),
        take_notes(),
    )


def make_sliding_window_config(config: RunConfig, spec: DatasetSpec) -> SlidingWindowConfig:
    return SlidingWindowConfig(
        config.val_input_shape,
        config.overlap,
        config.val_batch_size,
        len(spec.classes),
        spec.padding_value,
        spec.crops_remainder,
    )


def make_case_assignment(
    config: RunConfig, cases: Sequence[str], scoring: SlidingWindowConfig, world: World
) -> CaseAssignment:
    """Who scores which case; reads the volumes' headers, so not before the clock runs."""
    return CaseAssignment.make(cases, [scoring.windows(shape_of(config.data_dir, case)) for case in cases], world)


Score = Callable[[int], events.EvaluationStopped]


def make_evaluate_fn(
    config: RunConfig, plan: RunSpec, state: TrainState, loss: nn.Module, interruption: SignalHandler, world: World
) -> Callable[[Sequence[str], Callable[[events.Event], None]], Score]:
    """What makes, of cases and of who hears of each, a function that scores them after an epoch."""
    scoring = make_sliding_window_config(config, plan.spec)

    def make(cases: Sequence[str], emit: Callable[[events.Event], None]) -> Score:
        return partial(
            evaluate,
            network=state.network,
            loss=loss,
            plan=make_case_assignment(config, cases, scoring, world),
            load_case=EvaluationCases(config.data_dir, world.device),
            scoring=scoring,
            precision=plan.precision,
            world=world,
            emit=emit,
            check=interruption.check,
            check_waiting=interruption.check_waiting,
        )

    return make


def make_lr_schedule(config: RunConfig, state: TrainState) -> LRSchedule:
    """The learning rate of each epoch."""
    settings = LRScheduleConfig(
        config.learning_rate,
        config.init_learning_rate,
        config.lr_warmup_epochs,
        config.lr_decay_epochs,
        config.lr_decay_factor,
        config.epochs,
        state.records,
    )
    return build_lr_schedule(config.lr_schedule, settings)


def make_callbacks(
    config: RunConfig,
    plan: RunSpec,
    rate: LRSchedule,
    loader: TrainingLoader,
    saver: CheckpointWriter,
    watchdog: Watchdog,
    context: RunContext,
) -> list[Callback]:
    """Who may change the run, in the order in which they hear of an event; what they keep is there when it is saved."""
    own = build_callbacks(config.callbacks, context)
    schedule: object = rate
    if isinstance(schedule, Callback):
        own.insert(0, schedule)
    rule = make_schedule(config.epochs, plan.samples_per_epoch, None, None)
    diverged = Diverged(context.world, loader.describe, rule.first_evaluation or 1)
    return [watchdog, TargetReached(config.quality_threshold), diverged, KeepBest(), *own, saver, StopOnSignal()]


def make_snapshot(config: RunConfig, plan: RunSpec) -> Callable[[TrainState, list[float]], dict[str, object]]:
    """What makes a checkpoint's content of a state and every rank's losses."""
    return partial(
        checkpoints.snapshot, config=config.to_json(), seed=plan.seeds.master, data=plan.data, spec=plan.spec.to_json()
    )


def make_checkpoint_writer(config: RunConfig, plan: RunSpec, world: World) -> CheckpointWriter:
    """Saves this run's checkpoints; does nothing in a run that keeps none."""
    path = checkpoint_path(config)
    minutes, epochs = parse_interval(config.ckpt_every)
    return CheckpointWriter(
        world=world,
        snapshot=make_snapshot(config, plan),
        write=partial(save, path, keep=config.ckpt_keep) if path else None,
        minutes=minutes,
        epochs=epochs,
    )


def make_announcer(config: RunConfig, plan: RunSpec, world: World) -> EventDispatcher:
    """Who hears of this run's events: trackers on rank 0 alone."""
    if not world.is_main:
        return EventDispatcher([])
    trackers.rotate_logs(config.log_dir)
    watching = [
        *trackers.make_trackers(config.trackers, config.log_dir),
        trackers.RunFileTracker(config.log_dir),
        ConsoleTracker(config.verbose, config.epochs),
    ]
    if config.benchmark:
        watching.append(ThroughputTracker(world.device, config.warmup_steps, world.size, config.log_dir))
    path = checkpoint_path(config)
    if path is not None:
        prepare(path)
        if not (config.resume and plan.loaded):
            rotate(find_checkpoints(path))
    return EventDispatcher(watching)
