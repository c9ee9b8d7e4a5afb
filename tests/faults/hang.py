"""`main.py` with a rank whose main thread hangs, as with a dead driver or a deadlock, or with an impatient watchdog.

HANG_RANK=1 HANG_AT=100 python3 -m tests.faults.hang ARGUMENTS  # rank 1 hangs in its hundredth training step
SILENCE_S=2 python3 -m tests.faults.hang ARGUMENTS              # a rank counts as lost after two seconds
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from typing import Any

import main
from common.errors import run_program
from runtime import build, training
from runtime.distributed.watchdog import Timeouts

_step = training.forward_backward
_steps = 0


def _hang(*args: Any, **kwargs: Any) -> Any:
    global _steps
    _steps += 1
    if _steps == int(os.environ.get("HANG_AT", "-1")) and os.environ.get("RANK", "0") == os.environ["HANG_RANK"]:
        print("hangs now", flush=True)
        while True:
            time.sleep(3600)
    return _step(*args, **kwargs)


if __name__ == "__main__":
    training.forward_backward = _hang
    if "SILENCE_S" in os.environ:
        impatient = partial(Timeouts, heartbeat_s=0.5, silence_s=float(os.environ["SILENCE_S"]))
        setattr(build, "Timeouts", impatient)  # noqa: B010 - mypy refuses another value for a class
    sys.exit(run_program(main.main, "main.py"))
