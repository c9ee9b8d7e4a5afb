"""Synthetic inputs for trying a submission in minutes: a tiny data set with KiTS19's cases, and logs without runs.

The cases have KiTS19's numbers and split, so MLPerf's checkers see 168 and 42 of them. Their volumes are 16^3 voxels
with two bright blocks, which a tiny network learns in four epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.compat import mllog_clock
from data_loading.dataset import case_file
from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.integrity import file_md5, file_stamp
from data_loading.mlperf_md5 import MLPERF_CASES
from data_loading.preprocessing import foreground_boxes
from data_loading.spec import KITS19
from runtime.arguments import parse_arguments
from runtime.logging import events as ev
from runtime.logging.mlperf import MLPerfTracker

SIDE = 16
# Standard deviation, high enough that no score is exactly 1.0, which MLPerf's checker rejects in an open run.
NOISE = 0.9
TRAINING, EVALUATION = 168, 42
# Reached 0.908 in 4 epochs of 168 samples with each of the eight seeds tried; seconds on one core.
TINY_RUN = (
    *("--model", "unet3d(filters=(8,16))", "--input_shape", "16", "16", "16", "--val_input_shape", "16", "16", "16"),
    *("--overlap", "0", "--batch_size", "14", "--learning_rate", "0.2", "--loader", "device", "--num_workers", "0"),
    *("--epochs", "40", "--start_eval_at", "4", "--evaluate_every", "2", "--ckpt_every", "never", "--no_report"),
)


def write_blocks(folder: Path, evaluation_ids: Sequence[str]) -> None:
    """Writes a preprocessed folder of 210 cases: a block of class 1 around one of class 2, in noise."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for number in range(MLPERF_CASES):
        rng = np.random.default_rng(number)
        label = np.zeros((1, SIDE, SIDE, SIDE), np.uint8)
        d, h, w = (int(start) for start in rng.integers(1, 6, 3))
        label[0, d : d + 8, h : h + 8, w : w + 8] = 1
        label[0, d + 2 : d + 6, h + 2 : h + 6, w + 2 : w + 6] = 2
        image = (2.0 * label - 1.0 + rng.normal(0, NOISE, label.shape)).astype(np.float32)
        case = f"case_{number:05d}"
        paths = {kind: case_file(folder, case, kind) for kind in "xy"}
        np.save(paths["x"], image)
        np.save(paths["y"], label)
        digests = {kind: file_md5(path) for kind, path in paths.items()}
        stamps = {kind: file_stamp(path) for kind, path in paths.items()}
        boxes = foreground_boxes(label, len(KITS19.classes))
        records[case] = CaseRecord(
            transform=None,
            boxes=boxes,
            digests=digests,
            source_stamp=[[0, 0], [0, 0]],
            statistics={"mean": 0.0, "std": 1.0},
            stamps=stamps,
        )
    held_out = [f"case_{number}" for number in evaluation_ids]
    split = {"train": [case for case in records if case not in held_out], "evaluation": held_out}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=KITS19, split=split, cases=records).to_json())


class Clock:
    """A clock in milliseconds that advances by one with every log line."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        self.now_ms += 1
        return self.now_ms


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """A run that exists only as a log.

    Attributes:
        epochs: the run ends with an evaluation after this one.
        clock_ms: from run_start to run_stop.
        arguments: for main.py.
        reasons: rule violations; if there are any, the run is an open one.
        first_evaluation, interval: in epochs.
    """

    seed: int
    epochs: int
    clock_ms: int
    arguments: Sequence[str]
    reasons: Sequence[str] = ()
    first_evaluation: int = 1000
    interval: int = 20
    converges: bool = True

    def write_log(self, path: Path) -> Path:
        """Writes the log with `MLPerfTracker`, as a real run does, and returns `path`."""
        clock = Clock()
        # The tracker names the file itself, in the folder it is given.
        folder = path.with_name(f"{path.name}.folder")
        folder.mkdir(parents=True)
        started_ms = 0
        with mllog_clock(clock):
            tracker = MLPerfTracker(folder)
            for event in self._events():
                if isinstance(event, ev.RunStarted):
                    started_ms = clock.now_ms + 1
                if isinstance(event, ev.RunStopped):
                    clock.now_ms = started_ms + self.clock_ms - 1
                tracker.on(event)
            tracker.close_files()
        (folder / "unet3d.log").replace(path)
        folder.rmdir()
        return path

    def _events(self) -> Iterator[ev.Event]:
        """Yields the events that reach the MLPerf log; the mean Dice is 0.5 until the last evaluation."""
        config, _ = parse_arguments(list(self.arguments))
        batch = config.batch_size * config.ga_steps
        seeds = {"master": self.seed, "order": 1, "samples": 2, "ranks": (3,)}
        yield ev.InitStarted(config, {}, caches_were_cleared=True)
        yield ev.InitStopped(
            config=config,
            seeds=seeds,
            division="open" if self.reasons else "closed",
            rule_violations=list(self.reasons),
            platform="1xABACUS",
            tensors=["a", "b"],
            samples_per_epoch=TRAINING,
            notes=[],
        )
        yield ev.RunStarted()
        yield ev.DataOpened(
            train_samples=TRAINING,
            eval_samples=EVALUATION,
            samples_per_epoch=TRAINING,
            global_batch_size=batch,
            gradient_accumulation_steps=config.ga_steps,
            classes=list(KITS19.classes),
        )
        start = 1
        for stop in range(self.first_evaluation, self.epochs + 1, self.interval):
            yield ev.BlockStarted(start, stop - start + 1)
            for epoch in range(start, stop + 1):
                yield ev.EpochStarted(epoch, 0.1, TRAINING // batch)
                yield ev.EpochStopped(epoch=epoch, loss=0.5, learning_rate=0.1, samples=TRAINING, seconds=1.0)
            final = 0.91 if self.converges else 0.6
            score = 0.5 if stop + self.interval <= self.epochs else final
            yield ev.EvaluationStarted(stop, EVALUATION)
            yield ev.EvaluationStopped(epoch=stop, mean_dice=score, dice=[score, score], loss=0.2, seconds=1.0)
            yield ev.BlockStopped(start, stop - start + 1)
            start = stop + 1
        end = {"status": "success", "reason": "mean Dice reached 0.908"}
        if not self.converges:
            end = {"status": "aborted", "reason": "all epochs are over"}
        yield ev.RunStopped(**end, epoch=self.epochs, seconds=1.0)
