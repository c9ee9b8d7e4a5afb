"""`main.py` with one rank whose main thread hangs in a training step, as with a dead driver or a deadlock.

HANG_RANK=1 HANG_AT=100 python3 -m tests.faults.hang ARGUMENTS
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import main
from common.errors import run_program
from runtime import training

_step = training.forward_backward
_steps = 0


def _hang(*args: Any, **kwargs: Any) -> Any:
    global _steps
    _steps += 1
    if _steps == int(os.environ["HANG_AT"]) and os.environ.get("RANK", "0") == os.environ["HANG_RANK"]:
        print("hangs now", flush=True)
        while True:
            time.sleep(3600)
    return _step(*args, **kwargs)


if __name__ == "__main__":
    training.forward_backward = _hang
    sys.exit(run_program(main.main, "main.py"))
