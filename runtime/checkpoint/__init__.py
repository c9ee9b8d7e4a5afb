"""Checkpoints: a run's state on disk.

`format` is the content of a file, written with a checksum and read without running code. `writer` decides when a run
saves, copies the state, writes the file in a thread and keeps the earlier ones. `resume` finds the newest intact file,
compares its flags with the run's and restores the state.
To save something new: add it to `snapshot` and `Checkpoint` in `format`, and to `restore` in `resume`.
May import: `common`, `model`, `runtime.arguments` and `flag_fields`, `train_state`, `eval_schedule`, `distributed`.
"""
