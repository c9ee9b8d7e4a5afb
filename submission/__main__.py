"""A submission to MLPerf: its runs, its package, its score. `docs/submission.md` walks through it.

python3 -m submission run --result_dir ORG --clear_caches -- @recipes/kits19_1xgpu.args --data_dir DATA
python3 -m submission pack --result_dir ORG
python3 -m submission score --result_dir ORG
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.cli import Parser, number
from common.errors import Interrupted, run_program
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS
from submission.inspection import RUNS

# Needs root; on many machines `--clear_caches` takes a command that clears all of theirs.
CLEAR_COMMAND = "sync && echo 3 >/proc/sys/vm/drop_caches"


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser().parse_args(arguments[:end])
    options.arguments = arguments[end + 1 :]
    if options.command == "run":
        from submission import series

        try:
            return series.run(options)
        except Interrupted as leaving:
            print(
                f"submission: {leaving}; start it again: it goes on with the run that was broken off, from its "
                "beginning",
                file=sys.stderr,
            )
            return leaving.exit_status
    if options.command == "pack":
        from submission import package

        return package.run(options)
    from submission import score

    return score.run(options)


def make_parser() -> argparse.ArgumentParser:
    """The command line of all three commands."""
    parser = Parser(
        prog="submission", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", allow_abbrev=False, help="make a result's runs; main.py's arguments follow --")
    pack = commands.add_parser("pack", allow_abbrev=False, help="write the tree that MLPerf takes, and check it")
    score = commands.add_parser("score", allow_abbrev=False, help="the rules' arithmetic, and how it stands")
    for command in (run, pack, score):
        command.add_argument(
            "--result_dir", type=Path, required=True, help="the submitter's folder: results/, systems/, …"
        )
        command.add_argument("--system", help="name of the system in it (default: of its devices, or the only one)")
    for command in (pack, score):
        command.add_argument("--ruleset", choices=RULESETS, default=DEFAULT_RULESET, help="that the runs were made for")
    run.add_argument("--runs", type=number(int, 1, RUNS), default=RUNS, help=f"so many in all (a result has {RUNS})")
    run.add_argument("--nproc_per_node", type=number(int, 1), default=1, help="processes, by torchrun, on this machine")
    run.add_argument(
        "--launch", metavar="PREFIX", help="what stands before main.py: 'srun … python3 -m launch.torchrun …'"
    )
    run.add_argument(
        "--clear_caches",
        nargs="?",
        const=CLEAR_COMMAND,
        metavar="COMMAND",
        help="clear the page cache before each run (on many machines: by a command of yours)",
    )
    pack.add_argument("--implementation", default="pytorch", help="the implementation's name")
    pack.add_argument("--nodes", help="machines that a run used (default: 1, or a gap after --launch)")
    pack.add_argument("--system_description", type=Path, help="JSON with what only a person knows of the system")
    score.add_argument("--picture", type=Path, help="where the PNG goes (default: ORG.runs/SYSTEM/convergence.png)")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "submission"))
