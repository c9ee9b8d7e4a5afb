"""Everything that one GPU can prove and measure within minutes: first that it computes right, then how fast.

The parts run in order of value. Each table is printed and written as its part ends; a part for which time, memory or
the device lacks is skipped with the reason, and a part that fails does not end the others.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import gpu_checks, gpu_convolutions, gpu_operators, gpu_runs, gpu_speed, networks
from benchmarks.harness import NOT_MEASURED, Options, Table
from common.errors import UserError, one_line

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: the title of its table.
        run: measures; returns the table.
        needs_s: skipped if less time than this is left.
        needs_gib: skipped if less of the GPU's memory than this is free.
        on_cpu: why it is skipped on a CPU; "": it runs there as well.
    """

    name: str
    run: Callable[[Options], Table]
    needs_s: float = field(kw_only=True)
    needs_gib: float = field(default=0.0, kw_only=True)
    on_cpu: str = field(default="", kw_only=True)


PARTS = (
    Part(
        "Triton operators",
        gpu_operators.triton_operators,
        needs_s=60,
        needs_gib=2,
        on_cpu="Triton's kernels are for CUDA",
    ),
    Part("Six steps against the CPU", gpu_checks.trace, needs_s=5, needs_gib=1),
    Part("Device loader", gpu_checks.device_loader, needs_s=5, needs_gib=1),
    Part(
        "Host syncs in a step", gpu_checks.host_syncs, needs_s=10, needs_gib=4, on_cpu="a CPU has nothing to wait for"
    ),
    Part(
        "Large tensors", gpu_operators.large_tensors, needs_s=10, needs_gib=60, on_cpu="Triton's kernels are for CUDA"
    ),
    Part("Killed and resumed", gpu_runs.resumed, needs_s=40, needs_gib=4),
    Part("Samples per second", gpu_speed.samples, needs_s=30, needs_gib=10),
    Part("A step by kernel", gpu_speed.profile, needs_s=10, needs_gib=30),
    Part("Windows per second", gpu_speed.windows, needs_s=25, needs_gib=10),
    Part("Choices", gpu_speed.choices, needs_s=30, needs_gib=30),
    Part("CUDA graphs", gpu_speed.cuda_graphs, needs_s=20, needs_gib=20, on_cpu="CUDA graphs are for CUDA"),
    Part("Networks", networks.steps, needs_s=60, needs_gib=20),
    Part("Convolutions", gpu_convolutions.convolutions, needs_s=50, needs_gib=8),
    Part("To a target", gpu_runs.to_target, needs_s=60, needs_gib=60),
    Part("torch.compile", gpu_speed.compiled, needs_s=90, needs_gib=30, on_cpu="compiling takes a CPU minutes"),
)


def run(options: Options) -> Iterator[Table]:
    """Yields the table of each part as it ends. Raises UserError for the name of a part that does not exist."""
    names = [part.name for part in PARTS]
    if unknown := [name for name in options.parts if name not in names]:
        raise UserError(f"--parts {', '.join(unknown)}: the parts are {', '.join(map(repr, names))}")
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
        return part.on_cpu
    if left_s < part.needs_s:
        return f"it takes about {part.needs_s:.0f} s, and {max(left_s, 0):.0f} s of --minutes are left"
    free = torch.cuda.mem_get_info(device)[0] / GIB
    if free < part.needs_gib:
        return f"it takes about {part.needs_gib:.0f} GiB of the GPU's memory, and {free:.0f} are free"
    return ""
