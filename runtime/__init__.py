"""The run: time, ranks, decisions, records.

What lives here: arguments, the ranks (`World`), seeds, optimizer and schedule, the training loop, sliding-window
evaluation, events and those who listen to them (callbacks may stop a run, trackers only watch), checkpoints.
May import: torch, numpy, mlperf-logging, tqdm, `errors`, `data_loading/`, `model/`. Only `distributed.py` touches
`torch.distributed`.
To add a tracker: a class with `on(event)` and its line in `TRACKERS` of `logging/base.py`; a callback: a class with
`on(event, state)` and its line in `main.py`.
"""
