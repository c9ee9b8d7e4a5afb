"""MLPerf's 3D U-Net training benchmark (KiTS19): trains to a target Dice, evaluates, predicts, reports.

    python3 main.py --data_dir DATA --amp --epochs 4000 --log_dir LOGS --save_ckpt_path LOGS/checkpoint.pth
    torchrun --nproc_per_node 8 main.py @recipes/kits19_8xgpu.args --data_dir DATA --log_dir LOGS
    python3 main.py --exec_mode evaluate --data_dir DATA --load_ckpt_path LOGS/checkpoint.pth
    python3 main.py --exec_mode predict --load_ckpt_path LOGS/checkpoint.pth --scan SCAN.nii.gz --output MASK.nii.gz
    python3 main.py --exec_mode report --log_dir LOGS

This file wires the rooms; what happens in a run reads from top to bottom in `train_network`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import nn

import plugins
from data_loading.augmentation import make_augmentation
from data_loading.dataset import peek
from data_loading.integrity import check_files, split_digest, verify_changed
from data_loading.loader import LoaderSettings, shape_of, synthetic_cases
from data_loading.loaders import EvaluationCases, make_training_loader
from data_loading.sampling import batches_per_epoch
from data_loading.spec import KITS19, DatasetSpec
from errors import DIVERGED_EXIT, UserError, run_program, warn
from model import kernels
from model.losses import DiceCELoss
from model.networks import build_network, check_window
from runtime import checkpoint as checkpoints
from runtime import events, resume, trackers
from runtime.arguments import RunConfig, checkpoint_path, parse_arguments, with_checkpoint_network
from runtime.callbacks import Announcer, Callback, Diverged, KeepBest, Leave, TargetReached
from runtime.checkpoint import Checkpoint
from runtime.checks import checkpoint_bytes
from runtime.console import ConsoleTracker, EvaluationTracker
from runtime.convergence import expected_length
from runtime.distributed import World
from runtime.division import settle_division
from runtime.environment import describe_environment, platform_name
from runtime.evaluation import Plan, Scoring, evaluate
from runtime.flags import parse_interval
from runtime.interruption import Interruption
from runtime.optim import learning_rate, make_optimizer
from runtime.precision import Precision, choose_precision
from runtime.preflight import Samples, failures, format_table, run_checks
from runtime.pulse import Pulse, Wishes
from runtime.saving import PATIENCE_S, SaveCheckpoint
from runtime.seeding import Seeds, draw_seeds, seed_process
from runtime.throughput import ThroughputTracker
from runtime.training import Schedule, StepSettings, TrainState, make_schedule, place, train
from runtime.warmup import calibrate, made_up_batch, warm_up
from runtime.watchdog import Watchdog

EVALUATION_CASES = Path(__file__).resolve().parent / "evaluation_cases.txt"
# run_and_time.sh sets it to 1 once it has dropped the page cache; MLPerf wants that in the log.
CACHES_CLEARED_VARIABLE = "CACHES_WERE_CLEARED"
# Programs of their own, imported when `--exec_mode` names one: (config, flags given, world) -> exit status.
Program = Callable[[RunConfig, frozenset[str], World], int]
MODES = {"predict": "runtime.extras.predict:main", "report": "runtime.extras.report:report"}
# The page that a run leaves.
REPORT = "runtime.extras.report:write_report"
# Beside its scores `--exec_mode evaluate` writes a table of the cases, where the extras are there.
CASE_TABLE = "runtime.extras.case_table:CaseTable"


def main(argv: list[str] | None = None) -> int:
    faulthandler.enable()  # a crash in native code, or a volume cut short while it is mapped, says where
    config, given = parse_arguments(argv)
    world = World.join(config.local_rank)
    try:
        if config.exec_mode == "evaluate":
            evaluate_checkpoint(config.load_ckpt_path[0], config, given, world)
            return 0
        if config.exec_mode in MODES:
            program: Program = plugins.load(MODES[config.exec_mode], f"--exec_mode {config.exec_mode}", "")
            return program(config, given, world)
        return train_network(config, world)
    finally:
        world.leave()


def train_network(config: RunConfig, world: World) -> int:
    """A whole run, from the command line to the last line of the log; its exit status."""
    spec, split = open_split(config)
    training, evaluation = split["train"], split["evaluation"]
    data = split_digest(config.data_dir, split)
    loaded, notes = find_state(config, data, world)
    batches = batches_per_epoch(len(training), config.batch_size, world.size)
    samples_per_epoch = batches * config.batch_size * world.size
    schedule = make_schedule(config.epochs, samples_per_epoch, config.start_eval_at, config.evaluate_every)
    if config.benchmark or not evaluation:
        schedule = dataclasses.replace(schedule, first_evaluation=None)
    if loaded and (done := resume.is_done(loaded, schedule, config.quality_threshold)):
        return finished(config, loaded, done, world)
    schedule.check(batches, config.ga_steps, config.warmup_steps if config.benchmark else None)
    division, reasons = settle_division(config, spec.name, split, evaluation_ids(), schedule, samples_per_epoch,
                                        loaded is not None and config.resume, world.is_main)  # fmt: skip
    seeds = draw_seeds(loaded.seed if loaded and config.seed < 0 and loaded.seed is not None else config.seed, world)
    precision = choose_precision(config.amp, config.amp_dtype, world.device)
    augment = make_augmentation(config.augment)
    loss = DiceCELoss(config.include_background)
    settings = StepSettings(loss, precision, config.ga_steps, config.layout, seeds.ranks[world.rank])

    interruption = Interruption(world.board)
    watchdog = Watchdog(world, interruption)
    saver = make_saver(config, spec, seeds, data, world)
    announce = make_announcer(config, loaded, world)
    were_cleared = os.environ.get(CACHES_CLEARED_VARIABLE) == "1"
    announce(events.InitStarted(config, describe_environment(world.device, world.size), were_cleared))
    seed_process(seeds.master, config.cudnn_deterministic, config.cudnn_benchmark)
    state = build_state(config, spec, precision, world)
    if loaded:
        checkpoints.restore(state, loaded, world.rank)
        notes += resume.to_boundary(state, loaded, config.to_json(), world.size, seeds.master)
    pre_flight(config, spec, split, schedule, state, world, announce)
    prepare_device(config, spec, state, settings, world, announce)
    platform = config.submission_platform or platform_name(world.device, world.size)
    tensors = trackers.tensor_names(state.network)
    possible = (precision.note, kernels.note(world.device), "" if config.benchmark else schedule.note())
    notes += [note for note in possible if note]
    notes += [expected_length(config, world.size)] if world.is_main and not reasons else []
    announce(events.InitStopped(config, dataclasses.asdict(seeds), division, reasons, platform, tensors,
                                samples_per_epoch, notes))  # fmt: skip
    world.barrier()
    announce(events.RunStarted())

    if config.loader != "synthetic" and config.local_rank == 0:
        verify_changed(config.data_dir, check_files(config.data_dir, [*training, *evaluation]).changed)
    loader, note = make_training_loader(
        config.loader, config.data_dir, training, spec,
        LoaderSettings(config.input_shape, config.oversampling, config.batch_size, config.num_workers, world.rank,
                       world.size, seeds.order, seeds.samples, world.device, augment),
    )  # fmt: skip
    watching: list[Callback] = [watchdog, TargetReached(config.quality_threshold), Diverged(world, loader.describe)]
    announce.govern(state, [*watching, KeepBest(), *([saver] if saver else []), Leave()])
    announce(events.DataOpened(len(training), len(evaluation), samples_per_epoch,
                               config.batch_size * world.size * config.ga_steps, config.ga_steps,
                               list(spec.classes), [note] if note else []))  # fmt: skip
    rate = partial(
        learning_rate, base=config.learning_rate, initial=config.init_learning_rate,
        warmup_epochs=config.lr_warmup_epochs, decay_epochs=config.lr_decay_epochs, decay_factor=config.lr_decay_factor,
    )  # fmt: skip
    scoring = make_scoring(config, spec)
    score = partial(
        evaluate, network=state.network, loss=loss, plan=make_plan(config, evaluation, scoring, world),
        load_case=EvaluationCases(config.data_dir, world.device), scoring=scoring, precision=precision, world=world,
        emit=announce, check=interruption.check, check_waiting=interruption.check_waiting,
    )  # fmt: skip
    pulse = Pulse(world, lambda: Wishes(interruption.number, saver is not None and saver.is_due()))
    try:
        with interruption, watchdog:
            state.stop = train(state, loader, schedule, rate, settings, score, world, pulse, announce)
            if saver:
                saver.finish(state)
        if state.stop.exit_status in (0, DIVERGED_EXIT) and not config.no_report and world.is_main:
            report_run(config, world)
    finally:
        announce(events.Closed(trackers.left_behind(config.log_dir, checkpoint_path(config))))
    # A launcher ends all as soon as one leaves with an exit status; rank 0, which may hold the board, may have left.
    with suppress(RuntimeError):
        world.wait_for_main("closed", PATIENCE_S)
    return state.stop.exit_status


def report_run(config: RunConfig, world: World) -> None:
    """Writes the run's page; what goes wrong there costs the page, not the run."""
    try:
        write = plugins.load(REPORT, "report.html", "report")
        print(f"report {write(config.log_dir, None, None, world.device)}", flush=True)
    except Exception as error:
        warn(f"no report.html: {' '.join(str(error).split()) or type(error).__name__}")


