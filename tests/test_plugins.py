"""Specs: names and literals are read, everything else is refused, nothing is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import plugins
from errors import UserError


class Thing:
    """What a room's table might hold."""

    def __init__(self, channels: int, size: int = 1, names: tuple[str, ...] = ()) -> None:
        self.channels = channels
        self.size = size
        self.names = names


TABLE = {"thing": Thing, "other": Thing, "thingamajig": Thing}


@pytest.mark.parametrize(
    ("spec", "name", "arguments"),
    [
        ("unet3d", "unet3d", {}),
        ("  unet3d  ", "unet3d", {}),
        ("unet3d()", "unet3d", {}),
        ("unet3d(filters=(16, 32,64))", "unet3d", {"filters": (16, 32, 64)}),
        ("f(a=1, b=-2.5, c='x', d=None, e=True)", "f", {"a": 1, "b": -2.5, "c": "x", "d": None, "e": True}),
        ("f(a=[1, 2], b={'k': (3,)}, c={4})", "f", {"a": [1, 2], "b": {"k": (3,)}, "c": {4}}),
    ],
)
def test_names_and_literals_are_read(spec: str, name: str, arguments: dict[str, Any]) -> None:
    assert plugins.parse(spec, "--model") == (name, arguments)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "unet3d(",
        "unet3d(16)",
        "unet3d(*[1])",
        "unet3d(**{'size': 1})",
        "unet3d(size=1 + 2 * 3)",
        "unet3d(size=other)",
        "unet3d(size=len('abc'))",
        "unet3d(size=[n for n in (1, 2)])",
        "unet3d(size=f'{1}')",
        "unet3d(size=lambda: 1)",
        "unet3d.size",
        "a.b(size=1)",
        "unet3d(size=1)(2)",
        "unet3d; import os",
        "unet3d\nimport os",
        "'unet3d'",
        "1",
        "unet3d(size={[]: 1})",  # an unhashable key: literal_eval raises TypeError
        "unet3d(size=" + "-" * 5000 + "1)",  # RecursionError
        "-" * 20000 + "1",  # MemoryError
        "unet3d(\0)",
    ],
)
def test_anything_but_plain_values_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"^--model .*expected a name or name\(key=value, …\) with plain values$"):
        plugins.parse(spec, "--model")


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os').system('touch {path}')",
        "thing(size=__import__('os').system('touch {path}'))",
        "thing(size=open('{path}', 'w'))",
        "thing(size=[open('{path}', 'w')])",
        "thing(names=(open('{path}', 'w'),))",
        "exec(\"open('{path}', 'w')\")",
    ],
)
def test_nothing_in_a_spec_is_executed(spec: str, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    with pytest.raises(UserError):
        plugins.build(spec.format(path=witness), TABLE, "--model", channels=1)
    assert not witness.exists()


def test_build_calls_with_the_rooms_and_the_specs_arguments() -> None:
    thing = plugins.build("thing(size=4, names=('a', 'b'))", TABLE, "--model", channels=3)
    assert (thing.channels, thing.size, thing.names) == (3, 4, ("a", "b"))
    assert plugins.build("other", TABLE, "--model", channels=2).channels == 2


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"^--model 'thingamajug' does not exist; there is thingamajig, thing$"):
        plugins.build("thingamajug", TABLE, "--model", channels=1)


def test_an_unknown_name_near_to_none_lists_all() -> None:
    with pytest.raises(UserError, match=r"'zzz' does not exist; there is other, thing, thingamajig$"):
        plugins.build("zzz", TABLE, "--model", channels=1)


def test_an_unknown_argument_shows_what_the_name_takes() -> None:
    with pytest.raises(UserError, match=r"^--loss thing: unknown argument 'sise'; it takes size, names$"):
        plugins.build("thing(sise=4)", TABLE, "--loss", channels=1)


def test_a_spec_cannot_override_what_the_room_sets() -> None:
    with pytest.raises(UserError, match=r"unknown argument 'channels'; it takes size, names"):
        plugins.build("thing(channels=4)", TABLE, "--model", channels=1)


def test_a_name_that_takes_nothing_says_so() -> None:
    with pytest.raises(UserError, match=r"unknown argument 'size'; it takes none"):
        plugins.build("empty(size=4)", {"empty": _nothing}, "--model")


def _nothing() -> int:
    return 7


def test_a_value_of_the_wrong_kind_is_a_users_mistake() -> None:
    def sized(size: tuple[int, ...]) -> int:
        return len(size)

    with pytest.raises(UserError, match=r"--model 'sized\(size=4\)': object of type 'int' has no len.*it takes size"):
        plugins.build("sized(size=4)", {"sized": sized}, "--model")
    with pytest.raises(UserError, match=r"missing 1 required positional argument: 'size'; it takes size"):
        plugins.build("sized", {"sized": sized}, "--model")


def test_other_errors_of_the_thing_itself_are_not_hidden() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plugins.build("broken", {"broken": broken}, "--model")
