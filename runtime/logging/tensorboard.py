"""`--trackers tensorboard`: LOG_DIR/tensorboard, for `tensorboard --logdir LOG_DIR`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from common.messages import counted
from runtime.logging import events as ev
from runtime.logging.base import Recorder
from runtime.train_state import outcome

# A run that is killed loses only the values of its last seconds.
FLUSH_S = 10
RGBA = 4


class TensorBoard(Recorder):
    """Curves, the configuration as text, the report's charts, and the names of the files; keeps no files itself.

    Args:
        every: record one step in `every`.
    """

    def __init__(self, log_dir: Path, every: int = 1) -> None:
        super().__init__(every)
        self._writer = SummaryWriter(str(log_dir / "tensorboard"), flush_secs=FLUSH_S)
        self._epoch = 0

    def begin(self, facts: dict[str, dict[str, Any]]) -> None:
        for name, values in facts.items():
            rows = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in values.items()]
            self._writer.add_text(name, "\n".join(["| | |", "| --- | --- |", *rows]))

    def log_values(self, axis: str, index: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, index)

    def end(self, event: ev.RunStopped) -> None:
        self._epoch = event.epoch
        how = f"{outcome(event.status, event.reason)} after {counted(event.epoch, 'epoch')}"
        self._writer.add_text("end", f"{how}: {event.reason}", event.epoch)
        self._writer.flush()

    def close(self, files: list[Path]) -> None:
        self._writer.add_text("files", "\n".join(f"- {file}" for file in files), self._epoch)
        for file in files:
            if file.suffix == ".png":
                # The PNG bytes unchanged: `add_image` needs a decoded image, hence one more package.
                picture = file.read_bytes()
                width, height = struct.unpack(">II", picture[16:24])
                image = Summary.Image(width=width, height=height, colorspace=RGBA, encoded_image_string=picture)
                value = Summary.Value(tag=f"pictures/{file.stem}", image=image)
                writer: Any = self._writer.file_writer  # torch annotates None, which it is only once closed
                writer.add_summary(Summary(value=[value]), self._epoch)
        self._writer.close()
