"""A submission to MLPerf from its runs to its score: `python3 -m submission {run,pack,score}`.

What lives here: `series` makes the runs; `logs` reads one log and `inspection` all of them together; `score` is the
rules' arithmetic, `picture` draws it; `package` writes the tree and `checkers` asks MLPerf's own programs about it.
It imports from the core and from no other extra but the report's charts. A command is a module with `run(options)`
and its lines in `__main__.py`.
"""
