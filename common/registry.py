"""Specs on the command line: a short name from a room's table, or something importable, with keyword arguments.

    unet3d
    unet3d(filters=(16,32,64,128))
    package.module:name(key=value)

Arguments are literals, read with `ast.literal_eval`: nothing in a spec is executed. To import a module is to execute
it, so it matters who wrote the spec. One of the command line is a `Typed` string and may import what it names. Any
other string, such as one out of a checkpoint, names what is in the room's table or in the exact modules that the room
knows, and there a class of the room's kind. Whoever forgets to mark a spec gets the safe way.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from common.errors import UserError

T = TypeVar("T")
# In a table a string, "package.module:name", is imported when a spec asks for it.
Table = Mapping[str, Callable[..., T] | str]

IMPORTABLE = re.compile(r"\s*((?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*)(.*)", re.DOTALL)
# What a text may be in a spec that nobody typed: no path, no address, no other program's way to name one ("hub:x").
WORD = re.compile(r"[\w.+ -]*")
# Of well-known packages: what to give to pip.
INSTALL = {
    "monai": "'.[monai]'",
    "torchio": "'.[torchio]'",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}


class Typed(str):
    """A spec that the user typed. Only the command line's parser makes one; it is a plain `str` once it is saved."""

    __slots__ = ()


