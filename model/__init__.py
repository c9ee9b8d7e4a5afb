"""Tensors in, logits or losses out; knows no files, ranks or logs.

What lives here: the benchmark's U-Net, its layers, losses and the Dice score.
May import: torch, `errors`, `plugins`; never `data_loading/`, `runtime/` or a logger.
To add a network: a class (channels, classes, …) -> (N, K, D, H, W) logits, and its line in `networks.NETWORKS`.
"""
