"""Builds the parts of a run from its `RunSpec`; `runtime/run.py` puts them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from common import registry
from common.errors import UserError
from common.files import rotate
from common.messages import take_notes
from data_loading.base_loader import LoaderConfig, TrainingLoader
from data_loading.data_loader import EvaluationCases, make_training_loader
from data_loading.dataset import case_shape
from data_loading.folds import write_splits
from data_loading.integrity import check_files, verify_changed
from data_loading.spec import DatasetSpec
from data_loading.transforms import make_augmentation
from model.deep_supervision import OutputsLoss
from model.losses import SlabLoss, build_loss
from runtime.arguments import RunConfig, checkpoint_path
from runtime.callbacks.base import CALLBACKS, RunContext, build_callbacks
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint import resume
from runtime.checkpoint.writer import CheckpointWriter, find_checkpoints, prepare, save, set_aside_damaged
from runtime.distributed.roles import Roles
from runtime.distributed.signals import SignalHandler
from runtime.distributed.step_sync import StepRequest, StepSync
from runtime.distributed.watchdog import Timeouts, Watchdog
from runtime.distributed.world import World
from runtime.eval_schedule import make_schedule
from runtime.evaluation import CaseAssignment, CaseScorer, Evaluator, SlidingWindowConfig
from runtime.io_flags import parse_interval
from runtime.logging import events
from runtime.logging.base import TRACKERS, make_trackers
from runtime.logging.console import ConsoleTracker
from runtime.logging.events import Event, EventDispatcher
from runtime.logging.jsonl import RunFileTracker
from runtime.logging.log_folder import rotate_logs
from runtime.logging.throughput import ThroughputTracker
from runtime.lr_schedule import LRSchedule, LRScheduleConfig, build_lr_schedule
from runtime.network import prepare_network
from runtime.objective import make_objective, split_specs
from runtime.optimizer import make_optimizer
from runtime.remote_evaluation import RemoteEvaluator
from runtime.run_spec import RunSpec
from runtime.test_time_flips import flips_of
from runtime.train_state import TrainState
from runtime.training import StepConfig, TrainLoop
from runtime.weight_average import WeightAverage

Emit = Callable[[Event], None]


def make_loss(config: RunConfig, dataset: DatasetSpec, world: World) -> nn.Module:
    classes, ignored = len(dataset.classes), dataset.ignore_label
    return build_loss(config.loss, config.include_background, classes, ignored).to(world.device)


def make_lr_schedule(config: RunConfig, callback_state: dict[str, dict[str, Any]]) -> LRSchedule:
    schedule_config = LRScheduleConfig(
        learning_rate=config.learning_rate,
        init_learning_rate=config.init_learning_rate,
        lr_warmup_epochs=config.lr_warmup_epochs,
        lr_decay_epochs=config.lr_decay_epochs,
        lr_decay_factor=config.lr_decay_factor,
        epochs=config.epochs,
        callback_state=callback_state,
    )
    return build_lr_schedule(config.lr_schedule, schedule_config)


def check_specs(run: RunSpec) -> None:
    """Refuses names and files that the run would trip over once an earlier run's files have been renamed.

    Raises:
        UserError: an unknown schedule, callback or tracker, or `--init_from` is a file that would be renamed.
    """
    config, path = run.config, checkpoint_path(run.config)
    make_lr_schedule(config, {})
    for spec in config.callbacks:
        registry.resolve(registry.Spec(spec, trusted=True), CALLBACKS, "--callbacks")
    for spec in config.trackers:
        registry.resolve(registry.Spec(spec, trusted=True), TRACKERS, "--trackers")
    start = config.init_from
    if start and path and not run.loaded and any(start.samefile(file) for file in find_checkpoints(path)):
        raise UserError(f"--init_from {start} is in the folder of this run, which renames it; give another --log_dir")


def make_step_config(run: RunSpec) -> StepConfig:
    """Returns how the loss of a micro-batch is computed."""
    config = run.config
    _, specs = split_specs(config.augment)
    loss = make_loss(config, run.dataset, run.world)
    loss = OutputsLoss(SlabLoss(loss, run.slabs) if run.slabs else loss)
    objective = make_objective(specs, config.batch_size, config.compile)
    if run.slabs and getattr(objective, "looks_inside", False):
        raise UserError(f"--augment {specs[0]} does not go with --ranks_per_sample, whose layers communicate; drop one")
    if config.checkpoint_activations and getattr(objective, "looks_inside", False):
        raise UserError(f"--augment {specs[0]} does not go with --checkpoint_activations; drop one")
    return StepConfig(
        loss=loss,
        precision=run.precision,
        ga_steps=config.ga_steps,
        layout=config.layout,
        seed=run.seeds.ranks[run.groups.index],  # a group's ranks mix the same samples
        objective=objective,
        max_grad_norm=config.max_grad_norm,
    )


def build_state(run: RunSpec) -> TrainState:
    """Builds network, optimizer and scaler: new, or restored from the checkpoint."""
    config, world = run.config, run.world
    network = prepare_network(run)
    optimizer = make_optimizer(
        config.optimizer,
        [p for p in network.parameters() if p.requires_grad],
        config.learning_rate,
        momentum=config.momentum,
        betas=config.lamb_betas,
        weight_decay=config.weight_decay,
    )
    state = TrainState(
        network=network,
        model=world.wrap(network),
        optimizer=optimizer,
        scaler=run.precision.make_scaler(),
        average=None if config.ema_decay is None else WeightAverage(network, config.ema_decay),
    )
    if run.loaded:
        resume.restore(state, run.loaded, world.rank)
        resume.skip_partial_epoch(state, run.loaded, config.to_json(), ranks=world.size, seed=run.seeds.master)
    return state


def make_train_loop(
    run: RunSpec,
    state: TrainState,
    step: StepConfig,
    *,
    writer: CheckpointWriter,
    signals: SignalHandler,
    emit: Emit,
) -> TrainLoop:
    """Opens the data and builds the parts that the training loop drives; called once the clock runs."""
    config = run.config
    loader, data_opened = open_training_data(run)

    scorer = CaseScorer(
        network=state.network,
        loss=make_loss(config, run.dataset, run.world),  # of whole windows, unlike training's with --ranks_per_sample
        windows=make_sliding_window_config(config, run.dataset),
        precision=run.precision,
        check=signals.check,
        check_waiting=signals.check_waiting,
    )

    def make_evaluate_fn(cases: Sequence[str], emit: Emit) -> Evaluator:
        if run.roles.has_evaluators:
            raise UserError(
                "--eval_ranks: ranks that train do not evaluate, as one of --callbacks asks; drop one of the two"
            )
        return make_evaluator(config, scorer, cases, world=run.world, emit=emit)

    context = RunContext(
        log_dir=config.log_dir,
        world=run.world,
        training_cases=run.split["train"],
        make_evaluate_fn=make_evaluate_fn,
        emit=emit,
        snapshot=make_snapshot(run),
    )
    cases = run.split["evaluation"]
    remote = RemoteEvaluator(roles=run.roles, cases=len(cases), signals=signals, emit=emit)
    rule = make_schedule(config.epochs, run.samples_per_epoch)
    loop = TrainLoop(
        loader=loader,
        schedule=run.schedule,
        learning_rate=make_lr_schedule(config, state.callback_state),
        step=step,
        evaluate=remote if run.roles.has_evaluators else make_evaluate_fn(cases, emit),
        callbacks=build_callbacks(config.callbacks, context),
        checkpoints=writer,
        step_sync=StepSync(run.world, lambda: StepRequest(signals.number, writer.is_due())),
        world=run.world,
        emit=emit,
        quality_threshold=config.quality_threshold,
        ranks_per_sample=run.groups.ranks,
        first_rule_evaluation=rule.first_evaluation or 1,
    )
    emit(data_opened)
    return loop


def make_side_evaluator(run: RunSpec, network: nn.Module, emit: Emit) -> Evaluator:
    """Returns what scores the evaluation cases on a rank that only evaluates; called once the clock runs."""
    assert run.roles.link is not None
    scorer = CaseScorer(
        network=network,
        loss=make_loss(run.config, run.dataset, run.world),
        windows=make_sliding_window_config(run.config, run.dataset),
        precision=run.precision,
        check=run.roles.link.check,
        check_waiting=run.roles.link.check,
    )
    return make_evaluator(run.config, scorer, run.split["evaluation"], world=run.world, emit=emit)


def open_training_data(run: RunSpec) -> tuple[TrainingLoader, events.DataOpened]:
    """Returns the training loader, the first to read the volumes, and the event that describes the data."""
    config, world = run.config, run.world
    training, evaluation = run.split["train"], run.split["evaluation"]
    if config.loader != "synthetic" and config.local_rank == 0:
        verify_changed(config.data_dir, check_files(config.data_dir, [*training, *evaluation]).changed)
    loader_config = LoaderConfig(
        patch=config.input_shape,
        oversampling=config.oversampling,
        class_weights=config.class_sampling_weights,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        worker_timeout_s=config.worker_timeout,
        rank=run.groups.index,
        ranks=run.groups.count,
        slab=run.groups.slab,
        slabs=run.groups.ranks,
        order_seed=run.seeds.order,
        sample_seed=run.seeds.samples,
        device=world.device,
        augment=make_augmentation(split_specs(config.augment)[0], len(run.dataset.classes)),
        fixed_batches=run.fixed_batches,
        pseudo_labels=run.pseudo_labels,
    )
    loader = make_training_loader(
        config.loader, config.data_dir, cases=training, spec=run.dataset, config=loader_config
    )
    return loader, events.DataOpened(
        train_samples=len(training),
        eval_samples=len(evaluation),
        samples_per_epoch=run.samples_per_epoch,
        global_batch_size=config.batch_size * run.groups.count * config.ga_steps,
        gradient_accumulation_steps=config.ga_steps,
        classes=list(run.dataset.classes),
        notes=take_notes(),
    )


def make_sliding_window_config(config: RunConfig, dataset: DatasetSpec) -> SlidingWindowConfig:
    return SlidingWindowConfig(
        window=config.val_input_shape,
        overlap=config.overlap,
        batch_size=config.val_batch_size,
        classes=len(dataset.classes),
        padding_value=dataset.padding_value,
        crops_remainder=dataset.crops_remainder,
        flips=flips_of(config.test_time_flips),
        ignore_label=dataset.ignore_label,
    )


def make_evaluator(
    config: RunConfig, scorer: CaseScorer, cases: Sequence[str], *, world: World, emit: Emit
) -> Evaluator:
    """Returns an evaluator of these cases. Reads the volumes' headers, so it must wait until the clock runs."""
    windows = [scorer.windows.windows(case_shape(config.data_dir, case)) for case in cases]
    return Evaluator(
        scorer=scorer,
        assignment=CaseAssignment.make(cases, windows, world),
        load_case=EvaluationCases(config.data_dir, world.device),
        world=world,
        emit=emit,
    )