def evaluate_checkpoint(path: Path, config: RunConfig, given: frozenset[str], world: World) -> None:
    """Scores a checkpoint's network, prints a `name value` line each and writes a table of the cases."""
    loaded = checkpoints.load(path)
    config = with_checkpoint_network(config, given, loaded.config)
    spec, split = open_split(config)
    if not split["evaluation"]:
        raise UserError(f"--data_dir {config.data_dir}: its split has no evaluation cases")
    precision = choose_precision(config.amp, config.amp_dtype, world.device)
    seed_process(0, config.cudnn_deterministic, config.cudnn_benchmark)
    network = make_network(config, spec)
    check_window(network, config.val_input_shape, "--val_input_shape")
    weights, epoch = loaded.state(config.checkpoint)
    checkpoints.load_network(network, weights, loaded.path)
    place(network, world.device, config.layout)
    emit = Announcer([EvaluationTracker(config.verbose)] if world.is_main else [])
    scoring = make_scoring(config, spec)
    table = None
    with suppress(UserError):  # without its extras the benchmark evaluates all the same
        table = plugins.load(CASE_TABLE, "--exec_mode evaluate", "")(config.data_dir, spec)
    result = evaluate(
        epoch, network, DiceCELoss(config.include_background), make_plan(config, split["evaluation"], scoring, world),
        EvaluationCases(config.data_dir, world.device), scoring, precision, world, emit, measure=table,
    )  # fmt: skip
    emit(result)
    if table and world.is_main:
        print(table.write(config.log_dir, result), file=sys.stderr, flush=True)


