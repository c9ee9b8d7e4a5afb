"""Trackers for the terminal: lines on stdout, progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from runtime.logging import events as ev


class EvaluationTracker:
    """`--exec_mode evaluate`: a progress bar on stderr, and each score as a `name value` line on stdout."""

    def __init__(self, verbose: bool) -> None:
        self._bar = CaseBar() if verbose else None

    def on(self, event: ev.Event) -> None:
        if self._bar:
            self._bar.on(event)
        if isinstance(event, ev.EvaluationStopped):
            print(f"epoch {event.epoch}")
            for value, dice in enumerate(event.dice, start=1):
                print(f"L{value} dice {dice:.6f}")
            print(f"mean_dice {event.mean_dice:.6f}\neval_loss {event.loss:.6f}", flush=True)


class CaseBar:
    """A progress bar over the cases of an evaluation."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.EvaluationStarted):
            self._bar = tqdm(total=event.cases, desc="evaluate", unit="case", leave=False, dynamic_ncols=True)
        elif isinstance(event, ev.CaseEvaluated):
            self._bar.update()
        elif isinstance(event, ev.EvaluationStopped | ev.RunStopped) and self._bar is not None:
            self._bar.close()  # a run may end during an evaluation


class ConsoleTracker:
    """Prints each evaluation and the end of the run in a line, and, if `verbose`, progress bars on stderr."""

    def __init__(self, verbose: bool, epochs: int) -> None:
        self._verbose = verbose
        self._epochs = epochs
        self._bar: Any = None
        self._case_bar = CaseBar()
        self._first_epoch = 1
        self._batches = 1
        self._postfix: dict[str, str] = {}

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.PreflightEnd) and event.table:
            self._print(event.table)
        if isinstance(event, ev.InitStopped | ev.DataOpened):
            for note in event.notes:
                self._print(f"note: {note}")
        if isinstance(event, ev.InitStopped):
            because = f" ({'; '.join(event.rule_violations)})" if event.rule_violations else ""
            self._print(f"division {event.division}{because}; seed {event.seeds['master']}; {event.platform}")
        elif isinstance(event, ev.EvaluationStopped):
            scores = ", ".join(f"L{value} {dice:.4f}" for value, dice in enumerate(event.dice, start=1))
            self._print(
                f"epoch {event.epoch}: mean Dice {event.mean_dice:.4f} ({scores}), loss {event.loss:.4f}, "
                f"{event.seconds:.1f} s"
            )
        if self._verbose:
            self._progress(event)
        if isinstance(event, ev.RunStopped):
            self._print(f"{event.status} after {event.epoch} epochs and {event.seconds:.1f} s: {event.reason}")

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _progress(self, event: ev.Event) -> None:
        self._case_bar.on(event)
        if isinstance(event, ev.EpochStarted):
            if self._bar is None:
                self._first_epoch, self._batches = event.epoch, event.batches
                remaining = self._epochs - event.epoch + 1
                self._bar = tqdm(total=remaining * event.batches, desc="train", unit="batch", dynamic_ncols=True)
            self._bar.set_description(f"epoch {event.epoch}/{self._epochs} rate {event.learning_rate:.3g}")
        elif isinstance(event, ev.MicroBatchEnd):
            # Not `update(1)`: a resumed run may begin in the middle of an epoch.
            done = (event.epoch - self._first_epoch) * self._batches + event.batch + 1
            self._bar.update(done - self._bar.n)
        elif isinstance(event, ev.StepEnd):
            self._show("loss", event.loss)  # drawn with the next batch: no terminal output per step
        elif isinstance(event, ev.EpochStopped):
            self._show("loss", event.loss, refresh=True)
        elif isinstance(event, ev.EvaluationStopped):
            self._show("Dice", event.mean_dice, refresh=True)
        elif isinstance(event, ev.RunStopped) and self._bar is not None:
            self._bar.close()

    def _show(self, name: str, value: float, refresh: bool = False) -> None:
        """Shows a value beside the bar, which does not exist in an evaluation before the first epoch."""
        self._postfix[name] = f"{name} {value:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._postfix.values()), refresh=refresh)
