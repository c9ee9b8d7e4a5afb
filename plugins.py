"""Specs on the command line: a short name from a room's table, with keyword arguments.

    unet3d
    unet3d(filters=(16,32,64,128))
    package.module:name(key=value)      where the flag allows it: one's own, imported

Arguments are literals, read with `ast.literal_eval`: nothing in a spec is executed. To import a module is to execute
it: a flag that checkpoints set as well (`--model`) takes names from its table alone.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from errors import UserError

T = TypeVar("T")
# In a table a string, "package.module:name", is imported when a spec asks for it.
Table = Mapping[str, Callable[..., T] | str]

IMPORTABLE = re.compile(r"\s*((?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*)(.*)", re.DOTALL)


def parse(spec: str, flag: str, importable: bool = False) -> tuple[str, dict[str, Any]]:
    """Splits "name(key=literal, …)" into the name and its arguments.

    Args:
        importable: the name may be a "package.module:name" as well.

    Raises:
        UserError: anything but a name and keyword arguments with literal values.
    """
    path = IMPORTABLE.fullmatch(spec) if importable else None
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
    raise UserError(f"{flag} {spec!r}: expected a name or name(key=value, …) with plain values")


def _named(keyword: ast.keyword) -> bool:
    if keyword.arg is None:
        raise ValueError("** is not a plain value")
    return True


def build(spec: str, table: Table[T], flag: str, importable: bool = False, **fixed: Any) -> T:
    """Calls what the spec names in `table` with the spec's arguments and the room's own (`fixed`).

    Args:
        importable: the spec may name what is not in the table, as "package.module:name".

    Raises:
        UserError: an unknown name (the near ones are listed) or argument (the signature is shown), a missing package.
    """
    name, arguments = parse(spec, flag, importable)
    make = _find(name, table, flag)
    parameters = inspect.signature(make).parameters
    allowed = [p for p in parameters if p not in fixed]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if (unknown := sorted(set(arguments) - set(allowed))) and not takes_any:
        raise UserError(f"{flag} {name}: unknown argument {unknown[0]!r}; it takes {', '.join(allowed) or 'none'}")
    try:
        return make(**fixed, **arguments)
    except TypeError as error:
        raise UserError(f"{flag} {spec!r}: {error}; it takes {', '.join(allowed)}") from None


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
        found: Any = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{who}: there is no module {error.name}") from None
        lacks = f"needs {error.name}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        advice = f"; pip install '.[{group}]'" if group else ""
        raise UserError(f"{who}: {lacks}{advice}") from None
    try:
        inspect.signature(found)
    except (TypeError, ValueError):  # no function or class, or one that does not say what it takes
        raise UserError(f"{who}: {module} has no {name} to call") from None
    return found


def _find(name: str, table: Table[T], flag: str) -> Callable[..., T]:
    if ":" in name:
        return load(name, f"{flag} {name}", "")
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3) or sorted(table)
        raise UserError(f"{flag} {name!r} does not exist; there is {', '.join(near)}")
    entry = table[name]
    return load(entry, f"{flag} {name}", name) if isinstance(entry, str) else entry