def open_split(config: RunConfig) -> tuple[DatasetSpec, dict[str, list[str]]]:
    """The data set's constants and case ids; volumes stay closed until the clock runs."""
    if config.loader == "synthetic" and config.exec_mode == "train":
        return dataclasses.replace(KITS19, name="synthetic"), {"train": synthetic_cases(), "evaluation": []}
    return peek(config.data_dir, evaluation_ids())


def evaluation_ids() -> list[str]:
    """Numbers of the KiTS19 cases that MLPerf evaluates on."""
    return EVALUATION_CASES.read_text(encoding="utf-8").split()


def build_state(config: RunConfig, spec: DatasetSpec, precision: Precision, world: World) -> TrainState:
    """Network, optimizer and scaler, as they stand before the first step."""
    network = make_network(config, spec)
    check_window(network, config.input_shape, "--input_shape")
    check_window(network, config.val_input_shape, "--val_input_shape")
    place(network, world.device, config.layout)
    if config.compile:
        network.compile()  # in place: names, state and everyone's references stay
    optimizer = make_optimizer(
        config.optimizer, network.parameters(), config.learning_rate, config.momentum, config.lamb_betas,
        config.weight_decay,
    )  # fmt: skip
    return TrainState(network, world.wrap(network), optimizer, precision.make_scaler())


