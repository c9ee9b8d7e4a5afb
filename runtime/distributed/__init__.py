"""The ranks of a run. The only package that uses `torch.distributed`.

`world.py` joins the ranks and communicates, `step_sync.py` agrees on saving, stopping and faults once per optimizer
step, `roles.py` lets some ranks only evaluate, `signals.py` makes SIGTERM and SIGINT a graceful stop, `watchdog.py`
ends all ranks when one is lost or hangs.
May import: `common`, `runtime/logging/events.py`.
"""
