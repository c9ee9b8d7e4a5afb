"""An MLPerf submission, from its runs to its score: `python3 -m submission {run,pack,score}`.

`series` makes the runs (`launching` starts each, `record` keeps track of them). `logs` reads one log, `inspection`
checks all logs of a result together. `score` computes the result by the rules and `plot` draws it. `package` writes the
submission tree with `system` and `scripts`, and `checkers` runs MLPerf's own checkers on it. The package imports from
`common`, `data_loading`, `runtime` and the charts of `report`. To add a command, write a module with `run(options)`
and add its flags to `__main__.py`.
"""
