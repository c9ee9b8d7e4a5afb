"""Trackers for the terminal: lines on stdout, progress on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm

from common.messages import counted
from common.progress import Progress, make_progress
from runtime.logging import events as ev
from runtime.train_state import outcome


class EvaluationTracker:
    """`--exec_mode evaluate`: progress on stderr, and each score as a `name value` line on stdout."""

    def __init__(self, verbose: bool) -> None:
        self._progress = CaseProgress(verbose)

    def on(self, event: ev.Event) -> None:
        self._progress.on(event)
        if isinstance(event, ev.EvaluationStopped):
            print(f"epoch {event.epoch}")
            for value, dice in enumerate(event.dice, start=1):
                print(f"L{value} dice {dice:.6f}")
            print(f"mean_dice {event.mean_dice:.6f}\neval_loss {event.loss:.6f}", flush=True)


class CaseProgress:
    """Progress over the cases of an evaluation."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._progress: Progress | None = None

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.EvaluationStarted) and not event.is_concurrent:
            self._progress = make_progress(event.cases, "evaluate", "case", bar=self._verbose, leave=False)
        elif self._progress is None:
            return
        elif isinstance(event, ev.CaseEvaluated):
            self._progress.update()
        elif isinstance(event, ev.EvaluationStopped | ev.RunStopped):
            self._progress.close()  # a run may end during an evaluation


class ConsoleTracker:
    """Prints each evaluation and the end of the run in a line; progress on stderr, as bars if `verbose`.

    Args:
        best: epoch and mean Dice of the best evaluation before a resume; None: there is none.
    """

    def __init__(self, verbose: bool, epochs: int, best: tuple[int, float] | None = None) -> None:
        self._verbose = verbose
        self._epochs = epochs
        self._bar: Progress | None = None
        self._cases = CaseProgress(verbose)
        self._best = best
        self._benchmark, self._target = False, 1.0
        self._eval_samples: int | None = None
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
            self._benchmark, self._target = event.config.benchmark, event.config.quality_threshold
        elif isinstance(event, ev.DataOpened):
            self._eval_samples = event.eval_samples
        elif isinstance(event, ev.EvaluationStopped):
            if self._best is None or event.mean_dice > self._best[1]:
                self._best = event.epoch, event.mean_dice
            scores = ", ".join(f"L{value} {dice:.4f}" for value, dice in enumerate(event.dice, start=1))
            self._print(
                f"epoch {event.epoch}: mean Dice {event.mean_dice:.4f} ({scores}), loss {event.loss:.4f}, "
                f"{event.seconds:.1f} s"
            )
        self._show_progress(event)
        if isinstance(event, ev.RunStopped):
            self._print(self._describe_end(event))

    def _describe_end(self, event: ev.RunStopped) -> str:
        """States in plain words how the run ended, and what to try if it did not reach its target."""
        took = f"after {counted(event.epoch, 'epoch')} and {event.seconds:.1f} s"
        how = outcome(event.status, event.reason)
        if how != "target not reached":
            return f"{how} {took}: {event.reason}"
        if self._benchmark:
            return f"benchmark done {took}"
        if self._eval_samples == 0:
            return f"training done {took}: there are no evaluation cases"
        if self._best is None:
            return f"training done {took}: no evaluation was due; see --start_eval_at and --evaluate_every"
        return (
            f"{how} {took}: best mean Dice {self._best[1]:.4f} in epoch {self._best[0]}, target "
            f"{self._target}; more --epochs with --resume continue the run, or try another --learning_rate"
        )

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _show_progress(self, event: ev.Event) -> None:
        self._cases.on(event)
        if isinstance(event, ev.EpochStarted):
            if self._bar is None:
                self._first_epoch, self._batches = event.epoch, event.batches
                remaining = self._epochs - event.epoch + 1
                self._bar = make_progress(remaining * event.batches, "train", "batch", bar=self._verbose)
            self._bar.set_description(f"epoch {event.epoch}/{self._epochs} rate {event.learning_rate:.3g}")
        elif isinstance(event, ev.MicroBatchEnd) and self._bar is not None:
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
