"""Builds objects by name from specs such as those on the command line.

    unet3d
    unet3d(filters=(16,32,64,128))
    package.module:name(key=value)

A name is looked up in a table; "package.module:name" is imported. Arguments are literals, read with
`ast.literal_eval`; nothing in a spec is executed. Importing a module does execute it, so only a trusted spec, one that
the user typed, may import whatever it names. Any other spec, such as one stored in a checkpoint, may name only entries
of the table and classes of the modules in an `Allowlist`. Unmarked specs are untrusted.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from common.errors import UserError, one_line

T = TypeVar("T")
# An entry "package.module:name" is imported when a spec asks for it.
Table = Mapping[str, Callable[..., T] | str]

# A name or "package.module:name", then everything after it.
SPEC = re.compile(r"\s*((?:(?:[^\W\d]\w*\.)*[^\W\d]\w*:)?[^\W\d]\w*)(.*)", re.DOTALL)
# Strings allowed as arguments of an untrusted spec: no path, no URL, no library's own "hub:name" notation.
PLAIN_TEXT = re.compile(r"[\w.+ -]*")
# What to pip-install for packages whose distribution has another name.
INSTALL = {
    "monai": "'.[monai]'",
    "torchio": "'.[torchio]'",
    "dynamic_network_architectures": "dynamic-network-architectures",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}


@dataclass(frozen=True)
class Spec:
    """A spec and whether the user typed it.

    Attributes:
        text: "name(key=value)" or "package.module:name(key=value)".
        trusted: whether it may import whatever it names; only the command line sets this.
    """

    text: str
    trusted: bool = False

    def __str__(self) -> str:
        return str(self.text)


@dataclass(frozen=True, kw_only=True)
class Allowlist:
    """What an untrusted spec may name beside the table's entries.

    Attributes:
        modules: exact module names.
        base: the named object must be a subclass of this, defined in the module's own package.
        required_parameters: the class must take at least one parameter of each group.
        forbidden_parameters: a class with any of these is refused.
        overrides: values that replace the spec's own for the parameters that the class has.
        classes_of: modules whose subclasses of `base` any spec's arguments may name, as "module:Class".
    """

    modules: tuple[str, ...]
    base: type
    required_parameters: tuple[tuple[str, ...], ...] = ()
    forbidden_parameters: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    classes_of: tuple[str, ...] = ()

    def names_class(self, value: Any) -> bool:
        """Returns whether an argument names a class of `classes_of`."""
        if not isinstance(value, str) or SPEC.fullmatch(value) is None:
            return False
        module, colon, name = value.partition(":")
        return bool(colon) and name.isidentifier() and module in self.classes_of

    def class_of(self, value: str, flag: str) -> type:
        """Returns the class that an argument names."""
        target: Any = load(value, f"{flag}: {value!r}", "")
        if not (isinstance(target, type) and issubclass(target, self.base)):
            raise UserError(f"{flag}: {value!r} is not a {self.base.__name__}")
        return target

    def admits(self, target: Any, package: str) -> bool:
        """Returns whether an untrusted spec may call this target, imported from a module of `package`."""
        if not (isinstance(target, type) and issubclass(target, self.base)):
            return False
        parameters = set(inspect.signature(target).parameters)
        return (
            f"{target.__module__}.".startswith(f"{package}.")
            and not parameters & set(self.forbidden_parameters)
            and all(parameters & set(group) for group in self.required_parameters)
        )


NOTHING = Allowlist(modules=(), base=object)


@dataclass(frozen=True, kw_only=True)
class ResolvedSpec(Generic[T]):
    """A spec whose target has been found but not called yet.

    Attributes:
        name: the part before the arguments.
        target: what the name stands for.
        arguments: the spec's own.
    """

    spec: Spec
    flag: str
    name: str
    target: Callable[..., T]
    arguments: dict[str, Any]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.target).parameters

    @property
    def takes_any(self) -> bool:
        """Whether the target has a `**kwargs`."""
        return any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())

    def signature(self, hidden: Mapping[str, Any] | None = None) -> str:
        """Returns "required, optional=1, long=…" without the `hidden` parameters, or "none"."""
        shown = []
        for name, p in self.parameters.items():
            if name in (hidden or {}) or p.kind is p.VAR_POSITIONAL:
                continue
            if p.kind is p.VAR_KEYWORD:
                shown.append(f"**{name}")
            elif p.default is p.empty:
                shown.append(name)
            else:
                default = repr(p.default)
                shown.append(f"{name}={default if len(default) <= 24 and '<' not in default else '…'}")
        return ", ".join(shown) or "none"

    def call(self, fixed: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> T:
        """Calls the target with the spec's arguments and the caller's.

        Args:
            fixed: arguments that the spec may not set.
            defaults: arguments that the spec may override, used where the target has the parameter.

        Raises:
            UserError: an unknown, missing or invalid argument; the message shows the signature.
        """
        takes = f"it takes {self.signature(hidden=fixed)}"
        if taken := sorted(set(self.arguments) & set(fixed)):
            raise UserError(f"{self.flag} {self.name}: {taken[0]!r} is set by the program, leave it out; {takes}")
        if (unknown := sorted(set(self.arguments) - set(self.parameters))) and not self.takes_any:
            raise UserError(f"{self.flag} {self.name}: unknown argument {unknown[0]!r}; {takes}")
        usable = {name: value for name, value in (defaults or {}).items() if name in self.parameters}
        try:
            return self.target(**{**usable, **fixed, **self.arguments})
        except (TypeError, ValueError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
            raise UserError(f"{self.flag} {str(self.spec)!r}: {one_line(error)}; {takes}") from None


def parse(spec: Spec | str, flag: str) -> tuple[str, dict[str, Any]]:
    """Splits a spec into its name and its arguments.

    Raises:
        UserError: anything but a name and keyword arguments with literal values.
    """
    text = spec.text if isinstance(spec, Spec) else spec
    if not isinstance(text, str):  # a damaged file may hold anything
        raise UserError(f"{flag} {text!r}: expected a string")
    if match := SPEC.fullmatch(text):
        try:
            call = ast.parse(f"f{match[2].strip() or '()'}", mode="eval").body
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
                arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
                if len(arguments) == len(call.keywords):  # neither a **mapping nor the same keyword twice
                    return match[1], arguments
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
            pass
    raise UserError(f"{flag} {text!r}: expected a name or name(key=value, …) with plain values")


def resolve(spec: Spec | str, table: Table[T], flag: str, allowlist: Allowlist = NOTHING) -> ResolvedSpec[T]:
    """Looks a spec's name up in the table, or imports it if the spec may.

    Args:
        spec: a plain string is untrusted.
        flag: names the spec's origin in messages.
        allowlist: what an untrusted spec may import.

    Raises:
        UserError: an unknown name, a missing package, or an untrusted spec that names anything else.
    """
    spec = spec if isinstance(spec, Spec) else Spec(spec)
    name, arguments = parse(spec, flag)
    module, colon, _ = name.partition(":")
    if not colon and name not in table:
        raise UserError(f"{flag} {name!r}: unknown name; available: {', '.join(sorted(table))}")
    is_checked = bool(colon) and not spec.trusted
    refusal = UserError(
        f"{flag} {str(spec)!r} comes from a file, not from the command line; such a spec may only name "
        f"{', '.join([*table, *(f'{allowed}:…' for allowed in allowlist.modules)])}, with plain arguments; "
        f"if you trust it, give {flag} on the command line as well"
    )
    # Before anything is imported.
    named = {key: value for key, value in arguments.items() if colon and allowlist.names_class(value)}
    plain = [value for key, value in arguments.items() if key not in named]
    if is_checked and not (module in allowlist.modules and all(map(_is_plain, plain))):
        raise refusal
    entry: Callable[..., T] | str = name if colon else table[name]
    target = load(entry, f"{flag} {name}", "" if colon else name) if isinstance(entry, str) else entry
    arguments.update({key: allowlist.class_of(value, f"{flag} {name}") for key, value in named.items()})
    resolved = ResolvedSpec[T](spec=spec, flag=flag, name=name, target=target, arguments=arguments)
    if is_checked:
        if not allowlist.admits(target, module.partition(".")[0]):
            raise refusal
        present = allowlist.overrides.keys() & {*arguments, *resolved.parameters}
        arguments.update({name: allowlist.overrides[name] for name in present})
    return resolved


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return not isinstance(value, str | bytes) or (isinstance(value, str) and PLAIN_TEXT.fullmatch(value) is not None)


def build(spec: Spec | str, table: Table[T], flag: str, allowlist: Allowlist = NOTHING, **fixed: Any) -> T:
    """Resolves a spec and calls it with its own arguments and `fixed`. Raises UserError as both steps do."""
    return resolve(spec, table, flag, allowlist).call(fixed)


def load(path: str, flag: str, extra: str) -> Any:
    """Imports "package.module:name" on demand.

    Args:
        flag: what requests the import, for messages.
        extra: the group of optional dependencies in pyproject.toml that it needs; "" for none.

    Raises:
        UserError: no such module, or a missing package; the message names what to install.
    """
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        missing = error.name or ""
        if missing and f"{module}.".startswith(f"{missing}.") and missing not in INSTALL:
            raise UserError(f"{flag}: there is no module {missing}") from None
        reason = f"needs {missing}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        package = f"'.[{extra}]'" if extra else INSTALL.get(missing.partition(".")[0], "")
        raise UserError(f"{flag}: {reason}{f'; pip install {package}' if package else ''}") from None
    except Exception as error:  # e.g. torchvision with a mismatched torch: RuntimeError
        raise UserError(f"{flag}: cannot import {module} ({type(error).__name__}: {one_line(error)})") from None
    target: Any = getattr(imported, name, None)
    try:
        inspect.signature(target)
    except (TypeError, ValueError):  # not callable, or a builtin without a signature
        classes = [key for key, value in vars(imported).items() if inspect.isclass(value) and key[0] != "_"]
        close = ", ".join(difflib.get_close_matches(name, {*classes} - {name}, n=3))
        raise UserError(f"{flag}: {module} has no callable {name}{close and f'; similar: {close}'}") from None
    return target
