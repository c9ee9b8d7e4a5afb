"""Optional additions to the run: trackers of other people's tools, prediction's and the report's own parts.

What lives here: what a table or a program names by a string ("runtime.extras.tensorboard:TensorBoard") and imports when
it is asked for; the core never imports it. What needs a package has it in a group of its own name in `pyproject.toml`.
May import: all that `runtime/` may, and the packages of its group.
To add a tracker: a class with `on(event)`, best a `Recorder`, its line in `TRACKERS` of `runtime/trackers.py`, a group.
"""