def make_snapshot(run: RunSpec) -> Callable[[TrainState, list[float]], dict[str, object]]:
    """Returns a function that makes a checkpoint's content from the state and every rank's loss sum."""
    return partial(
        checkpoints.snapshot,
        config=run.config.to_json(),
        seed=run.seeds.master,
        data=run.data_digest,
        spec=run.dataset.to_json(),
        fold=run.fold,
    )


def make_checkpoint_writer(run: RunSpec) -> CheckpointWriter:
    """Returns the writer of this run's checkpoints, which does nothing in a run that keeps none."""
    path = checkpoint_path(run.config)
    minutes, epochs = parse_interval(run.config.ckpt_every)
    return CheckpointWriter(
        world=run.world,
        snapshot=make_snapshot(run),
        write=partial(save, path, keep=run.config.ckpt_keep) if path else None,
        minutes=minutes,
        epochs=epochs,
    )


def make_watchdog(config: RunConfig, roles: Roles, signals: SignalHandler) -> Watchdog:
    """Returns this rank's watchdog, which leaves a rank that waits for its loader the time of `--worker_timeout`."""
    timeouts = Timeouts()
    # The loader's own error names the cases, so it comes first.
    stall_s = max(config.stall_timeout, config.worker_timeout + 2 * timeouts.heartbeat_s)
    return Watchdog(roles.everyone, signals, replace(timeouts, stall_s=stall_s), peers=roles.peers)


def make_event_dispatcher(run: RunSpec, watchdog: Watchdog) -> EventDispatcher:
    """Prepares the folders of logs and checkpoints; trackers exist on rank 0 only, the watchdog on every rank."""
    config, world = run.config, run.world
    if not run.roles.everyone.is_main:
        return EventDispatcher([], watchdog)
    rotate_logs(config.log_dir)
    if run.folds:
        write_splits(config.log_dir, run.folds)
    active = [
        *make_trackers(config.trackers, config.log_dir),
        RunFileTracker(config.log_dir),
        ConsoleTracker(config.verbose, config.epochs, run.loaded.best_score if run.loaded else None),
    ]
    if config.benchmark:
        active.append(
            ThroughputTracker(
                world.device,
                config.warmup_steps,
                ranks=world.size,
                ranks_per_sample=config.ranks_per_sample,
                log_dir=config.log_dir,
            )
        )
    path = checkpoint_path(config)
    if path is not None:
        prepare(path)
        if config.resume and run.loaded:
            set_aside_damaged(path, run.loaded.path)
        else:
            rotate(find_checkpoints(path))
    return EventDispatcher(active, watchdog)
