"""Specs: names and literals are read, anything else is refused, nothing is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import registry
from common.errors import UserError


class Thing:
    """A class that a table might hold."""

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
    assert registry.parse(spec, "--model") == (name, arguments)


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
        registry.parse(spec, "--model")


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
        registry.build(spec.format(path=witness), TABLE, "--model", channels=1)
    assert not witness.exists()


def test_build_calls_with_the_callers_and_the_specs_arguments() -> None:
    thing = registry.build("thing(size=4, names=('a', 'b'))", TABLE, "--model", channels=3)
    assert (thing.channels, thing.size, thing.names) == (3, 4, ("a", "b"))
    assert registry.build("other", TABLE, "--model", channels=2).channels == 2


@pytest.mark.parametrize("name", ["thingamajug", "zzz"])
def test_an_unknown_name_lists_all(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--model '{name}': unknown name; available: other, thing, thingamajig$"):
        registry.build(name, TABLE, "--model", channels=1)


def test_an_unknown_argument_shows_what_the_name_takes() -> None:
    with pytest.raises(UserError, match=r"^--loss thing: unknown argument 'sise'; it takes size=1, names=\(\)$"):
        registry.build("thing(sise=4)", TABLE, "--loss", channels=1)


def test_a_spec_cannot_override_what_the_program_sets() -> None:
    with pytest.raises(
        UserError, match=r"'channels' is set by the program, leave it out; it takes size=1, names=\(\)$"
    ):
        registry.build("thing(channels=4)", TABLE, "--model", channels=1)


def test_a_target_without_parameters_is_shown_as_such() -> None:
    with pytest.raises(UserError, match=r"unknown argument 'size'; it takes none"):
        registry.build("empty(size=4)", {"empty": _nothing}, "--model")


def _nothing() -> int:
    return 7


def test_a_value_of_the_wrong_type_is_a_user_error() -> None:
    def sized(size: tuple[int, ...]) -> int:
        return len(size)

    with pytest.raises(UserError, match=r"--model 'sized\(size=4\)': object of type 'int' has no len.*it takes size"):
        registry.build("sized(size=4)", {"sized": sized}, "--model")
    with pytest.raises(UserError, match=r"missing 1 required positional argument: 'size'; it takes size"):
        registry.build("sized", {"sized": sized}, "--model")


def test_other_errors_of_the_target_are_not_hidden() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        registry.build("broken", {"broken": broken}, "--model")


# Imports on demand


LAZY: registry.Table[Thing] = {
    "thing": Thing,
    "lazy": "tests.common.test_registry:Thing",
    "lost": "nowhere_at_all:Thing",
}


def build(spec: str, table: registry.Table[Any] = LAZY) -> Any:
    return registry.build(registry.Spec(spec, trusted=True), table, "--trackers", channels=1)


def test_a_table_s_entry_may_be_imported_when_it_is_named() -> None:
    thing = build("lazy(size=4)")
    assert (type(thing).__name__, thing.channels, thing.size) == ("Thing", 1, 4)
    assert build("thing").size == 1, "the lost one is not imported"


@pytest.mark.parametrize(
    "spec", ["tests.common.test_registry:Thing", "  tests.common.test_registry:Thing  ", "{}()", "{}(size=1)"]
)
def test_a_path_is_imported(spec: str) -> None:
    assert build(spec.format("tests.common.test_registry:Thing")).size == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lost", r"^--trackers lost: there is no module nowhere_at_all$"),
        ("nowhere_at_all:Thing", r"^--trackers nowhere_at_all:Thing: there is no module nowhere_at_all$"),
        ("tests.nowhere:Thing", r"there is no module tests\.nowhere$"),
        (
            "tests.common.test_registry:Nothing",
            r"tests\.common\.test_registry has no callable Nothing; similar: Thing, Fetching$",
        ),
        ("tests.common.test_registry:TABLE", r"has no callable TABLE$"),
        ("builtins:dict", r"has no callable dict$"),
        ("tests.common.test_registry:Thing(sise=4)", r"unknown argument 'sise'; it takes size=1, names=\(\)$"),
        ("tests.common.test_registry:Thing(channels=4)", r"'channels' is set by the program"),
        ("tests.common.test_registry:_nothing", r"unexpected keyword argument 'channels'"),
        ("tests.common.test_registry:Thing.size", r"expected a name"),
        ("tests.common.test_registry:Thing(4)", r"expected a name"),
        ("tests.common.test_registry:Thing(size=len('a'))", r"expected a name"),
        ("tests/test_plugins:Thing", r"expected a name"),
        (".test_plugins:Thing", r"expected a name"),
        ("lambda:thing", r"there is no module lambda$"),
    ],
)
def test_a_failed_import_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(spec)


# Trust


ALLOWED = registry.Allowlist(
    modules=("tests.common.test_registry",),
    base=Thing,
    required_parameters=(("channels", "in_channels"),),
    forbidden_parameters=("path",),
    overrides={"size": 1},
)


class Fetching(Thing):
    def __init__(self, channels: int, path: str = "") -> None:
        super().__init__(channels)


class Narrow(Thing):
    def __init__(self) -> None:
        super().__init__(1)


def make_thing(channels: int) -> Thing:
    return Thing(channels)


@pytest.mark.parametrize(
    "spec",
    [
        "os:system(command='touch {path}')",
        "subprocess:run(args='touch {path}', shell=True)",
        "pathlib:Path",  # a class, of a module outside the allowlist
        "tests.common.test_registry:Path",  # from an allowed module, but defined in another package
        "tests.common.test_registry:make_thing",  # a function
        "tests.common.test_registry:TABLE",
        "tests.common.test_registry:Fetching",  # has a forbidden parameter
        "tests.common.test_registry:Narrow",  # has none of the required parameters
        "tests.common.test_registry:Thing(names=('a/b',))",  # a path
        "tests.common.test_registry:Thing(names={{'k': ['hub:x']}})",  # an address
        "tests.common.test_registry:Thing(names=b'a')",
        "tests:Thing",
    ],
)
def test_an_untrusted_spec_imports_only_from_the_allowlist(spec: str, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    text = spec.format(path=witness)
    with pytest.raises(UserError, match=r"comes from a file|has no callable TABLE") as raised:
        registry.build(text, LAZY, "--model", allowlist=ALLOWED, channels=1)
    assert not witness.exists()
    if "comes from a file" in str(raised.value):
        assert "thing, lazy, lost, tests.common.test_registry:…" in str(raised.value)
        assert "give --model on the command line" in str(raised.value)
    with pytest.raises(UserError, match="comes from a file"):
        registry.build(text, LAZY, "--model", channels=1)  # no allowlist
    assert not witness.exists()


def test_an_untrusted_spec_may_name_the_table_and_the_allowlist() -> None:
    assert registry.build("lazy(size=3)", LAZY, "--model", allowlist=ALLOWED, channels=1).size == 3
    spec = "tests.common.test_registry:Thing(size=9, names=('a-b.c',))"
    thing = registry.build(spec, LAZY, "--model", allowlist=ALLOWED, channels=1)
    assert (thing.size, thing.names) == (1, ("a-b.c",)), "the allowlist overrides size"


@pytest.mark.parametrize("name", ["Thing", "make_thing", "Fetching"])
def test_a_trusted_spec_may_import_whatever_it_names(name: str) -> None:
    spec = registry.Spec(f"tests.common.test_registry:{name}", trusted=True)
    assert registry.build(spec, LAZY, "--model", allowlist=ALLOWED, channels=5).channels == 5


def test_unmarked_specs_are_untrusted() -> None:
    trusted = registry.Spec("tests.common.test_registry:make_thing", trusted=True)
    for spec in (trusted.text, str(trusted), f"{trusted}", registry.Spec(trusted.text)):
        with pytest.raises(UserError, match="comes from a file"):
            registry.build(spec, LAZY, "--model", allowlist=ALLOWED, channels=1)
    assert not isinstance(trusted, str), "text that is saved and read again has lost its trust"
    with pytest.raises(UserError, match="expected a string"):
        registry.build(["unet3d"], LAZY, "--model", channels=1)  # type: ignore[arg-type]


def test_a_similar_name_in_a_module_is_listed() -> None:
    with pytest.raises(UserError, match=r"tests\.common\.test_registry has no callable Fethcing; similar: Fetching"):
        build("tests.common.test_registry:Fethcing")


def test_a_missing_argument_shows_the_signature_without_what_the_program_sets() -> None:
    def network(channels: int, strides: tuple[int, ...], kernel: int = 3, norm: Any = len, **rest: Any) -> int:
        return 1

    with pytest.raises(UserError, match=r"'strides'; it takes strides, kernel=3, norm=…, \*\*rest$"):
        registry.build("network", {"network": network}, "--model", channels=1)


@pytest.mark.parametrize(("package", "pip"), [("monai", r"'\.\[monai\]'"), ("torchio", r"'\.\[torchio\]'")])
def test_a_missing_package_of_an_allowed_module_names_what_to_install(
    package: str, pip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(UserError, match=rf"needs {package}, which is not installed; pip install {pip}$"):
        registry.build(registry.Spec(f"{package}.nets:Net", trusted=True), LAZY, "--model")


def test_a_module_that_breaks_when_it_is_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaking.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot import breaking \(RuntimeError: operator torchvision::nms"):
        build("breaking:Net")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import not_installed_at_all", r"^--trackers lazy: needs not_installed_at_all, which is not installed; "),
        ("from json import nothing", r"^--trackers lazy: cannot import name 'nothing' from 'json' .*; "),
    ],
)
def test_a_missing_package_names_what_to_install(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"lazy_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=message + r"pip install '\.\[lazy\]'$"):
        build("lazy", {"lazy": f"{name}:Thing"})


def test_a_target_with_kwargs_gets_any_argument() -> None:
    assert build("any(size=3, other='x')", {"any": lambda **given: given}) == {"channels": 1, "size": 3, "other": "x"}
