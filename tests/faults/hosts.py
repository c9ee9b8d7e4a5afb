"""Two hosts under torchrun, one of which loses its network connection for a while.

Both hosts are emulated on this machine by Linux namespaces: each has its own network, host name and process IDs; a
virtual cable connects them. This requires root and a system that permits namespaces.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.faults import Row
from tests.faults.runs import PROJECT, START_S, TINY, Run, differences, write_balls

HOSTS = ("host-a", "host-b")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
INTERFACE = "eth0"
# Rendezvous port on the first host; ports in the namespaces do not collide with those of this machine.
PORT = 29400
ARGUMENTS = (
    *("--num_workers", "0", "--epochs", "24", "--start_eval_at", "16", "--evaluate_every", "4"),
    *("--ckpt_every", "0.02m", "--resume"),
)
# Number of epochs before the cut: checkpoints have been written, and most of the run remains.
EPOCHS_BEFORE = 6
# Longest permitted time from the cut until both hosts have stopped training.
LIMIT_S = 60.0
# Minimum durations of the cut. 0: the cable is restored once both hosts have stopped training, and torchrun restarts
# the ranks. 75 s: longer than the minute that torchrun waits for the other host, so that it exits and is started again.
CUTS_S = (0.0, 75.0)
ENDING = re.compile(r"main\.py.*: error: .*rank .*; start again with --resume")


def unavailable_reason() -> str:
    """Returns in one line why hosts cannot be emulated on this machine; "" if they can."""
    missing = [program for program in ("ip", "unshare", "mount", "hostname") if shutil.which(program) is None]
    if missing:
        return f"cannot emulate two hosts on this machine: program {missing[0]} not found"
    try:
        with Hosts(Path("/nowhere")) as hosts:
            hosts.run(0, "unshare", "--uts", "--pid", "--fork", "--mount-proc", "hostname", HOSTS[0])
    except subprocess.CalledProcessError as error:
        return f"cannot emulate two hosts on this machine: {error.stderr.strip() or error}"
    return ""


class Hosts:
    """Context manager of two network namespaces and the cable between them.

    Args:
        folder: folder for the output of the hosts' programs: torchrun in host-a.txt, its first rank in
            host-a_0/*/attempt_0/0/stderr.log, after a second start of torchrun in host-a_1/…
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._namespaces = [f"unet3d-{os.getpid()}-{name}" for name in HOSTS]
        self._starts = [0, 0]
        self._cleanup = ExitStack()

    def __enter__(self) -> Hosts:
        try:
            for namespace in self._namespaces:
                _ip("netns", "add", namespace)
                self._cleanup.callback(_ip, "netns", "delete", namespace)
            one, other = self._namespaces
            _ip("-n", one, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", other)
            for namespace, address in zip(self._namespaces, ADDRESSES, strict=True):
                _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", namespace, "link", "set", interface, "up")
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def run(self, host: int, *command: str) -> None:
        """Runs a command in a host's network and waits for it."""
        _ip("netns", "exec", self._namespaces[host], *command)

    def set_cable(self, state: str) -> None:
        """Disconnects ("down") or reconnects ("up") the second host."""
        _ip("-n", self._namespaces[1], "link", "set", INTERFACE, state)

    def train(self, host: int, data: Path, log_dir: Path) -> subprocess.Popen[bytes]:
        """Starts torchrun on a host; it is killed with all its child processes when the context ends."""
        names = self._folder / "hosts"
        names.write_text("127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, ADDRESSES, HOSTS)), encoding="utf-8")
        enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        command = [
            *("ip", "netns", "exec", self._namespaces[host]),
            *("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *("sh", "-c", enter, "sh", HOSTS[host], str(names)),
            *(sys.executable, "-m", "launch.torchrun", "--nnodes", "2", "--nproc_per_node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:{PORT}", "--rdzv-id", "faults"),
            *("--max-restarts", "3", "--redirects", "3"),
            *("--log-dir", str(self._folder / f"{HOSTS[host]}_{self._starts[host]}")),
            *("main.py", "--data_dir", str(data), "--log_dir", str(log_dir), *TINY, *ARGUMENTS),
        ]
        self._starts[host] += 1
        environment = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with (self._folder / f"{HOSTS[host]}.txt").open("a") as stream:
            process = subprocess.Popen(
                command, cwd=PROJECT, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT
            )
        self._cleanup.callback(_kill, process)
        return process

    def ending(self, host: int) -> tuple[float, str]:
        """Returns the time (s since 1970) of the last line that a host's first rank wrote, and that line.

        Before the rank has written anything, this is (0, "").
        """
        for path in (self._folder / f"{HOSTS[host]}_0").glob("*/attempt_0/0/stderr.log"):
            lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            return path.stat().st_mtime, lines[-1] if lines else ""
        return 0.0, ""

    def output(self) -> str:
        """Returns the last lines of each host's torchrun."""
        texts = {name: (self._folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace") for name in HOSTS}
        return "\n".join(f"{name}: {' | '.join(text.splitlines()[-3:])}" for name, text in texts.items())


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a host: `unshare --kill-child` kills the first process of its namespace, and the kernel all others."""
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()


def cut_off_host(work_dir: Path, tries: int = 1) -> Row:
    """Disconnects the second host in the middle of a run on two hosts, for as long as `CUTS_S` gives for the try."""
    fault, test = "one of two hosts loses its network connection for a while", "tests/integration/test_hosts.py"
    if reason := unavailable_reason():
        return Row(fault=fault, promise=reason, test=test, tried=0, kept=0)
    data, whole = write_balls(work_dir / "data"), work_dir / "whole"
    failures: list[str] = []
    slowest = lost_s = 0.0
    kept = 0
    for number in range(tries):
        folder = work_dir / f"cut_{number}"
        folder.mkdir()
        problems, stopped_s, unsaved_s = _cut_once(data, whole, folder, CUTS_S[number % len(CUTS_S)])
        kept += not problems
        failures += [f"try {number}: {problem}" for problem in problems]
        slowest, lost_s = max(slowest, stopped_s), max(lost_s, unsaved_s)
    return Row(
        fault=fault,
        promise=f"both stop within {LIMIT_S:.0f} s with the cause as the last line; "
        "restarted, they end as without the cut",
        test=test,
        tried=tries,
        kept=kept,
        seconds=slowest,
        lost=f"{lost_s:.1f} s, saving every 1.2 s",
        failures=tuple(failures),
    )


def _cut_once(data: Path, whole: Path, folder: Path, cut_s: float) -> tuple[list[str], float, float]:
    """Runs one try.

    Args:
        whole: log folder of the run without a cut, which is created by the first try.
        cut_s: minimum duration of the cut.

    Returns:
        The problems; seconds from the cut to the end of training on both hosts; seconds of work that were not saved.
    """
    log_dir = folder / "logs"
    with Hosts(folder) as hosts:
        parts = [hosts.train(host, data, log_dir) for host in range(2)]
        _wait(lambda: _epochs(log_dir) >= EPOCHS_BEFORE or _has_ended(parts), START_S)
        if _epochs(log_dir) < EPOCHS_BEFORE:
            return [f"ended before the cut: {hosts.output()}"], 0.0, 0.0
        hosts.set_cable("down")
        cut_at = time.time()
        unsaved_s = cut_at - (log_dir / "checkpoint.pth").stat().st_mtime
        # Runs now, while both hosts are idle.
        reference = None if whole.exists() else Run(data, whole, *ARGUMENTS, ranks=2)
        _wait(lambda: all(ENDING.match(hosts.ending(host)[1]) for host in range(2)), LIMIT_S)
        time.sleep(max(0.0, cut_at + cut_s - time.time()))
        hosts.set_cable("up")
        if reference and any(reference.wait()):
            raise RuntimeError(f"the run without a cut failed:\n{reference.output()}")
        _wait(lambda: _has_ended(parts), START_S)
        if _has_ended(parts) and any(part.returncode for part in parts):  # as Slurm and Kubernetes do
            parts = [hosts.train(host, data, log_dir) for host in range(2)]
            _wait(lambda: _has_ended(parts), START_S)
        problems = [] if _has_ended(parts) and not any(part.returncode for part in parts) else [hosts.output()]
        endings = [hosts.ending(host) for host in range(2)]
    problems += [judge(name, *ending, cut_at) for name, ending in zip(HOSTS, endings, strict=True)]
    stopped_s = max(ended_at for ended_at, _ in endings) - cut_at
    return [problem for problem in problems if problem] or differences(whole, log_dir), stopped_s, unsaved_s


def judge(name: str, ended_at: float, line: str, cut_at: float) -> str:
    """Returns how a host's first rank broke the promise; "" if it did not.

    Args:
        ended_at: time at which the rank wrote its last line, in s since 1970, as `cut_at`.
    """
    if ENDING.match(line) is None:
        return f"{name}'s last line does not give the cause: {line}"
    return "" if ended_at - cut_at <= LIMIT_S else f"{name} stopped {ended_at - cut_at:.0f} s after the cut: {line}"


def _epochs(log_dir: Path) -> int:
    """Returns the number of epochs that a run has logged; 0 before its first checkpoint."""
    log = log_dir / "log.jsonl"
    if not log.exists() or not (log_dir / "checkpoint.pth").exists():
        return 0
    return log.read_text(encoding="utf-8").count('"EpochStopped"')


def _has_ended(parts: Sequence[subprocess.Popen[bytes]]) -> bool:
    return all(part.poll() is not None for part in parts)


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits for a condition; returns whether it was met in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
