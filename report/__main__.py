"""`python3 -m report LOG_DIR [LOG_DIR …]`: writes the report of a run, or a comparison of several."""

from __future__ import annotations

import sys
from pathlib import Path

from common.cli import Parser
from common.errors import run_program
from common.registry import Spec


def make_parser() -> Parser:
    """Builds the command line."""
    parser = Parser(prog="report", description=__doc__)
    add = parser.add_argument
    add("log_dir", type=Path, nargs="+", metavar="LOG_DIR", help="log folder of a run; several are compared")
    add(
        "--load_ckpt_path",
        type=Path,
        metavar="PATH",
        help="checkpoint that predicts the cases shown (default: the run's own)",
    )
    add("--data_dir", type=Path, metavar="PATH", help="preprocessed data set (default: the one the run used)")
    add("--model", metavar="SPEC", help="network, if the checkpoint's own spec may not be imported")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    import torch  # takes seconds

    from report.write import write_comparison, write_report

    if len(options.log_dir) > 1:
        path = write_comparison(options.log_dir)
    else:
        path = write_report(
            options.log_dir[0],
            device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
            checkpoint=options.load_ckpt_path,
            data_dir=options.data_dir,
            model=Spec(options.model, trusted=True) if options.model else None,
        )
    print(path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "report"))
