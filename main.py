"""MLPerf's 3D U-Net training benchmark (KiTS19): trains to a target Dice, evaluates, predicts, reports, exports.

    python3 main.py --data_dir DATA --amp --epochs 4000 --log_dir LOGS --save_ckpt_path LOGS/checkpoint.pth
    torchrun --nproc_per_node 8 main.py @recipes/kits19_8xgpu.args --data_dir DATA --log_dir LOGS
    python3 main.py --exec_mode evaluate --data_dir DATA --load_ckpt_path LOGS/checkpoint.pth
    python3 main.py --exec_mode predict --load_ckpt_path LOGS/checkpoint.pth --scan SCAN.nii.gz --output MASK.nii.gz
    python3 main.py --exec_mode report --log_dir LOGS
    python3 main.py --exec_mode export --load_ckpt_path LOGS/checkpoint.pth --output NET.onnx

The outline of a run is `runtime/run.py`.
"""

from __future__ import annotations

import faulthandler
import sys
from typing import TYPE_CHECKING

from common.errors import one_line, run_program
from common.messages import logger
from runtime.arguments import RunConfig, check_paths, checkpoint_path, parse_arguments

if TYPE_CHECKING:
    from runtime.distributed.world import World


def main(argv: list[str] | None = None) -> int:
    faulthandler.enable()  # prints a traceback if native code crashes or a mapped volume is truncated
    config, given = parse_arguments(argv)
    check_paths(config)
    # Importing torch takes seconds: --help and mistakes on the command line are answered before.
    from model.kernels.dispatch import use_plain
    from runtime.distributed.world import World

    use_plain(config.plain_operators)
    world = World.join(config.local_rank)
    try:
        if config.exec_mode == "train":
            from runtime.output_lock import PATIENCE_S, outputs_locked
            from runtime.run import train_network

            patience_s = PATIENCE_S if config.resume else 0.0
            with outputs_locked(config.log_dir, checkpoint_path(config), world, patience_s=patience_s):
                return train_network(config, world, write_report)
        if config.exec_mode == "evaluate":
            from runtime.run import evaluate_checkpoint

            return evaluate_checkpoint(config, given, world)
        if config.exec_mode == "predict":
            from prediction.predict import main as predict

            return predict(config, given, world)
        if config.exec_mode == "export":
            from export.write import main as export

            return export(config, given, world)
        from report.write import main as report

        return report(config, given, world)
    finally:
        world.leave()


def write_report(config: RunConfig, world: World) -> None:
    """Writes report.html; a failure is a warning, not the end of the run."""
    try:
        from report.write import write_report as write

        logger.info(f"report {write(config.log_dir, device=world.device, model=config.model)}")
    except Exception as error:
        logger.warning(f"no report.html: {one_line(error)}")


if __name__ == "__main__":
    sys.exit(run_program(main, "main.py"))
