"""systems/SYSTEM.json: what the machine tells of itself, and the gaps that only a person can fill."""

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

# MLPerf's keys, in its order.
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
# They may be empty.
NOTES = ("hw_notes", "sw_notes")
STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}
NONE = "N/A"
Text = dict[str, str]


def describe_system(
    values: Mapping[str, Any], system: str, environment: Mapping[str, Any], nodes: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The description; a gap is "".

    Args:
        values: of the runs' logs.
        environment: of the runs, as their run.json has it. This machine speaks for them only where it is alike.
        nodes: "" where nobody said.
        given: what a person says; it counts before what the machine tells.
    """
    told: dict[str, Any] = dict.fromkeys(KEYS, "")
    told |= {
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
    on_cpu = environment.get("device") == "cpu"
    if environment.get("cpu") == cpu_name():
        told |= _host()
    if on_cpu:
        told |= dict.fromkeys((key for key in KEYS if key.startswith("accelerator")), NONE)
        told["accelerators_per_node"] = "0"
    else:
        told |= _accelerators(str(environment.get("device", "")), environment, nodes)
        if driver := nvidia("driver_version"):
            told["other_software_stack"]["driver"] = driver
    return told | dict(given)


def gaps(description: Mapping[str, Any]) -> list[str]:
    """The keys that nobody has filled."""
    return [key for key in KEYS if not description.get(key) and key not in NOTES]


def read_given(path: Path | None) -> dict[str, Any]:
    """What `--system_description` says. Raises UserError where it is no JSON object of MLPerf's keys with texts."""
    if path is None:
        return {}
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--system_description {path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--system_description {path}: no JSON object ({error})") from None
    if unknown := sorted(set(content) - set(KEYS)):
        raise UserError(f"--system_description {path}: MLPerf has no key {unknown[0]!r}")
    for key, value in content.items():
        if not isinstance(value, str) and not (key == "other_software_stack" and isinstance(value, dict)):
            raise UserError(f'--system_description {path}: {key} must be a text, such as "{value}"')
    return {key: value for key, value in content.items() if value}


def _host() -> Text:
    """Of this machine's processors, memory and network, from /proc and /sys; what they do not tell is left out."""
    cores = _cpuinfo("core id")
    sockets = len({socket for socket, _ in cores}) or 1
    told = {
        "host_processors_per_node": str(sockets),
        "host_processor_core_count": str(len(set(cores)) // sockets or (os.cpu_count() or 1)),
        "host_processor_vcpu_count": str((os.cpu_count() or 1) // sockets),
        "operating_system": _os_name(),
    }
    if frequency := _number("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"):
        told["host_processor_frequency"] = f"{frequency / 1e6:.2f} GHz"
    if caches := _caches():
        told["host_processor_caches"] = caches
    if match := re.search(r"MemTotal:\s+(\d+) kB", _text("/proc/meminfo")):
        told["host_memory_capacity"] = f"{int(match[1]) / 2**20:.0f} GiB"
    speeds = sorted(speed for path in Path("/sys/class/net").glob("*/speed") if (speed := _number(str(path))) > 0)
    if speeds:
        told["host_networking"] = f"{len(speeds)} interface(s), up to {speeds[-1] / 1000:g} Gbit/s"
    return told


def _accelerators(device: str, environment: Mapping[str, Any], nodes: str) -> Text:
    """Of the GPUs that the runs had; figures of this machine's where it has the same."""
    ranks = int(environment.get("ranks", 0))
    told = {"accelerator_model_name": device}
    if nodes.isdecimal() and int(nodes):
        told["accelerators_per_node"] = str(ranks // int(nodes))
    if torch.cuda.is_available() and torch.cuda.get_device_name(0) == device:
        size = torch.cuda.get_device_properties(0).total_memory
        told["accelerator_memory_capacity"] = f"{size / 2**30:.0f} GiB"
        if frequency := nvidia("clocks.max.sm"):
            told["accelerator_frequency"] = frequency
        generation, width = nvidia("pcie.link.gen.max"), nvidia("pcie.link.width.max")
        if generation and width:
            told["accelerator_host_interconnect"] = f"PCIe Gen{generation} x{width}"
        if ranks == 1:
            told |= {"accelerator_interconnect": NONE, "accelerator_interconnect_topology": NONE}
        elif "NV" in _output(["nvidia-smi", "topo", "-m"]):
            told["accelerator_interconnect"] = "NVLink"
    return told


def nvidia(what: str) -> str:
    """What nvidia-smi says of the first GPU, "" where it says nothing."""
    lines = _output(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines and "[" not in lines[0] else ""


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpuinfo(name: str) -> list[tuple[str, str]]:
    """(socket, the field) of every logical processor."""
    found, socket = [], "0"
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "physical id":
            socket = value
        elif key == name:
            found.append((socket, value))
    return found


def _caches() -> str:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(str(index / name)).strip() for name in ("level", "type", "size"))
        if size:
            sizes[f"L{level}{'d' if kind == 'Data' else 'i' if kind == 'Instruction' else ''}"] = size
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _os_name() -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text("/etc/os-release"), re.MULTILINE)
    return match[1] if match else platform.platform()


def _number(path: str) -> int:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
