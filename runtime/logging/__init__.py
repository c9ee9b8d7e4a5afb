"""Records of a run: events, and the trackers that turn them into logs, console lines and experiment records.

`events.py` defines what happens in a run, in the order of MLPerf's log. Trackers receive every event on rank 0 and
cannot change the run: `mlperf.py` (unet3d.log), `jsonl.py` (log.jsonl, run.json), `console.py`, `throughput.py`
(`--benchmark`), and those for TensorBoard, Weights & Biases and MLflow.
May import: `common`, `runtime/arguments.py`, `runtime/mlperf/rulesets.py`; an optional package only in its own module.
To add a tracker: a class with `on(event)` (or a subclass of `Recorder`) and a line in `TRACKERS` of `base.py`.
"""
