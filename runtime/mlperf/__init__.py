"""MLPerf's rules: the closed division, the rulesets and the reference convergence points.

`closed_division.py` checks a run against the rules, `rulesets.py` lists the rulesets and their units, `convergence.py`
gives the number of samples that a result is expected to need. Uses the configuration and the evaluation schedule of
`runtime`, and `data_loading.integrity`.

To support a new ruleset, add it to `RULESETS` once mlperf-logging has reference convergence points for it.
"""
