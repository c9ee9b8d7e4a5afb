"""Facts known before a run: data set, checkpoint, schedule, division, seeds. Nothing is built, no volume is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.messages import counted, is_main_rank, logger, note
from data_loading.dataset import pseudo_label_cap, read_spec_and_split, seen_by_teacher
from data_loading.folds import Fold, LabelledCases, find_folds, note_unused
from data_loading.integrity import split_digest
from data_loading.sampler import PseudoLabelCap, batches_per_epoch
from data_loading.spec import KITS19, DatasetSpec
from data_loading.split import leave_out
from data_loading.synthetic_loader import synthetic_cases
from runtime.arguments import RunConfig, checkpoint_path
from runtime.checkpoint import resume
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.roles import Roles, assign_roles
from runtime.distributed.sample_parallel import GroupSlabs, SampleGroups
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule, make_schedule
from runtime.mlperf.closed_division import RESUMED, RuleViolation, RunFacts, identify_dataset, settle_division
from runtime.mlperf.convergence import expected_length
from runtime.precision import Precision, choose_precision
from runtime.seeding import Seeds, draw_seeds

EVALUATION_CASES = Path(__file__).resolve().parents[1] / "evaluation_cases.txt"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Facts known before a run.

    Attributes:
        world: this rank among those that do the same: train, or only evaluate.
        dataset: the data set's constants.
        split: case ids by subset.
        folds: all folds of `--folds` or `--splits`, without regard to `--exclude`; () without either.
        data_digest: of the data set and its split.
        loaded: the checkpoint to continue from, if any.
        done: why nothing is left to train; "" if something is.
        groups: the groups of ranks that share each sample; of one rank each without `--ranks_per_sample`.
        slabs: the connection of this rank's group; None if it has its samples for itself.
        fixed_batches: micro-batches of this rank per epoch with `--steps_per_epoch`; None: one pass over the data.
        pseudo_labels: the cap on pseudo-labelled cases in a batch.
        samples_per_epoch: over all ranks that train.
        violations: the closed division's rules that this run does not follow.
        division: "closed" or "open".
        doubtful_cases: why, by case (see `data_loading/mlperf_md5.py`).
    """

    config: RunConfig
    world: World
    groups: SampleGroups
    slabs: GroupSlabs | None
    roles: Roles
    dataset: DatasetSpec
    split: dict[str, list[str]]
    folds: tuple[Fold, ...]
    data_digest: str
    loaded: Checkpoint | None
    done: str
    fixed_batches: int | None
    pseudo_labels: PseudoLabelCap
    schedule: EvalSchedule
    samples_per_epoch: int
    violations: list[str]
    division: str
    doubtful_cases: Mapping[str, str]
    seeds: Seeds
    precision: Precision

    @property
    def fold(self) -> Fold | None:
        """The fold that is evaluated; None in a run on the data set's own split."""
        return None if self.config.fold is None else self.folds[self.config.fold]

    @property
    def slab_shape(self) -> tuple[int, int, int]:
        """Shape (D, H, W) of this rank's part of a training crop."""
        depth, height, width = self.config.input_shape
        return depth // self.groups.ranks, height, width


