"""A synthetic run's log folder, and a parser for the pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from report.write import write_report
from runtime.arguments import parse_arguments
from runtime.logging import events as ev
from runtime.logging.jsonl import JsonLinesTracker
from runtime.logging.log_folder import rotate_logs

HOSTILE = "<script>alert(1)</script>"
REACHED = ("success", "mean Dice 0.9000 reached 0.9")
MISSED = ("aborted", "the target was not reached in 4 epochs")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """What a run logs.

    Attributes:
        scores: mean Dice by epoch; epochs without one are not evaluated.
        stop: status and reason; None: the log has no end.
        loss: of the first epoch; it falls as 1 / epoch.
        flags: more of the command line.
        batch: samples per step over all ranks; an epoch has 4 steps.
        begun_at: steps of the first epoch that an earlier process has trained.
    """

    epochs: Sequence[int] = (1, 2, 3, 4)
    scores: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, str] | None = MISSED
    seed: int = 7
    violations: Sequence[str] = ()
    classes: Sequence[str] = ("background", "kidney", "tumour")
    cases: Sequence[str] = ("a", "b", "c")
    loss: float = 1.0
    flags: Sequence[str] = ()
    doubtful: Mapping[str, str] = field(default_factory=dict)
    batch: int = 2
    begun_at: int = 0

    def events(self, folder: Path) -> Iterator[ev.Event]:
        arguments = ["--data_dir", str(folder / "DATA"), "--log_dir", str(folder), "--quality_threshold", "0.9"]
        config = parse_arguments([*arguments, *self.flags])[0]
        yield ev.InitStarted(config, {"torch": "2", "command": ["main.py"]}, False)
        yield ev.InitStopped(
            config=config,
            seeds={"master": self.seed, "order": 1, "samples": 2, "ranks": [3]},
            division="open" if self.violations else "closed",
            rule_violations=list(self.violations),
            platform="1xCPU",
            tensors=[],
            samples_per_epoch=4 * self.batch,
            notes=["a note"],
            doubtful_cases=self.doubtful,
        )
        yield ev.RunStarted()
        yield ev.DataOpened(
            train_samples=8,
            eval_samples=len(self.cases),
            samples_per_epoch=4 * self.batch,
            global_batch_size=self.batch,
            gradient_accumulation_steps=1,
            classes=list(self.classes),
        )
        for epoch in self.epochs:
            yield ev.EpochStarted(epoch=epoch, learning_rate=0.1, batches=4)
            samples = (4 - self.begun_at * (epoch == self.epochs[0])) * self.batch
            yield ev.EpochStopped(epoch=epoch, loss=self.loss / epoch, learning_rate=0.1, samples=samples, seconds=4.0)
            if epoch in self.scores:
                mean = self.scores[epoch]
                yield ev.EvaluationStopped(
                    epoch=epoch,
                    mean_dice=mean,
                    dice=[mean - 0.01, mean + 0.01],
                    loss=0.5,
                    seconds=2.0,
                    per_case={case: [mean - 0.1 * n, mean + 0.1 * n] for n, case in enumerate(self.cases)},
                )
        if self.stop:
            status, reason = self.stop
            yield ev.RunStopped(status=status, reason=reason, epoch=max(self.epochs, default=0), seconds=60.0)


def log_run(folder: Path, **run: Any) -> Path:
    """Writes the log of a `SyntheticRun` with the program's own tracker, then spaces its events 10 s apart."""
    rotate_logs(folder)
    tracker = JsonLinesTracker(folder)
    for event in SyntheticRun(**run).events(folder):
        tracker.on(event)
    tracker.close_files()
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["time_s"] = 1000.0 + 10 * number
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Tags(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> str:
    return write_report(folder, device=CPU).read_text(encoding="utf-8")
