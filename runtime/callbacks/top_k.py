"""`--callbacks 'top_k(k=3)'`: keeps the checkpoints of the k best evaluations and of the last one."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import replace

from common.errors import UserError
from common.messages import logger
from runtime.callbacks.base import Callback, RunContext
from runtime.callbacks.monitor import METRICS, kept_state, mode_of
from runtime.checkpoint.writer import save
from runtime.logging.events import EvaluationStopped
from runtime.train_state import TrainState, on_host

FOLDER = "top"
# Of a file that it writes: the epoch and the score.
NAME = re.compile(r"epoch_\d+_-?\d+\.\d+\.pth")


class TopK(Callback):
    """Writes LOG_DIR/top/epoch_00012_0.8754.pth for each of the k best evaluations, LOG_DIR/top/last.pth for the last.

    Each file is a whole checkpoint, to evaluate, predict or start from, whose best state is that evaluation's. A score
    that is not finite is never kept, and only files that this run has written are deleted.

    Args:
        k: number of checkpoints, at least 1.
        metric: "mean_dice" or "loss".
        mode: "max" or "min"; None: the metric's natural direction.
    """

    NAME = "top_k"

    def __init__(self, run: RunContext, k: int = 3, metric: str = "mean_dice", mode: str | None = None) -> None:
        if not isinstance(k, int) or k < 1:
            raise UserError(f"--callbacks top_k: k={k!r}; must be a whole number of at least 1")
        self._k, self._metric, self._mode = k, metric, mode_of("--callbacks top_k", metric, mode)
        self._run = run
        self._folder = run.log_dir / FOLDER

    def on_evaluation_end(self, result: EvaluationStopped, state: TrainState) -> None:
        if not self._run.world.is_main:
            return
        value = METRICS[self._metric](result)
        memory = kept_state(state.callback_state, self.NAME, metric=self._metric, mode=self._mode, initial={"kept": []})
        kept: list[list[float | str]] = memory["kept"]
        name = f"epoch_{result.epoch:05d}_{value:.4f}.pth"
        # Names of any other kind come from a foreign checkpoint; a resumed run repeats what came after its own.
        ours = [entry for entry in kept if NAME.fullmatch(str(entry[1])) and entry[1] != name]
        ranked = [entry for entry in ours if (self._folder / str(entry[1])).exists()]
        if math.isfinite(value):
            ranked.append([value, name])
        # Of equal scores the earlier one wins: sorting keeps their order.
        ranked.sort(key=lambda entry: float(entry[0]), reverse=self._mode == "max")
        kept[:] = ranked[: self._k]
        weights = on_host(state.scored_weights)
        own = replace(state, best_epoch=result.epoch, best_dice=result.mean_dice, best_network=weights)
        content = self._run.snapshot(own, [0.0] * self._run.world.size)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if [value, name] in kept:
                save(self._folder / name, content)
            save(self._folder / "last.pth", content)
        except OSError as error:
            reason = error.strerror or error
            logger.warning(f"--callbacks top_k: {self._folder} cannot be written ({reason}), training goes on")
        for _, evicted in ranked[self._k :]:
            with suppress(OSError):
                (self._folder / str(evicted)).unlink(missing_ok=True)
