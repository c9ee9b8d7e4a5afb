"""Benchmark suites and their measured tables (hardware, versions, commit).

Suites may import every package; no package imports a suite. To add one: a file with `run(options) -> list[Table]`, and
its name in `__main__.SUITES`. A suite that claims a gain contains the naive implementation, or the peer, and alternates
with it in one run; its figure is the median of the pairs' ratios. The suite `gpu` (`gpu*.py`) also checks that a GPU
computes right, and yields its tables one by one. `tables/` holds the results, one file per machine.
"""
