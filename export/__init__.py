"""Export: a trained network in formats that other programs read, with all that a mask needs beside the weights.

`write` is the command; `network` loads the checkpoint, `settings` describes preprocessing and windows, `onnx_file`,
`safetensors_file` and `monai_bundle` each write one format. `predict_onnx` is copied beside what they write and runs
without this project. May import `prediction` and everything below it; only `main.py` imports it.
"""