def make_network(config: RunConfig, spec: DatasetSpec) -> nn.Module:
    return build_network(config.model, spec.channels, len(spec.classes), config.normalization, config.activation)


def pre_flight(
    config: RunConfig, spec: DatasetSpec, split: dict[str, list[str]], schedule: Schedule, state: TrainState,
    world: World, announce: Announcer,
) -> None:  # fmt: skip
    """Looks, on each machine, for what would end the run later. Raises UserError, naming all of it."""
    if config.local_rank != 0:
        return
    path = checkpoint_path(config)
    checks = run_checks(
        None if config.loader == "synthetic" else config.data_dir, split["train"],
        split["evaluation"] if schedule.first_evaluation else [],
        Samples(config.loader, config.num_workers, config.batch_size, config.input_shape, spec.channels),
        make_scoring(config, spec), path.parent if path else None, config.ckpt_keep,
        checkpoint_bytes(state.network, state.optimizer), world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )  # fmt: skip
    announce(events.Checked(format_table(checks), [dataclasses.asdict(check) for check in checks]))
    if problem := failures(checks):
        raise UserError(problem)


def prepare_device(
    config: RunConfig, spec: DatasetSpec, state: TrainState, settings: StepSettings, world: World, announce: Announcer
) -> None:
    """Compiles, tunes and measures on made-up data, before the clock; the state is afterwards what it was."""
    shape = (spec.channels, len(spec.classes), config.input_shape, world.device)
    batch = made_up_batch(config.batch_size, *shape)
    windows = made_up_batch(config.val_batch_size, spec.channels, 1, config.val_input_shape, world.device)
    warm_up(state, batch, windows, settings, config.untimed_steps)
    if config.benchmark:
        announce(calibrate(state, partial(make_network, config, spec), batch, settings, world))


def make_scoring(config: RunConfig, spec: DatasetSpec) -> Scoring:
    return Scoring(
        config.val_input_shape, config.overlap, config.val_batch_size, len(spec.classes), spec.padding_value,
        spec.crops_remainder,
    )  # fmt: skip


def make_plan(config: RunConfig, cases: Sequence[str], scoring: Scoring, world: World) -> Plan:
    """Who scores which case; reads the volumes' headers, so not before the clock runs."""
    return Plan.make(cases, [scoring.windows(shape_of(config.data_dir, case)) for case in cases], world)


def find_state(config: RunConfig, data: str, world: World) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if any, and what the user is to know of it."""
    own = checkpoint_path(config) if config.resume else None
    loaded = resume.find(own, next(iter(config.load_ckpt_path), None), world)
    if loaded is None:
        return None, [f"--resume: {own} is not there yet, starting from the beginning"] if config.resume else []
    return loaded, [resume.describe(loaded, resume.changes(loaded, config.to_json(), data))]


def finished(config: RunConfig, loaded: Checkpoint, done: str, world: World) -> int:
    """Nothing is left to train: well where a launcher starts again and again, a mistake where a file was named."""
    if not config.resume:
        raise UserError(f"--load_ckpt_path {loaded.path} {done}; use larger --epochs or another --quality_threshold")
    if world.is_main:
        print(f"nothing left to do: {loaded.path} {done}", flush=True)
    return 0


def make_saver(config: RunConfig, spec: DatasetSpec, seeds: Seeds, data: str, world: World) -> SaveCheckpoint | None:
    """What saves this run's checkpoints; None where it makes none."""
    path = checkpoint_path(config)
    if path is None:
        return None
    take = partial(checkpoints.snapshot, config=config.to_json(), seed=seeds.master, data=data, spec=spec.to_json())
    write = partial(checkpoints.save, path, keep=config.ckpt_keep)
    return SaveCheckpoint(world, *parse_interval(config.ckpt_every), take, write)


def make_announcer(config: RunConfig, loaded: Checkpoint | None, world: World) -> Announcer:
    """Who hears of this run's events: trackers on rank 0 alone."""
    if not world.is_main:
        return Announcer([])
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
        checkpoints.prepare(path)
        if not (config.resume and loaded):
            checkpoints.set_aside(path)
    return Announcer(watching)


if __name__ == "__main__":
    sys.exit(run_program(main, "main.py"))
