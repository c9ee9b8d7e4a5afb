"""Two hosts, one of which is cut off from the network in the middle of a run and brought back."""

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

pytestmark = pytest.mark.integration


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := hosts.why_not():
        pytest.skip(reason)
    with Hosts(tmp_path) as made:
        yield made


def test_a_host_that_was_cut_off_and_came_back_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    if reason := hosts.why_not():
        pytest.skip(reason)
    row = cut_off_host(tmp_path)
    assert row.failures == ()
    assert (row.tried, row.kept) == (1, 1)


@pytest.mark.parametrize(("state", "error"), [("up", "ConnectionRefusedError"), ("down", "")])
def test_the_cable_carries_what_the_hosts_say_until_it_is_cut(two_hosts: Hosts, state: str, error: str) -> None:
    two_hosts.set_cable("down")
    two_hosts.set_cable(state)
    call = f"import socket; socket.create_connection(({ADDRESSES[1]!r}, 9), timeout=1)"
    with pytest.raises(subprocess.CalledProcessError) as failed:  # nobody listens there, which takes a host to say
        two_hosts.run(0, sys.executable, "-c", call)
    assert ("ConnectionRefusedError" in failed.value.stderr) == bool(error)


def test_hosts_and_their_programs_are_gone_after_a_failure(tmp_path: Path) -> None:
    if reason := hosts.why_not():
        pytest.skip(reason)
    started = []

    def fail() -> None:
        with Hosts(tmp_path) as made:
            started.append(made.train(0, tmp_path, tmp_path))
            assert len(list_spaces()) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert started[0].returncode is not None
    assert list_spaces() == []


def list_spaces() -> list[str]:
    """Network spaces that this process has made."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith(f"unet3d-{os.getpid()}-")]


def test_where_no_hosts_can_be_made_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    row = cut_off_host(tmp_path)
    assert (row.tried, row.kept) == (0, 0)
    assert row.promise == "no two hosts on this machine: there is no program ip"


GOOD = "main.py (rank 1): error: the connection to rank 0's machine is lost; start again with --resume"


@pytest.mark.parametrize(
    ("line", "after_s", "problem"),
    [
        (GOOD, LIMIT_S - 1, ""),
        (GOOD, LIMIT_S + 2, "host-b stopped 62 s after the cut"),
        ("RuntimeError: Connection reset by peer", 1.0, "host-b's last line does not tell the cause"),
        ("", 0.0, "host-b's last line does not tell the cause"),
    ],
)
def test_the_judge_wants_an_end_in_time_and_its_cause(line: str, after_s: float, problem: str) -> None:
    said = judge("host-b", 1000.0 + after_s, line, cut_at=1000.0)
    assert said.startswith(problem)
    assert bool(said) == bool(problem)