def make_run_spec(config: RunConfig, world: World) -> RunSpec:
    """Reads the data set's index and the checkpoint, and derives the facts of the run from them.

    Args:
        world: all ranks of the run.

    Raises:
        UserError: the flags, the data set and the checkpoint do not fit together.
    """
    roles = assign_roles(world, config.eval_ranks)
    rank = 0 if roles.is_evaluator else roles.own.rank
    groups = SampleGroups.divide(rank, roles.training, config.ranks_per_sample)
    dataset, split, folds = read_dataset(config)
    if config.eval_ranks and not split["evaluation"]:
        raise UserError(f"--eval_ranks {config.eval_ranks}, but --data_dir {config.data_dir} has no evaluation cases")
    check_class_weights(config, dataset)
    data_digest = split_digest(config.data_dir, split)
    loaded = find_checkpoint(config, data_digest, world)
    pseudo_labels = read_pseudo_labels(config, split)
    fixed_batches = config.steps_per_epoch * config.ga_steps if config.steps_per_epoch else None
    batches = fixed_batches or batches_per_epoch(len(split["train"]), config.batch_size, groups.count, pseudo_labels)
    samples_per_epoch = batches * config.batch_size * groups.count
    schedule = make_schedule(config.epochs, samples_per_epoch, config.start_eval_at, config.evaluate_every)
    if config.benchmark or not split["evaluation"]:
        schedule = dataclasses.replace(schedule, first_evaluation=None)
    done = resume.is_done(loaded, schedule, config.quality_threshold) if loaded else ""
    if not done:
        schedule.check(batches, config.ga_steps, config.warmup_steps if config.benchmark else None)
    other_violations = []
    if pseudo_labels.count:
        other_violations.append(
            RuleViolation("training cases", f"with {pseudo_labels.count} pseudo-labelled", "MLPerf's")
        )
    if dataset.ignore_label is not None:
        other_violations.append(RuleViolation("voxels", "left out by an ignore label", "all"))
    if loaded and config.resume:
        other_violations.append(RESUMED)
    identity = identify_dataset(config, dataset.name, split)
    division, violations = settle_division(
        RunFacts(
            config=dataclasses.replace(config, division="auto") if done else config,
            dataset=identity,
            evaluation_ids=evaluation_ids(),
            schedule=schedule,
            samples_per_epoch=samples_per_epoch,
            other_violations=other_violations,
        )
    )
    if not (violations or done):
        note(expected_length(config, groups.count))
    seed = config.seed
    if loaded and loaded.seed is not None and config.seed < 0:
        seed = loaded.seed
    return RunSpec(
        config=config,
        world=roles.own,
        roles=roles,
        groups=groups,
        slabs=None if roles.is_evaluator else groups.connect(roles.own),
        dataset=dataset,
        split=split,
        folds=folds,
        data_digest=data_digest,
        loaded=loaded,
        done=done,
        fixed_batches=fixed_batches,
        pseudo_labels=pseudo_labels,
        schedule=schedule,
        samples_per_epoch=samples_per_epoch,
        violations=violations,
        division=division,
        doubtful_cases=identity.doubtful_cases,
        seeds=draw_seeds(seed, world, roles.training),
        precision=choose_precision(config.amp, config.amp_dtype, world.device),
    )


def read_pseudo_labels(config: RunConfig, split: Mapping[str, Sequence[str]]) -> PseudoLabelCap:
    """Returns the cap on pseudo-labelled cases in a batch; notes evaluation cases that their teacher was trained on.

    Raises:
        UserError: a batch has no place for them, so that none would ever be used.
    """
    cap = pseudo_label_cap(config.data_dir, split)
    if cap.count and cap.max_share and not cap.max_per_batch(config.batch_size):
        raise UserError(
            f"--batch_size {config.batch_size}: a share of {cap.max_share:g} of it leaves no place for the "
            f"{counted(cap.count, 'pseudo-labelled case')}; use a larger one, or label again with another --max_share"
        )
    evaluated = split["evaluation"]
    if cap.count and (seen := seen_by_teacher(config.data_dir, evaluated)):
        note(seen_cases(f"--data_dir {config.data_dir}: the teacher of its pseudo-labels", seen, evaluated))
    return cap


def seen_cases(network: str, seen: Sequence[str], evaluated: Sequence[str]) -> str:
    """Returns the note on a network that was trained on cases which are to be evaluated."""
    total = counted(len(evaluated), "evaluation case")
    return f"{network} was trained on {len(seen)} of {total}, so these score too well: {seen[0]}, …"


def check_class_weights(config: RunConfig, dataset: DatasetSpec) -> None:
    """Raises UserError unless `--class_sampling_weights` is empty or has a weight for each foreground class."""
    weights, names = config.class_sampling_weights, dataset.classes[1:]
    if weights and (len(weights) != len(names) or not any(weights)):
        raise UserError(
            f"--class_sampling_weights {' '.join(f'{weight:g}' for weight in weights)}: give one weight for each of "
            f"{', '.join(names)}, and one of them above 0"
        )


