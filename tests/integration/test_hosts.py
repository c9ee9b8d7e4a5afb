"""Two hosts, one of which loses its network connection in the middle of a run and regains it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import hosts
from tests.faults.hosts import ADDRESSES, LIMIT_S, Hosts, cut_off_host, judge


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := hosts.unavailable_reason():
        pytest.skip(reason)
    with Hosts(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_a_run_with_a_disconnected_host_ends_as_without_the_cut(tmp_path: Path) -> None:
    if reason := hosts.unavailable_reason():
        pytest.skip(reason)
    row = cut_off_host(tmp_path)
    assert row.failures == ()
    assert (row.tried, row.kept) == (1, 1)


@pytest.mark.parametrize(("state", "error"), [("up", "ConnectionRefusedError"), ("down", "")])
def test_the_cable_connects_the_hosts_until_it_is_cut(two_hosts: Hosts, state: str, error: str) -> None:
    two_hosts.set_cable("down")
    two_hosts.set_cable(state)
    call = f"import socket; socket.create_connection(({ADDRESSES[1]!r}, 9), timeout=1)"
    # No program listens on the port: a connected host refuses, a disconnected one does not answer.
    with pytest.raises(subprocess.CalledProcessError) as failed:
        two_hosts.run(0, sys.executable, "-c", call)
    assert ("ConnectionRefusedError" in failed.value.stderr) == bool(error)


def test_hosts_and_their_programs_are_removed_after_a_failure(tmp_path: Path) -> None:
    if reason := hosts.unavailable_reason():
        pytest.skip(reason)
    started = []

    def fail() -> None:
        with Hosts(tmp_path) as made:
            started.append(made.train(0, tmp_path, tmp_path))
            assert len(list_namespaces()) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert started[0].returncode is not None
    assert list_namespaces() == []


def list_namespaces() -> list[str]:
    """Network namespaces that this process has created."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith(f"unet3d-{os.getpid()}-")]


def test_without_namespaces_the_row_reports_no_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    row = cut_off_host(tmp_path)
    assert (row.tried, row.kept) == (0, 0)
    assert row.promise == "cannot emulate two hosts on this machine: program ip not found"


GOOD = "main.py (rank 1): error: the connection to rank 0's machine is lost; start again with --resume"


@pytest.mark.parametrize(
    ("line", "after_s", "problem"),
    [
        (GOOD, LIMIT_S - 1, ""),
        (GOOD, LIMIT_S + 2, "host-b stopped 62 s after the cut"),
        ("RuntimeError: Connection reset by peer", 1.0, "host-b's last line does not give the cause"),
        ("", 0.0, "host-b's last line does not give the cause"),
    ],
)
def test_a_host_must_end_in_time_and_give_the_cause(line: str, after_s: float, problem: str) -> None:
    found = judge("host-b", 1000.0 + after_s, line, cut_at=1000.0)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
