"""HTML without a template engine: everything that is not `Html` is escaped, so no name from a file becomes a tag."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Shown for a missing value.
NOTHING = "n/a"


class Html(str):
    """Markup made by this package."""


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """Returns `<name attributes>content</name>`.

    Args:
        attributes: `class_` and `aria_label` become class and aria-label; None leaves an attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta", "link"):
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def join(content: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content))


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    """Returns a table in a scrollable box; the first cell of each row is its heading.

    The box can take the keyboard focus, so that it scrolls without a mouse.
    """
    heading = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    element = tag("table", tag("thead", heading), tag("tbody", *body), aria_label=caption)
    box = tag("div", element, class_=f"box {class_}".strip(), tabindex="0", role="region", aria_label=caption)
    return join([tag("p", caption, class_="soft"), box])  # no <caption>: on a phone it would scroll with the table


def bullets(items: Iterable[object]) -> Html:
    """Returns an unordered list."""
    return tag("ul", *(tag("li", item) for item in items))


def pairs(entries: Iterable[tuple[object, object]], class_: str | None = None) -> Html:
    """Returns a list of terms with their values."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in entries), class_=class_)
