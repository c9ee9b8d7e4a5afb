"""`--exec_mode predict`: predicts masks of scans, on the scans' own grids, with one checkpoint or the mean of several.

    python3 main.py --exec_mode predict --load_ckpt_path C [C2 …] --scan IN --output OUT

Each scan is reoriented and preprocessed like the checkpoint's training data and cut into windows as in an evaluation
(padded, never cropped). Its mean probabilities are resampled to the scan's grid before the arg-max.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import Interrupted, RankLost, UserError, failure_of
from common.messages import logger, note
from data_loading.dataset import read_spec_and_split
from data_loading.io.file_kinds import is_file_name, stem
from data_loading.io.scan_discovery import Source, find_sources
from data_loading.spec import KITS19, KITS19_ORIENTATION, DatasetSpec
from prediction.ensemble import Ensemble, Member, predict_scan
from prediction.memory import MemoryBudget
from prediction.volumes import ClassVolume, write_table
from runtime import build
from runtime.arguments import RunConfig, with_checkpoint_network
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.network import load_trained
from runtime.seeding import seed_process
from runtime.test_time_flips import untrained_flips

TABLE_NAME = "volumes.csv"


def main(config: RunConfig, given: frozenset[str], world: World) -> int:
    """Predicts this rank's share of the scans; rank 0 prints and writes the table of volumes.

    Args:
        given: names of the flags that were on the command line.
    """
    assert config.scan is not None
    assert config.output is not None
    seed_process(0, deterministic=config.cudnn_deterministic, autotune=config.cudnn_benchmark)
    ensemble, notes = load_ensemble(config, given, world)
    sources = find_sources(config.scan, config.output, config.series, ensemble.spec.channels)
    names = [stem(source.output) for source in sources]
    if config.save_probabilities and (twice := next((name for name in names if names.count(name) > 1), "")):
        raise UserError(f"--save_probabilities: two scans are called {twice}; their probabilities would be one file")
    is_file = is_file_name(config.output)
    folder = config.output.parent if is_file else config.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {config.output}: cannot be created: {error.strerror}") from None
    if world.is_main:
        for line in notes:
            note(line)
    rows, errors = predict_scans(world.shard(sources), ensemble, config.save_probabilities, is_folder=len(sources) > 1)
    rows = sorted(itertools.chain.from_iterable(world.gather(rows)))
    errors = list(itertools.chain.from_iterable(world.gather(errors)))
    if world.is_main and rows:
        write_table(folder / (f"{stem(config.output)}_{TABLE_NAME}" if is_file else TABLE_NAME), rows)
        print("".join(f"{row}\n" for row in rows), end="", flush=True)
    if len(errors) == 1 == len(sources):
        raise UserError(errors[0])
    if errors:
        raise UserError(f"{len(errors)} of {len(sources)} scans could not be predicted, for the reasons above")
    return 0


def predict_scans(
    sources: Sequence[Source], ensemble: Ensemble, save_probabilities: bool, *, is_folder: bool
) -> tuple[list[ClassVolume], list[str]]:
    """Predicts scans one after another, whatever happens to one of them.

    Args:
        is_folder: reports each error at once; that of a single scan ends the program.

    Returns:
        The volumes of all that were predicted, and the errors of the others.
    """
    rows: list[ClassVolume] = []
    errors: list[str] = []
    for source in sources:
        try:
            rows += predict_scan(source, ensemble, save_probabilities)
        except (RankLost, Interrupted):
            raise
        except Exception as error:
            errors.append(failure_of(source.name, error))
            if is_folder:
                logger.error(errors[-1])
    return rows, errors


def load_ensemble(config: RunConfig, given: frozenset[str], world: World) -> tuple[Ensemble, list[str]]:
    """Loads the checkpoints' networks; returns them with notes for the user.

    Raises:
        UserError: a checkpoint is missing, damaged or lacks its data set's constants, or the data sets differ.
    """
    members: list[Member] = []
    specs: list[DatasetSpec] = []
    notes: list[str] = []
    for path in config.load_ckpt_path:
        checkpoint = checkpoints.load(path)
        spec, spec_note = spec_of(checkpoint, config.data_dir if "data_dir" in given else None)
        evaluated = with_checkpoint_network(config, given, checkpoint.config)
        members.append(load_member(checkpoint, spec, evaluated, world.device))
        specs.append(spec)
        notes += filter(None, (spec_note, untrained_flips(evaluated.test_time_flips, checkpoint.augment, str(path))))
        if spec != specs[0]:
            raise UserError(
                f"--load_ckpt_path {path}: its data set ({spec.name}) or preprocessing is not that of the first "
                f"({specs[0].name}); only predictions for the same data can be averaged"
            )
    budget = MemoryBudget(config.max_memory_gb, world.device)
    ensemble = Ensemble(members=tuple(members), spec=specs[0], budget=budget)
    return ensemble, list(dict.fromkeys(notes))


def load_member(checkpoint: Checkpoint, spec: DatasetSpec, config: RunConfig, device: torch.device) -> Member:
    """Returns a checkpoint's network on a device. Raises UserError if the flags describe another network."""
    network = load_trained(checkpoint, config, spec, device)
    windows = replace(build.make_sliding_window_config(config, spec), crops_remainder=False)
    return Member(network=network, windows=windows, amp=config.amp, amp_dtype=config.amp_dtype, layout=config.layout)


def spec_of(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[DatasetSpec, str]:
    """Returns the constants of the data set that a checkpoint was trained on, and a note for the user or "".

    Args:
        data_dir: the preprocessed folder, for a checkpoint that does not hold them.

    Raises:
        UserError: nothing defines how a scan must be preprocessed.
    """
    if checkpoint.spec is not None:
        try:
            return DatasetSpec.from_json(checkpoint.spec), ""
        except (UserError, TypeError, AttributeError):
            raise UserError(f"--load_ckpt_path {checkpoint.path}: its data set's spec is of another version") from None
    if data_dir is not None:
        return read_spec_and_split(data_dir, [])[0], ""
    if checkpoint.config:
        raise UserError(
            f"--load_ckpt_path {checkpoint.path} does not hold its data set's constants, as an earlier version wrote "
            "it; give --data_dir, the preprocessed folder that it was trained on"
        )
    assumption = f"{checkpoint.path} was written by another program: assuming that it was trained on KiTS19"
    return replace(KITS19, orientation=KITS19_ORIENTATION), f"{assumption}; if not, give --data_dir"
