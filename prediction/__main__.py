"""`python3 -m prediction --load_ckpt_path C [C2 …] --scan IN --output OUT`: the same as `--exec_mode predict`."""

from __future__ import annotations

import sys

from common.errors import run_program
from runtime.arguments import check_paths, parse_arguments


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    config, given = parse_arguments(["--exec_mode", "predict", *arguments])
    check_paths(config)
    from prediction import predict  # imports torch, which takes seconds
    from runtime.distributed.world import World

    world = World.join(config.local_rank)
    try:
        return predict.main(config, given, world)
    finally:
        world.leave()


if __name__ == "__main__":
    sys.exit(run_program(main, "prediction"))
