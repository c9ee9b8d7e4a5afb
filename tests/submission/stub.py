"""Replaces `python3` in `--launch`: instead of training it writes the log of a synthetic run, with its own seed.

    python3 stub.py ORDERS main.py ARGUMENTS

ORDERS is a JSON file: the template log (null: that of the series' first run) and a list of orders for the next runs,
{"seed": 5}, {"exit": 137}, {"real": true}, …; each run removes the first. Without an order a run converges; with
"real" main.py runs. The stub copies the template's lines because importing the tracker would take seconds.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from pathlib import Path


def main() -> int:
    orders_path, program, *arguments = sys.argv[1:]
    assert program == "main.py"
    log_dir = Path(arguments[arguments.index("--log_dir") + 1])
    assert arguments[arguments.index("--seed") + 1] == "-1"
    orders = json.loads(Path(orders_path).read_text())
    order = orders["runs"].pop(0) if orders["runs"] else {}
    Path(orders_path).write_text(json.dumps(orders))
    if order.get("real"):
        os.execv(sys.executable, [sys.executable, program, *arguments])
    text = Path(orders["template"] or log_dir.with_name("run_0") / "unet3d.log").read_text(encoding="utf-8")
    seed = order.get("seed", secrets.randbelow(2**31))
    text = re.sub('"key": "seed", "value": [0-9]+', f'"key": "seed", "value": {seed}', text)
    cleared = str(os.environ["CACHES_WERE_CLEARED"] == "1").lower()
    text = text.replace('"key": "cache_clear", "value": true', f'"key": "cache_clear", "value": {cleared}')
    lines = text.splitlines(keepends=True)
    if "exit" in order:
        lines = lines[: order.get("lines", len(lines) // 2)]
        print("something has happened")
    if lines:
        (log_dir / "unet3d.log").write_text("".join(lines), encoding="utf-8")
    environment = {
        "cpu": "an abacus",
        "torch": "2.13",
        "device": "cpu",
        "ranks": 1,
        "system": "Linux",
        "python": "3.11",
    }
    run = {"environment": environment, "data_digest": order.get("data_digest", "")}
    (log_dir / "run.json").write_text(json.dumps(run))
    if "stays" in order:
        os.kill(os.getppid(), order["stays"])
        import signal

        signal.pause()  # until the series passes the signal on
    return int(order.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
