"""Specs on the command line: a short name from a room's table, with keyword arguments.

    unet3d
    unet3d(filters=(16,32,64,128))

Arguments are literals, read with `ast.literal_eval`: nothing in a spec is executed.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from errors import UserError

T = TypeVar("T")


def parse(spec: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Splits "name(key=literal, …)" into the name and its arguments.

    Raises:
        UserError: anything but a name and keyword arguments with literal values.
    """
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if _named(k)}
            if len(arguments) == len(node.keywords):  # Python's own grammar lets a keyword come twice
                return node.func.id, arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
        pass
    raise UserError(f"{flag} {spec!r}: expected a name or name(key=value, …) with plain values")


def _named(keyword: ast.keyword) -> bool:
    if keyword.arg is None:
        raise ValueError("** is not a plain value")
    return True


def build(spec: str, table: Mapping[str, Callable[..., T]], flag: str, **fixed: Any) -> T:
    """Calls what the spec names in `table` with the spec's arguments and the room's own (`fixed`).

    Raises:
        UserError: an unknown name (the near ones are listed) or argument (the signature is shown).
    """
    name, arguments = parse(spec, flag)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3) or sorted(table)
        raise UserError(f"{flag} {name!r} does not exist; there is {', '.join(near)}")
    allowed = [p for p in inspect.signature(table[name]).parameters if p not in fixed]
    if unknown := sorted(set(arguments) - set(allowed)):
        raise UserError(f"{flag} {name}: unknown argument {unknown[0]!r}; it takes {', '.join(allowed) or 'none'}")
    try:
        return table[name](**fixed, **arguments)
    except TypeError as error:
        raise UserError(f"{flag} {spec!r}: {error}; it takes {', '.join(allowed)}") from None
