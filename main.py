"""MLPerf's 3D U-Net training benchmark (KiTS19): trains to a target Dice, evaluates, predicts, reports.

    python3 main.py --data_dir DATA --amp --epochs 4000 --log_dir LOGS --save_ckpt_path LOGS/checkpoint.pth
    torchrun --nproc_per_node 8 main.py @recipes/kits19_8xgpu.args --data_dir DATA --log_dir LOGS
    python3 main.py --exec_mode evaluate --data_dir DATA --load_ckpt_path LOGS/checkpoint.pth
    python3 main.py --exec_mode predict --load_ckpt_path LOGS/checkpoint.pth --scan SCAN.nii.gz --output MASK.nii.gz
    python3 main.py --exec_mode report --log_dir LOGS

What happens in a run reads from top to bottom in `train_network`; what is known before, in `runtime/run_spec.py`, and
what it is made of, in `runtime/build.py`.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import suppress

from common import registry
from common.errors import DIVERGED_EXIT, UserError, run_program
from common.messages import logger, notes_held
from data_loading.data_loader import EvaluationCases
from model.registry import check_window
from runtime import build, run_spec
from runtime.arguments import RunConfig, checkpoint_path, parse_arguments, with_checkpoint_network
from runtime.callbacks.base import EventDispatcher, RunContext
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.writer import PATIENCE_S
from runtime.distributed.signals import SignalHandler
from runtime.distributed.step_sync import StepRequest, StepSync
from runtime.distributed.watchdog import Watchdog
from runtime.distributed.world import World
from runtime.evaluation import evaluate
from runtime.logging import events, trackers
from runtime.logging.console import EvaluationTracker
from runtime.memory_format import to_device
from runtime.precision import choose_precision
from runtime.seeding import seed_process
from runtime.training import train

# Programs of their own, imported when `--exec_mode` names one: (config, flags given, world) -> exit status.
Program = Callable[[RunConfig, frozenset[str], World], int]
MODES = {"predict": "prediction.predict:main", "report": "report:report"}
# The page that a run leaves.
REPORT = "report:write_report"
# Beside its scores `--exec_mode evaluate` writes a table of the cases, where the extras are there.
CASE_TABLE = "runtime.case_table:CaseTable"


def main(argv: list[str] | None = None) -> int:
    faulthandler.enable()  # a crash in native code, or a volume cut short while it is mapped, says where
    config, given = parse_arguments(argv)
    world = World.join(config.local_rank)
    try:
        if config.exec_mode == "evaluate":
            evaluate_checkpoint(config, given, world)
            return 0
        if config.exec_mode in MODES:
            program: Program = registry.load(MODES[config.exec_mode], f"--exec_mode {config.exec_mode}", "")
            return program(config, given, world)
        return train_network(config, world)
    finally:
        world.leave()


@notes_held()
def train_network(config: RunConfig, world: World) -> int:
    """A whole run, from the command line to the last line of the log; its exit status."""
    plan = run_spec.plan_run(config, world)
    if plan.done:
        return run_spec.leave_done(config, plan)
    settings = build.make_step(config, plan, world)

    interruption = SignalHandler(world.board)
    watchdog = Watchdog(world, interruption)
    saver = build.make_checkpoint_writer(config, plan, world)
    announce = build.make_announcer(config, plan, world)
    announce(build.describe_start(config, world))
    state = build.build_state(config, plan, world)
    build.pre_flight(config, plan, state, world, announce)
    build.prepare_device(config, plan, state, settings, world, announce)
    announce(build.describe_run(config, plan, state, world))
    world.barrier()
    announce(events.RunStarted())

    loader, opened = build.open_data(config, plan, world)
    make_evaluate_fn = build.make_evaluate_fn(config, plan, state, settings.loss, interruption, world)
    rate = build.make_lr_schedule(config, state)
    context = RunContext(
        config.log_dir, world, plan.split["train"], make_evaluate_fn, announce, build.make_snapshot(config, plan)
    )
    announce.attach(state, build.make_callbacks(config, plan, rate, loader, saver, watchdog, context))
    announce(opened)
    score = make_evaluate_fn(plan.split["evaluation"], announce)
    step_sync = StepSync(world, lambda: StepRequest(interruption.number, saver.is_due()))
    try:
        with interruption, watchdog:
            state.stop = train(state, loader, plan.schedule, rate, settings, score, world, step_sync, announce)
            saver.finish(state, state.stop)
        if state.stop.exit_status in (0, DIVERGED_EXIT) and not config.no_report and world.is_main:
            report_run(config, world)
    finally:
        announce(events.RunFinalized(trackers.left_behind(config.log_dir, checkpoint_path(config))))
    # A launcher ends all as soon as one leaves with an exit status; rank 0, which may hold the board, may have left.
    with suppress(RuntimeError):
        world.wait_for_main("closed", PATIENCE_S)
    return state.stop.exit_status


def report_run(config: RunConfig, world: World) -> None:
    """Writes the run's page; what goes wrong there costs the page, not the run."""
    try:
        write = registry.load(REPORT, "report.html", "report")
        logger.info(f"report {write(config.log_dir, None, None, world.device, config.model)}")
    except Exception as error:
        logger.warning(f"no report.html: {' '.join(str(error).split()) or type(error).__name__}")


def evaluate_checkpoint(config: RunConfig, given: frozenset[str], world: World) -> None:
    """Scores a checkpoint's network, prints a `name value` line each and writes a table of the cases."""
    loaded = checkpoints.load(config.load_ckpt_path[0])
    config = with_checkpoint_network(config, given, loaded.config)
    spec, split = run_spec.open_split(config)
    cases = split.get(config.subset)
    if not cases:
        there = ", ".join(f"{len(found)} of {subset}" for subset, found in split.items() if found)
        raise UserError(f"--data_dir {config.data_dir}: its split has no {config.subset} cases, but {there or 'none'}")
    precision = choose_precision(config.amp, config.amp_dtype, world.device)
    seed_process(0, config.cudnn_deterministic, config.cudnn_benchmark)
    network = build.make_network(config, spec)
    check_window(
        network, config.val_input_shape, "--val_input_shape", channels=spec.channels, classes=len(spec.classes)
    )
    weights, epoch = loaded.state(config.checkpoint)
    checkpoints.load_network(network, weights, loaded.path)
    to_device(network, world.device, config.layout)
    emit = EventDispatcher([EvaluationTracker(config.verbose)] if world.is_main else [])
    scoring = build.make_sliding_window_config(config, spec)
    table = None
    with suppress(UserError):  # without its extras the benchmark evaluates all the same
        table = registry.load(CASE_TABLE, "--exec_mode evaluate", "")(config.data_dir, spec, config.subset)
    dealt = build.make_case_assignment(config, cases, scoring, world)
    result = evaluate(
        epoch,
        network,
        build.make_loss(config, spec, world),
        dealt,
        EvaluationCases(config.data_dir, world.device),
        scoring,
        precision,
        world,
        emit,
        measure=table,
    )
    emit(result)
    if table and world.is_main:
        print(table.write(config.log_dir, result), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main, "main.py"))
