"""The dispatcher hands every event to the watchdog and the trackers, and survives a tracker that fails."""

from __future__ import annotations

import errno

import pytest

from runtime.logging.events import EvaluationStopped, Event, EventDispatcher, RunStarted


def scored(mean_dice: float, epoch: int = 4) -> EvaluationStopped:
    return EvaluationStopped(epoch=epoch, mean_dice=mean_dice, dice=[mean_dice, mean_dice], loss=0.5, seconds=1.0)


class Recorder:
    """A tracker that records its name with each event."""

    def __init__(self, name: str, log: list[tuple[str, Event]]) -> None:
        self.name = name
        self.log = log

    def on(self, event: Event) -> None:
        self.log.append((self.name, event))


def test_every_event_goes_to_the_watchdog_then_to_the_trackers_in_order() -> None:
    log: list[tuple[str, Event]] = []
    emit = EventDispatcher([Recorder("t1", log), Recorder("t2", log)], Recorder("watchdog", log))
    event = RunStarted()
    emit(event)
    assert log == [("watchdog", event), ("t1", event), ("t2", event)]


def test_a_failing_watchdog_is_no_tracker_and_ends_the_run() -> None:
    log: list[tuple[str, Event]] = []
    emit = EventDispatcher([Recorder("tracker", log)], Broken(ValueError("a bug"), []))
    with pytest.raises(ValueError, match="a bug"):
        emit(RunStarted())
    assert log == []


class Broken(Recorder):
    """Records the event, then fails."""

    def __init__(self, error: Exception, log: list[tuple[str, Event]]) -> None:
        super().__init__("broken", log)
        self.error = error

    def on(self, event: Event) -> None:
        super().on(event)
        raise self.error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("the share is gone"), "OSError: the share is gone"),
        (KeyError("epoch"), "KeyError: 'epoch'"),
    ],
)
def test_a_failing_tracker_is_reported_once_by_name_and_still_receives_events(
    error: Exception, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[str, Event]] = []
    emit = EventDispatcher([Broken(error, log), Recorder("sound", log)])
    for event in (scored(0.5), scored(0.6)):
        emit(event)
    assert [name for name, _ in log] == ["broken", "sound"] * 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"warning: Broken failed ({what}); its record may be incomplete, training goes on\n"


def test_each_failing_tracker_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    emit = EventDispatcher([Broken(ValueError("one"), []), Broken(ValueError("two"), [])])
    emit(RunStarted())
    emit(RunStarted())
    assert [line.split("(")[1].split(")")[0] for line in capsys.readouterr().err.splitlines()] == [
        "ValueError: one",
        "ValueError: two",
    ]
