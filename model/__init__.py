"""Networks and losses: tensors in, logits or losses out. No files, ranks or logs.

Inside: the U-Net (`unet3d`, `layers`, `normalization`), networks by name (`registry`, `slicewise`), `losses`,
`metrics`, starting from other weights (`finetune`), and Triton kernels for CUDA (`kernels/`).
May import torch and `common`; never `data_loading` or `runtime`.
To add a network: a class `(channels, classes, ...)` that maps (N, C, D, H, W) to logits (N, K, D, H, W), and a line in
`registry.NETWORKS`. To add a loss: a class in `losses.py` and an entry in `losses.LOSSES`.
"""
