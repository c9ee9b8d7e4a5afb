"""The outline of a run: `train_network` trains to the target, `evaluate_checkpoint` scores a saved network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from common.errors import DIVERGED_EXIT
from common.messages import note, notes_held
from model.ensemble import Ensemble
from runtime import build, startup
from runtime.arguments import RunConfig, checkpoint_path
from runtime.checkpoint.writer import PATIENCE_S
from runtime.distributed.signals import SignalHandler
from runtime.distributed.world import World
from runtime.evaluated import read_members
from runtime.evaluation import CaseScorer
from runtime.logging.console import EvaluationTracker
from runtime.logging.events import EventDispatcher, RunFinalized, RunStarted
from runtime.logging.log_folder import run_files
from runtime.network import load_trained, make_checked_network, prepare_network
from runtime.precision import choose_precision
from runtime.remote_evaluation import RemoteEvaluator, evaluate_until_end
from runtime.run_spec import RunSpec, make_run_spec, report_done
from runtime.seeding import seed_process
from runtime.training import train


@notes_held()
def train_network(config: RunConfig, world: World, write_report: Callable[[RunConfig, World], None]) -> int:
    """Executes a training run, from the parsed command line to the last line of the log.

    Args:
        write_report: called on rank 0 once training has ended normally, before the trackers are closed.

    Returns:
        The program's exit status.
    """
    run = make_run_spec(config, world)
    if run.done:
        return report_done(run)
    if run.roles.is_evaluator:
        return evaluate_beside_training(run)
    # Bad specs are refused before an earlier run's files are renamed.
    build.check_specs(run)
    step = build.make_step_config(run)
    make_checked_network(config, run.dataset)
    signals = SignalHandler(world.store)
    watchdog = build.make_watchdog(config, run.roles, signals)
    writer = build.make_checkpoint_writer(run)
    with build.make_event_dispatcher(run, watchdog) as emit:
        # Before the clock: the network is built and tuned; no training data is touched.
        emit(startup.describe_start(run))
        state = build.build_state(run)
        startup.run_preflight(run, state, step, emit)
        startup.prewarm(run, state, step, emit)
        emit(startup.describe_run(run, state))
        world.barrier()
        emit(RunStarted())

        # The clock runs.
        loop = build.make_train_loop(run, state, step, writer=writer, signals=signals, emit=emit)
        try:
            with signals, watchdog:
                stop = train(state, loop)
                writer.finish(state, stop)
                if isinstance(loop.evaluate, RemoteEvaluator):
                    loop.evaluate.end_run(stop.exit_status)
            if stop.exit_status in (0, DIVERGED_EXIT) and not config.no_report and world.is_main:
                write_report(config, world)
        finally:
            emit(RunFinalized(run_files(config.log_dir, checkpoint_path(config))))
    # A launcher ends all ranks as soon as one exits with a status other than 0: let rank 0 finish first. The store may
    # be in rank 0's process, which may be gone.
    with suppress(RuntimeError):
        world.wait_for_main("closed", PATIENCE_S)
    return stop.exit_status


def evaluate_beside_training(run: RunSpec) -> int:
    """Executes the part of a rank that only evaluates in a training run (`--eval_ranks`); returns the exit status."""
    everyone = run.roles.everyone
    signals = SignalHandler(everyone.store)
    watchdog = build.make_watchdog(run.config, run.roles, signals)
    emit = build.make_event_dispatcher(run, watchdog)
    network = prepare_network(run)
    startup.run_evaluator_preflight(run, network, emit)
    startup.prewarm_evaluation(run, network)
    everyone.barrier()

    # The clock runs.
    evaluator = build.make_side_evaluator(run, network, emit)
    with signals, watchdog:
        status = evaluate_until_end(run.roles, evaluator, emit)
    with suppress(RuntimeError):
        everyone.wait_for_main("closed", PATIENCE_S)
    return status


def evaluate_checkpoint(config: RunConfig, given: frozenset[str], world: World) -> int:
    """Scores a checkpoint's network, or several as one: prints a `name value` line per score, writes a table of cases.

    Args:
        given: names of the flags that are on the command line; the checkpoint's flags fill in the others.
    """
    from runtime.case_table import CaseTable, prepare_table  # imports scipy.spatial, which training does without

    members = read_members(config, given)
    prepare_table(config.log_dir, world)
    first, config = members[0], members[0].config
    if world.is_main:
        for line in filter(None, dict.fromkeys(member.flips_note() for member in members)):
            note(line)
    seed_process(0, deterministic=config.cudnn_deterministic, autotune=config.cudnn_benchmark)
    precision = choose_precision(config.amp, config.amp_dtype, world.device)
    network = Ensemble(load_trained(one.checkpoint, one.config, first.dataset, world.device) for one in members)
    for one in network:
        startup.require_window_memory(one, precision, (first.dataset.channels, *config.val_input_shape))
    table = CaseTable(config.data_dir, first.dataset, config.eval_split)
    scorer = CaseScorer(
        network=network,
        loss=build.make_loss(config, first.dataset, world),
        windows=build.make_sliding_window_config(config, first.dataset),
        precision=precision,
        metric=table,
    )
    emit = EventDispatcher([EvaluationTracker(config.verbose)] if world.is_main else [])
    epoch = max(member.checkpoint.state(config.checkpoint)[1] for member in members)
    result = build.make_evaluator(config, scorer, first.cases, world=world, emit=emit)(epoch)
    emit(result)
    if world.is_main:
        print(table.write(config.log_dir, result), file=sys.stderr, flush=True)
    return 0
