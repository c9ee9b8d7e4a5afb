"""The first signal is a handler, a second one has its usual effect, and outside of training both have it at once."""

from __future__ import annotations

import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator

import pytest

from common.errors import Interrupted
from runtime.distributed import signals as interruption
from runtime.distributed.signals import SignalHandler

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.monotonic` will tell, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, object]]:
    """Signals that this process would end with: the number, and the handler that it would meet."""
    sent: list[tuple[int, object]] = []
    monkeypatch.setattr(
        interruption.os, "kill", lambda process, number: sent.append((number, signal.getsignal(number)))
    )
    return sent


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_number_and_nothing_else(number: int) -> None:
    with SignalHandler() as handler:
        assert handler.number == 0
        handler.check()
        signal.raise_signal(number)
        assert handler.number == number


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_check_raises_once_a_signal_came(number: int, status: int) -> None:
    with SignalHandler() as handler:
        signal.raise_signal(number)
        for _ in range(2):
            with pytest.raises(Interrupted) as left:
                handler.check()
            assert left.value.exit_status == status


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_within_a_second_is_the_same_wish(
    second: int, clock: list[float], ended: list[tuple[int, object]]
) -> None:
    """A terminal signals every process of its group, and the launcher passes it on."""
    with SignalHandler() as handler:
        signal.raise_signal(signal.SIGTERM)
        for passed in (0.0, 0.5, 0.5):
            clock[0] += passed
            signal.raise_signal(second)
        assert handler.number == signal.SIGTERM, "the first one's exit status"
    assert ended == []


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_later_one_has_its_usual_effect(
    first: int, second: int, clock: list[float], ended: list[tuple[int, object]]
) -> None:
    with SignalHandler():
        signal.raise_signal(first)
        clock[0] += 1.01
        signal.raise_signal(second)
    assert ended == [(second, signal.SIG_DFL)]


def test_a_signal_that_came_to_another_rank_leaves_this_ones_first_a_wish(
    clock: list[float], ended: list[tuple[int, object]]
) -> None:
    with SignalHandler() as handler:
        handler.number = signal.SIGTERM  # as the watchdog sets it
        clock[0] += 60
        signal.raise_signal(signal.SIGTERM)
        assert ended == []
        clock[0] += 60
        signal.raise_signal(signal.SIGTERM)
    assert len(ended) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_run_without_a_signal_they_have_the_effect_that_they_had(fails: bool) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with SignalHandler():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if fails:
                raise ValueError("a bug")
    except ValueError:
        assert fails
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_same_signal_again_does_not_end_a_run_that_is_ending(
    clock: list[float], ended: list[tuple[int, object]]
) -> None:
    """It closes its logs after the last step, and keeps its exit status."""
    with SignalHandler():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert ended == []
    clock[0] += 1.01
    signal.raise_signal(signal.SIGTERM)
    assert ended == [(signal.SIGTERM, signal.SIG_DFL)]


PROGRAM = """
    import os, signal, sys, time
    from runtime.distributed import signals as interruption
    interruption.SAME_REQUEST_S = 0.0
    first, second = map(int, sys.argv[1:])
    with interruption.SignalHandler() as handler:
        os.kill(os.getpid(), first)
        print("still here", handler.number, flush=True)
        time.sleep(0.01)
        os.kill(os.getpid(), second)
        print("not here")
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_process_ends_by_the_second_signal(
    first: int, second: int, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """For who waits for it: killed by that signal, with nothing written and no traceback."""
    done = run_python("-c", textwrap.dedent(PROGRAM), int(first), int(second))
    assert (done.returncode, done.stdout, done.stderr) == (-second, f"still here {int(first)}\n", "")


class Values:
    """A store in one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set_default(self, name: str, text: str) -> str:
        return self.values.setdefault(name, text)

    def get(self, name: str) -> str | None:
        return self.values.get(name)


def test_an_evaluation_is_left_by_all_only_where_a_ranks_part_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "POLL_S", 0.0)
    store = Values()
    working, waiting = SignalHandler(store), SignalHandler(store)  # type: ignore[arg-type]
    waiting.number = signal.SIGINT
    waiting.check_waiting()  # its own handler does not count: its part is given, and may make the whole
    working.check()
    assert store.values == {}
    working.number = signal.SIGTERM
    with pytest.raises(Interrupted) as left:
        working.check()
    assert left.value.exit_status == 143
    with pytest.raises(Interrupted) as followed:
        waiting.check_waiting()
    assert followed.value.exit_status == 143


def test_a_rank_alone_waits_for_nobody() -> None:
    handler = SignalHandler()
    handler.number = signal.SIGTERM
    handler.check_waiting()
    with pytest.raises(Interrupted):
        handler.check()
