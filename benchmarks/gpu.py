"""Everything that one GPU can prove and measure within minutes: first that it computes right, then how fast.

The parts run in order of value. Each table is printed and written as its part ends; a part for which time, memory or
the device lacks is skipped with the reason, and a part that fails does not end the others.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import gpu_checks, gpu_convolutions, gpu_operators, gpu_runs, gpu_speed
from benchmarks.harness import NOT_MEASURED, Options, Table
from common.errors import one_line

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: the title of its table.
        run: measures; returns the table.
        needs_s: skipped if less time than this is left.
        needs_gib: skipped if less of the GPU's memory than this is free.
        needs_cuda: skipped on a CPU, with this reason; "": it runs there as well.
    """

    name: str
    run: Callable[[Options], Table]
    needs_s: float
    needs_gib: float = 0.0
    needs_cuda: str = ""


PARTS = (
    Part("Triton operators", gpu_operators.triton_operators, 20, 2, "Triton's kernels are for CUDA"),
    Part("Six steps against the CPU", gpu_checks.trace, 5, 1),
    Part("Device loader", gpu_checks.device_loader, 5, 1),
    Part("Host syncs in a step", gpu_checks.host_syncs, 10, 4, "a CPU has nothing to wait for"),
    Part("Large tensors", gpu_operators.large_tensors, 10, 60, "Triton's kernels are for CUDA"),
    Part("Killed and resumed", gpu_runs.resumed, 40, 4),
    Part("Samples per second", gpu_speed.samples, 30, 10),
    Part("A step by kernel", gpu_speed.profile, 10, 30),
    Part("Windows per second", gpu_speed.windows, 25, 10),
    Part("Choices", gpu_speed.choices, 30, 30),
    Part("CUDA graphs", gpu_speed.cuda_graphs, 20, 20, "CUDA graphs are for CUDA"),
    Part("Convolutions", gpu_convolutions.convolutions, 50, 8),
    Part("To a target", gpu_runs.to_target, 60, 60),
    Part("torch.compile", gpu_speed.compiled, 90, 30, "compiling takes a CPU minutes"),
)


def run(options: Options) -> Iterator[Table]:
    """Yields the table of each part as it ends."""
    lost = ""
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        reason = lost or unavailable(part, options.device, options.seconds_left())
        if reason:
            yield Table(part.name, ["result"], [[f"{NOT_MEASURED}: {reason}"]])
            continue
        began = time.perf_counter()
        try:
            table = part.run(options)
        except Exception as error:  # whatever one part meets, the others' figures count
            failure = f"failed: {type(error).__name__}: {one_line(error)}"
            table = Table(part.name, ["result"], [[failure]], problem=f"{part.name}: {failure}")
            traceback.print_exception(error)
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                lost = f"the GPU's context was lost in {part.name!r}"
        table.notes.append(f"Took {time.perf_counter() - began:.1f} s.")
        yield table
        if options.device.type == "cuda" and not lost:
            torch.cuda.empty_cache()


def unavailable(part: Part, device: torch.device, left_s: float) -> str:
    """Why a part cannot run here and now; "" if it can."""
    if device.type != "cuda":
        return part.needs_cuda
    if left_s < part.needs_s:
        return f"it takes about {part.needs_s:.0f} s, and {max(left_s, 0):.0f} s of --minutes are left"
    free = torch.cuda.mem_get_info(device)[0] / GIB
    if free < part.needs_gib:
        return f"it takes about {part.needs_gib:.0f} GiB of the GPU's memory, and {free:.0f} are free"
    return ""
