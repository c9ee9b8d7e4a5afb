"""What is known of a run before anything is built or any volume is touched: data set, schedule, division, seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.messages import logger, note
from data_loading.dataset import pseudo_share, read_spec_and_split
from data_loading.integrity import split_digest
from data_loading.pytorch_loader import synthetic_cases
from data_loading.sampler import PseudoLabelCap, batches_per_epoch
from data_loading.spec import KITS19, DatasetSpec
from runtime.arguments import RunConfig, checkpoint_path
from runtime.checkpoint import resume
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule, make_schedule
from runtime.mlperf.closed_division import RESUMED, RuleViolation, settle_division
from runtime.mlperf.convergence import expected_length
from runtime.precision import Precision, choose_precision
from runtime.seeding import Seeds, draw_seeds

EVALUATION_CASES = Path(__file__).resolve().parents[1] / "evaluation_cases.txt"


@dataclass(frozen=True)
class RunSpec:
    """What is known of a run before anything is built or any volume is touched.

    Attributes:
        split: case ids by subset.
        data: digest of the data set and its split.
        loaded: the checkpoint to go on from, if any.
        steps, capped: of `EpochSampler`.
        done: why nothing is left to train, "" where something is.
        reasons: what makes it an open one.
    """

    spec: DatasetSpec
    split: dict[str, list[str]]
    data: str
    loaded: Checkpoint | None
    done: str
    steps: int | None
    capped: PseudoLabelCap
    schedule: EvalSchedule
    samples_per_epoch: int
    reasons: list[str]
    division: str
    seeds: Seeds
    precision: Precision


def plan_run(config: RunConfig, world: World) -> RunSpec:
    """Raises UserError where the flags, the data set and a checkpoint do not go together."""
    spec, split = open_split(config)
    data = split_digest(config.data_dir, split)
    loaded = find_state(config, data, world)
    capped = PseudoLabelCap(*pseudo_share(config.data_dir))
    steps = config.steps_per_epoch * config.ga_steps if config.steps_per_epoch else None
    batches = steps or batches_per_epoch(len(split["train"]), config.batch_size, world.size, capped)
    samples_per_epoch = batches * config.batch_size * world.size
    schedule = make_schedule(config.epochs, samples_per_epoch, config.start_eval_at, config.evaluate_every)
    if config.benchmark or not split["evaluation"]:
        schedule = dataclasses.replace(schedule, first_evaluation=None)
    done = resume.is_done(loaded, schedule, config.quality_threshold) if loaded else ""
    if not done:
        schedule.check(batches, config.ga_steps, config.warmup_steps if config.benchmark else None)
    others = (
        [RuleViolation("training cases", f"with {capped.count} pseudo-labelled", "MLPerf's")] if capped.count else []
    )
    others += [RESUMED] if loaded and config.resume else []
    asked = dataclasses.replace(config, division="auto") if done else config
    division, reasons = settle_division(asked, spec.name, split, evaluation_ids(), schedule, samples_per_epoch, others)
    if not (reasons or done):
        note(expected_length(config, world.size))
    seeds = draw_seeds(loaded.seed if loaded and config.seed < 0 and loaded.seed is not None else config.seed, world)
    precision = choose_precision(config.amp, config.amp_dtype, world.device)
    return RunSpec(
        spec,
        split,
        data,
        loaded,
        done,
        steps,
        capped,
        schedule,
        samples_per_epoch,
        reasons,
        division,
        seeds,
        precision,
    )


def open_split(config: RunConfig) -> tuple[DatasetSpec, dict[str, list[str]]]:
    """The data set's constants and case ids; volumes stay closed until the clock runs."""
    if config.loader == "synthetic" and config.exec_mode == "train":
        return dataclasses.replace(KITS19, name="synthetic"), {"train": synthetic_cases(), "evaluation": []}
    return read_spec_and_split(config.data_dir, evaluation_ids())


def evaluation_ids() -> list[str]:
    """Numbers of the KiTS19 cases that MLPerf evaluates on."""
    return EVALUATION_CASES.read_text(encoding="utf-8").split()


def find_state(config: RunConfig, data: str, world: World) -> Checkpoint | None:
    """Returns the checkpoint to continue from, if any."""
    own = checkpoint_path(config) if config.resume else None
    loaded = resume.find(own, next(iter(config.load_ckpt_path), None), world)
    if loaded is not None:
        note(resume.describe(loaded, resume.changes(loaded, config.to_json(), data)))
    elif config.resume:
        note(f"--resume: {own} is not there yet, starting from the beginning")
    return loaded


def leave_done(config: RunConfig, plan: RunSpec) -> int:
    """Nothing is left to train: well where a launcher starts again and again, a mistake where a file was named."""
    assert plan.loaded is not None
    told = f"{plan.loaded.path} {plan.done}"
    if not config.resume:
        raise UserError(f"--load_ckpt_path {told}; use larger --epochs or another --quality_threshold")
    logger.info(f"nothing left to do: {told}")
    return 0
