"""What is measured, how, and the measured tables (hardware, versions, commit).

Suites may import every room; no room imports a suite. To add one: a file with `run(options) -> list[Table]`, and its
name in `__main__.SUITES`. Each suite carries the naive way, written plainly, as its baseline, and compares in one run,
in turn, by the median of the pairs' ratios. `tables/` holds the results, one file a machine.
"""
