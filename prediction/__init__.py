"""Prediction: masks of new scans, on the scans' own grids, and pseudo-labels for another round of training.

`predict` is the command: it loads checkpoints, finds scans and writes the table of volumes. `ensemble` predicts one
scan within the memory that `memory` plans, `volumes` measures a mask, and `pseudo_labels` is a program of its own. May
import `runtime` and everything below it; only `export` and `main.py` import it. To read another scan format, extend
`data_loading.io.scan_discovery`.
"""
