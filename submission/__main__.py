"""An MLPerf submission: its runs, its package, its score. `docs/submission.md` is the guide.

python3 -m submission run --result_dir ORG --clear_caches -- @recipes/kits19_1xgpu.args --data_dir DATA
python3 -m submission pack --result_dir ORG
python3 -m submission score --result_dir ORG
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from common.cli import Parser, number
from common.errors import Interrupted, UserError, run_program
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS, RUNS

# Needs root and clears this machine only; `--clear_caches COMMAND` covers runs on several machines.
CLEAR_COMMAND = "sync && echo 3 >/proc/sys/vm/drop_caches"


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser().parse_args(arguments[:end])
    options.arguments = arguments[end + 1 :]
    module = importlib.import_module(f"submission.{options.module}")  # imports torch, which takes seconds
    try:
        return int(module.run(options))
    except Interrupted as stop:
        print(
            f"submission: {stop}; the same command continues the series and repeats this run from the beginning",
            file=sys.stderr,
        )
        return stop.exit_status
    except OSError as error:  # an unreadable log, a folder without write permission, a full disk
        raise UserError(f"{error.filename or options.result_dir}: {error.strerror or error}") from None


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all three commands."""
    parser = Parser(
        prog="submission", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser(
        "run", allow_abbrev=False, help="make the runs of a result; main.py's flags follow --"
    )
    pack_parser = commands.add_parser("pack", allow_abbrev=False, help="write the submission tree and check it")
    score_parser = commands.add_parser(
        "score", allow_abbrev=False, help="compute the score and compare it with published ones"
    )
    for command, module in ((run_parser, "series"), (pack_parser, "package"), (score_parser, "score")):
        command.set_defaults(module=module)
        command.add_argument(
            "--result_dir",
            type=Path,
            required=True,
            metavar="ORG",
            help="the submitter's folder: results/, systems/, …",
        )
        command.add_argument(
            "--system", metavar="NAME", help="system name (default: from the devices, or the only one in ORG/results)"
        )
    for command in (pack_parser, score_parser):
        command.add_argument("--ruleset", choices=RULESETS, default=DEFAULT_RULESET, help="ruleset of the runs")
    run_parser.add_argument(
        "--runs",
        type=number(int, 1, RUNS),
        default=RUNS,
        metavar="N",
        help=f"total number of runs; a result has {RUNS}",
    )
    run_parser.add_argument(
        "--nproc_per_node", type=number(int, 1), default=1, metavar="N", help="processes on this machine, by torchrun"
    )
    run_parser.add_argument(
        "--launch", metavar="PREFIX", help="command before main.py: 'srun … python3 -m launch.torchrun …'"
    )
    run_parser.add_argument(
        "--clear_caches",
        nargs="?",
        const=CLEAR_COMMAND,
        metavar="COMMAND",
        help="clear the page cache before each run, with COMMAND if given (needed for several machines)",
    )
    pack_parser.add_argument("--implementation", default="pytorch", metavar="NAME", help="name of the implementation")
    pack_parser.add_argument(
        "--nodes", metavar="N", help="number of machines per run (default: 1; left open after --launch)"
    )
    pack_parser.add_argument(
        "--system_description", type=Path, metavar="PATH", help="JSON with system properties that cannot be detected"
    )
    plot = score_parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="PNG to write (default: ORG.runs/SYSTEM/convergence.png)"
    )
    score_parser.add_old_spelling("--picture", plot)
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "submission"))
