"""The run: training, evaluation, and everything they record.

`run.py` is the outline of a run; `run_spec.py` collects facts known before it, `build.py` builds its parts from them,
and `arguments.py` is the command line. `training.py` is the training loop, `evaluation.py` scores whole cases. The
packages: `distributed/` (ranks), `checkpoint/`, `callbacks/`, `logging/` (events and trackers), `mlperf/` (rules).
May import: `common`, `data_loading`, `model`. Only `distributed/` uses `torch.distributed`.
"""