def read_dataset(
    config: RunConfig, trained_on: Fold | None = None
) -> tuple[DatasetSpec, dict[str, list[str]], tuple[Fold, ...]]:
    """Returns the data set's constants, its case ids by subset, and its folds; opens no volume.

    Cases of `--exclude` are left out of the subsets; the folds of all other cases stay the same.

    Args:
        trained_on: the fold of the checkpoint that is evaluated, if it has one.

    Raises:
        UserError: there are no such cases or folds, or `--fold` is another one than the checkpoint's.
    """
    if config.loader == "synthetic" and config.exec_mode == "train":
        split = leave_out({"train": synthetic_cases(), "evaluation": []}, config.exclude)
        return dataclasses.replace(KITS19, name="synthetic"), split, ()
    spec, whole = read_spec_and_split(config.data_dir, evaluation_ids())
    kept = leave_out(whole, config.exclude)
    if config.fold is None and trained_on is None:
        return spec, kept, ()
    labelled = LabelledCases.find(config.data_dir, whole, only_training=config.folds_of == "train")
    folds = find_folds(labelled, config.folds, config.splits) if config.fold is not None else []
    fold = _choose_fold(config, labelled, folds, trained_on)
    if fold is None:
        return spec, kept, ()
    split = labelled.with_fold(fold)
    if is_main_rank():
        note_unused(labelled, fold)
        which = "the checkpoint's fold" if config.fold is None else f"fold {config.fold} of {len(folds)}"
        pseudo_labelled = len(split["train"]) - len(fold.train)
        beside = f" beside {pseudo_labelled} pseudo-labelled" if pseudo_labelled else ""
        trained = f"{counted(len(fold.train), 'training case')}{beside}"
        note(f"{which}: {trained}, {counted(len(fold.val), 'evaluation case')}")
    return spec, _kept(split, kept), tuple(folds)


def split_of_fold(data_dir: Path, fold: Fold, exclude: Sequence[str]) -> dict[str, list[str]]:
    """Returns the split of a run on this fold of a preprocessed folder.

    Raises:
        UserError: the folder lacks cases of the fold or of `exclude`.
    """
    whole = read_spec_and_split(data_dir, evaluation_ids())[1]
    labelled = LabelledCases.find(data_dir, whole, only_training=False)
    labelled.check(fold, "the fold", "give the --data_dir that it was made of")
    return _kept(labelled.with_fold(fold), leave_out(whole, exclude))


def _kept(split: Mapping[str, Sequence[str]], kept: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns a split without the cases that another one of the same folder lacks."""
    cases = {case for part in kept.values() for case in part}
    return leave_out(split, [case for part in split.values() for case in part if case not in cases])


def _choose_fold(
    config: RunConfig, labelled: LabelledCases, folds: Sequence[Fold], trained_on: Fold | None
) -> Fold | None:
    """Returns the fold of the flags, or else that of the checkpoint; None if the latter is of another data set."""
    if config.fold is not None:
        if config.fold >= len(folds):
            raise UserError(f"--fold {config.fold}: {config.splits} has only {counted(len(folds), 'fold')}, from 0 on")
        fold = folds[config.fold]
        if trained_on not in (None, fold):
            raise UserError(
                f"--fold {config.fold}: {config.load_ckpt_path[0]} was trained on another fold, so on cases of this "
                "one; without --fold its own is evaluated"
            )
        return fold
    assert trained_on is not None
    if not {*trained_on.train, *trained_on.val} & labelled.patients.keys():
        note(f"{config.load_ckpt_path[0]} was trained on a fold of another data set; that of --data_dir is not divided")
        return None
    source = f"--load_ckpt_path {config.load_ckpt_path[0]}: its fold"
    labelled.check(trained_on, source, "give the --data_dir that it was trained on")
    return trained_on


def evaluation_ids() -> list[str]:
    """Returns the numbers of the KiTS19 cases that MLPerf evaluates on."""
    return EVALUATION_CASES.read_text(encoding="utf-8").split()


def find_checkpoint(config: RunConfig, data_digest: str, world: World) -> Checkpoint | None:
    """Returns the checkpoint to continue from, if any."""
    own = checkpoint_path(config) if config.resume else None
    loaded = resume.find(own, next(iter(config.load_ckpt_path), None), world)
    if loaded is not None:
        note(resume.describe(loaded, resume.changes(loaded, config.to_json(), data_digest)))
    elif config.resume:
        note(f"--resume: {own} does not exist yet, starting from the beginning")
    return loaded


def report_done(run: RunSpec) -> int:
    """Reports a run with nothing left to train: success with `--resume` (launchers restart), a user error otherwise.

    Raises:
        UserError: the checkpoint was named by `--load_ckpt_path`.
    """
    assert run.loaded is not None
    finding = f"{run.loaded.path} {run.done}"
    if not run.config.resume:
        raise UserError(f"--load_ckpt_path {finding}; use larger --epochs or another --quality_threshold")
    logger.info(f"nothing left to do: {finding}")
    return 0
