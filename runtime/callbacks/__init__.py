"""Callbacks: hooks into the training loop that may stop a run or save data of it.

`base.py` has the base class, `RunContext` and the table of `--callbacks`; `monitor.py` the metrics that they and
learning-rate schedules can follow, and each other module one callback.
May import: `common`, `runtime.checkpoint`, `runtime.distributed`, `runtime.logging.events`, `runtime.train_state`.
To add a callback: a class that derives from `Callback`, and its line in `CALLBACKS`.
"""
