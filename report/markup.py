"""HTML without a template: whatever is not `Html` already is escaped, so that no name from a file becomes a tag."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Where there is no value to tell.
NOTHING = "n/a"


class Html(str):
    """Markup that this package has made."""


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """<name attributes>content</name>; `class_` and `aria_label` stand for class and aria-label; None: left out."""
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
    """A table that scrolls inside its own box; the first cell of a row names it, numbers stand to the right.

    The box takes the keyboard's focus, so that it can be scrolled without a mouse.
    """
    heading = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    whole = tag("table", tag("thead", heading), tag("tbody", *body), aria_label=caption)
    box = tag("div", whole, class_=f"box {class_}".strip(), tabindex="0", role="region", aria_label=caption)
    return join([tag("p", caption, class_="soft"), box])  # no <caption>: a phone would scroll it away with the table


def pairs(entries: Iterable[tuple[object, object]], class_: str | None = None) -> Html:
    """A list of terms and what each is."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in entries), class_=class_)
