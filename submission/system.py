"""systems/SYSTEM.json: detected hardware and software, and the properties that the user has to fill in."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from runtime.environment import cpu_name

# MLPerf's keys, in MLPerf's order.
KEYS = (
    "submitter",
    "division",
    "status",
    "system_name",
    "number_of_nodes",
    "host_processors_per_node",
    "host_processor_model_name",
    "host_processor_core_count",
    "host_processor_vcpu_count",
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "host_memory_capacity",
    "host_storage_type",
    "host_storage_capacity",
    "host_networking",
    "host_networking_topology",
    "host_memory_configuration",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_host_interconnect",
    "accelerator_frequency",
    "accelerator_on-chip_memories",
    "accelerator_memory_configuration",
    "accelerator_memory_capacity",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "cooling",
    "hw_notes",
    "framework",
    "other_software_stack",
    "operating_system",
    "sw_notes",
)
# These may stay empty.
NOTES = ("hw_notes", "sw_notes")
STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}
NONE = "N/A"


def describe_system(
    values: Mapping[str, Any], *, system: str, environment: Mapping[str, Any], nodes: str
) -> dict[str, Any]:
    """Returns the description, with "" for what is unknown.

    Args:
        values: from the log of a run, by key.
        environment: of the runs, from their run.json; hardware detected here is used only if it is the same.
        nodes: number of machines; "" if unknown.
    """
    description: dict[str, Any] = dict.fromkeys(KEYS, "")
    description |= {
        "submitter": str(values["submission_org"]),
        "division": str(values["submission_division"]),
        "status": STATUS.get(str(values["submission_status"]), ""),
        "system_name": system,
        "number_of_nodes": nodes,
        "host_processor_model_name": str(environment.get("cpu", "")),
        "framework": f"PyTorch {environment.get('torch', '')}",
        "operating_system": str(environment.get("system", "")),
        "other_software_stack": {
            name: str(environment[name]) for name in ("python", "cuda", "cudnn", "numpy") if environment.get(name)
        },
    }
    if environment.get("cpu") == cpu_name():
        description |= _host()
    if environment.get("device") == "cpu":
        description |= dict.fromkeys((key for key in KEYS if key.startswith("accelerator")), NONE)
        description["accelerators_per_node"] = "0"
    else:
        description |= _accelerators(environment, nodes)
        if driver := nvidia_smi("driver_version"):
            description["other_software_stack"]["driver"] = driver
    return description


def missing_keys(description: Mapping[str, Any]) -> list[str]:
    """Returns the keys that are still to be filled in."""
    return [key for key in KEYS if not description.get(key) and key not in NOTES]


def read_user_description(path: Path | None) -> dict[str, Any]:
    """Reads `--system_description`. Raises UserError unless it is a JSON object with MLPerf's keys and text values."""
    if path is None:
        return {}
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--system_description {path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--system_description {path}: not a JSON object ({error})") from None
    if unknown := sorted(set(content) - set(KEYS)):
        raise UserError(f"--system_description {path}: unknown key {unknown[0]!r}; MLPerf does not define it")
    for key, value in content.items():
        if not isinstance(value, str) and not (key == "other_software_stack" and isinstance(value, dict)):
            raise UserError(f'--system_description {path}: {key} must be a string, such as "{value}"')
    return {key: value for key, value in content.items() if value}


def _host() -> dict[str, str]:
    """Returns this machine's processors, memory and network, as far as /proc and /sys list them."""
    cores = re.findall(r"physical id\s*:\s*(\d+).*?core id\s*:\s*(\d+)", _read("/proc/cpuinfo"), re.DOTALL)
    sockets = len({socket for socket, _ in cores}) or 1
    threads = os.cpu_count() or 1
    system = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), re.MULTILINE)
    found = {
        "host_processors_per_node": str(sockets),
        "host_processor_core_count": str(len(set(cores)) // sockets or threads),
        "host_processor_vcpu_count": str(threads // sockets),
        "operating_system": system[1] if system else platform.platform(),
    }
    if frequency := _read_number("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"):
        found["host_processor_frequency"] = f"{frequency / 1e6:.2f} GHz"
    if caches := _caches():
        found["host_processor_caches"] = caches
    if match := re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo")):
        found["host_memory_capacity"] = f"{int(match[1]) / 2**20:.0f} GiB"
    speeds = [speed for path in Path("/sys/class/net").glob("*/speed") if (speed := _read_number(path)) > 0]
    if speeds:
        found["host_networking"] = f"{len(speeds)} interface(s), up to {max(speeds) / 1000:g} Gbit/s"
    return found


def _accelerators(environment: Mapping[str, Any], nodes: str) -> dict[str, str]:
    """Returns the GPUs of the runs, with details if this machine has the same."""
    device, ranks = str(environment.get("device", "")), int(environment.get("ranks", 0))
    found = {"accelerator_model_name": device}
    if nodes.isdecimal() and int(nodes):
        found["accelerators_per_node"] = str(ranks // int(nodes))
    if torch.cuda.is_available() and torch.cuda.get_device_name(0) == device:
        size = torch.cuda.get_device_properties(0).total_memory
        found["accelerator_memory_capacity"] = f"{size / 2**30:.0f} GiB"
        if frequency := nvidia_smi("clocks.max.sm"):
            found["accelerator_frequency"] = frequency
        generation, width = nvidia_smi("pcie.link.gen.max"), nvidia_smi("pcie.link.width.max")
        if generation and width:
            found["accelerator_host_interconnect"] = f"PCIe Gen{generation} x{width}"
        if ranks == 1:
            found |= {"accelerator_interconnect": NONE, "accelerator_interconnect_topology": NONE}
        elif "NV" in _output(["nvidia-smi", "topo", "-m"]):
            found["accelerator_interconnect"] = "NVLink"
    return found


def nvidia_smi(field: str) -> str:
    """Returns a field of `nvidia-smi --query-gpu` for the first GPU, or "" if it is not available."""
    lines = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines and "[" not in lines[0] else ""


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _caches() -> str:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[f"L{level}{suffix}"] = size
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _read_number(path: str | Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