@dataclass(frozen=True)
class Known:
    """Where a room finds what a spec names that nobody typed, beside its table.

    Attributes:
        modules: their exact names.
        kind: what is named there must be a class of this kind, of the module's own package.
        takes: each of these groups of parameters must be met by one that the class takes.
        instead: arguments that a spec may not set, with the value that they get where the class takes them.
        never: a class with such a parameter is refused.
    """

    modules: tuple[str, ...]
    kind: type
    takes: tuple[tuple[str, ...], ...] = ()
    instead: Mapping[str, Any] | None = None
    never: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named(Generic[T]):
    """What a spec names, found but not yet called.

    Attributes:
        spec: as it was given, for messages.
        parameters: of `make`'s signature.
    """

    spec: str
    flag: str
    name: str
    make: Callable[..., T]
    arguments: dict[str, Any]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.make).parameters

    @property
    def takes_any(self) -> bool:
        """Whether there is a **kwargs."""
        return any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())

    def call(self, fixed: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> T:
        """Makes it of the spec's arguments and the room's own.

        Args:
            fixed: what the spec may not say.
            defaults: what it gets where it has the parameter and the spec does not say otherwise.

        Raises:
            UserError: an unknown or missing argument, or one of the wrong kind; the signature is shown.
        """
        taken = takes({name: p for name, p in self.parameters.items() if name not in fixed})
        if twice := sorted(set(self.arguments) & set(fixed)):
            raise UserError(f"{self.flag} {self.name}: {twice[0]!r} is filled in, leave it out; it takes {taken}")
        if (unknown := sorted(set(self.arguments) - set(self.parameters))) and not self.takes_any:
            raise UserError(f"{self.flag} {self.name}: unknown argument {unknown[0]!r}; it takes {taken}")
        filled = {name: value for name, value in (defaults or {}).items() if name in self.parameters}
        try:
            return self.make(**{**filled, **fixed, **self.arguments})
        except (TypeError, ValueError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.flag} {str(self.spec)!r}: {told}; it takes {taken}") from None


def takes(parameters: Mapping[str, inspect.Parameter]) -> str:
    """A signature in words: the required ones bare, the others with their defaults, "…" for a long one."""

    def told(p: inspect.Parameter) -> str:
        if p.kind is p.VAR_KEYWORD:
            return f"**{p.name}"
        if p.default is p.empty:
            return p.name
        default = repr(p.default)
        return f"{p.name}={default if len(default) <= 24 and '<' not in default else '…'}"

    return ", ".join(told(p) for p in parameters.values() if p.kind is not p.VAR_POSITIONAL) or "none"


def parse(spec: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Splits "name(key=literal, …)" into the name, a "package.module:name" included, and its arguments.

    Raises:
        UserError: anything but a name and keyword arguments with literal values.
    """
    if not isinstance(spec, str):  # a damaged file may hold anything
        raise UserError(f"{flag} {spec!r}: expected a text")
    path = IMPORTABLE.fullmatch(spec)
    try:
        node = ast.parse(f"name{path[2]}" if path else spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return path[1] if path else node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if _named(k)}
            if len(arguments) == len(node.keywords):  # Python's own grammar lets a keyword come twice
                return path[1] if path else node.func.id, arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
        pass
    raise UserError(f"{flag} {str(spec)!r}: expected a name or name(key=value, …) with plain values")


def _named(keyword: ast.keyword) -> bool:
    if keyword.arg is None:
        raise ValueError("** is not a plain value")
    return True


def find(spec: str, table: Table[T], flag: str, known: Known | None = None, importable: bool = False) -> Named[T]:
    """What the spec names: in the table, or imported where it may be.

    Args:
        known: where a spec that is not `Typed` may find what is not in the table; None: nowhere.
        importable: the flag is the command line's alone, so that any spec of it may import.

    Raises:
        UserError: an unknown name (the near ones are listed), a missing package, a spec that may not import.
    """
    name, arguments = parse(spec, flag)
    if ":" not in name:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=3) or sorted(table)
            raise UserError(f"{flag} {name!r} does not exist; there is {', '.join(near)}")
        entry = table[name]
        return Named(
            spec, flag, name, load(entry, f"{flag} {name}", name) if isinstance(entry, str) else entry, arguments
        )
    if importable or isinstance(spec, Typed):
        return Named(spec, flag, name, load(name, f"{flag} {name}", ""), arguments)
    return _find_known(spec, flag, name, arguments, table, known)


def _find_known(
    spec: str, flag: str, name: str, arguments: dict[str, Any], table: Table[T], known: Known | None
) -> Named[T]:
    module = name.partition(":")[0]
    refused = UserError(
        f"{flag} {str(spec)!r} comes out of a file, not from the command line: such a spec may name "
        f"{', '.join([*table, *(f'{module}:…' for module in known.modules)] if known else table)}, with plain words; "
        f"if you trust it, give {flag} on the command line as well"
    )
    if known is None or module not in known.modules or not all(map(_is_plain, arguments.values())):
        raise refused
    found = Named[T](spec, flag, name, load(name, f"{flag} {name}", ""), arguments)
    package = module.partition(".")[0]
    is_own = isinstance(found.make, type) and f"{found.make.__module__}.".startswith(f"{package}.")
    if not is_own or not issubclass(found.make, known.kind):  # type: ignore[arg-type]
        raise refused
    if set(known.never) & set(found.parameters) or not all(set(n) & set(found.parameters) for n in known.takes):
        raise refused
    instead = known.instead or {}
    for argument in set(instead) & (set(arguments) | set(found.parameters)):
        arguments[argument] = instead[argument]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return not isinstance(value, str | bytes) or (isinstance(value, str) and WORD.fullmatch(value) is not None)


def build(
    spec: str, table: Table[T], flag: str, importable: bool = False, known: Known | None = None, **fixed: Any
) -> T:
    """Calls what the spec names with the spec's arguments and the room's own (`fixed`); see `find`.

    Raises:
        UserError: an unknown name (the near ones are listed) or argument (the signature is shown), a missing package.
    """
    return find(spec, table, flag, known, importable).call(fixed)


def load(path: str, who: str, group: str) -> Any:
    """Imports what "package.module:name" names: an extra, which the core knows by such a name alone, or one's own.

    Args:
        who: asks for it, such as a flag.
        group: of the optional dependencies in pyproject.toml, which holds what it needs; "" for none.

    Raises:
        UserError: it is not in this copy of the project, or a package is missing; the line says what to install.
    """
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        missing = error.name or ""
        if missing and f"{module}.".startswith(f"{missing}.") and missing not in INSTALL:
            raise UserError(f"{who}: there is no module {missing}") from None
        lacks = f"needs {missing}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        package = f"'.[{group}]'" if group else INSTALL.get(missing.partition(".")[0], "")
        raise UserError(f"{who}: {lacks}{f'; pip install {package}' if package else ''}") from None
    except Exception as error:  # torchvision beside another torch raises RuntimeError, one's own module anything
        told = " ".join(str(error).split())
        raise UserError(f"{who}: {module} cannot be imported ({type(error).__name__}: {told})") from None
    found: Any = getattr(imported, name, None)
    try:
        inspect.signature(found)
    except (TypeError, ValueError):  # no function or class, or one that does not say what it takes
        near = ", ".join(difflib.get_close_matches(name, _classes(imported, name), n=3))
        raise UserError(f"{who}: {module} has no {name} to call{near and f'; there is {near}'}") from None
    return found


def _classes(module: Any, but: str) -> Sequence[str]:
    return [name for name, found in vars(module).items() if inspect.isclass(found) and name[0] != "_" and name != but]
