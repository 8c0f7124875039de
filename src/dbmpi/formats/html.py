"""HTML in which whatever is not made here is escaped: no text of strangers can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup, as opposed to text; made by :func:`tag` only."""

    __slots__ = ()


_VOID = ("br", "img", "meta", "hr")


def tag(name: str, *children: object, **attributes: object) -> Html:
    """Return an element.

    Parameters
    ----------
    name
        Of the element.
    children
        What is in it: other elements stay as they are, everything else is escaped.
    attributes
        Their values are escaped; an underscore at the end of a name is left out, and the others are hyphens.  True is
        an attribute without a value, False and None none at all.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        called = key.rstrip("_").replace("_", "-")
        parts.append(called if value is True else f'{called}="{_escaped(value)}"')
    start = f"<{' '.join(parts)}>"
    if name in _VOID:
        return Html(start)
    return Html(f"{start}{''.join(map(text, children))}</{name}>")


def text(value: object) -> Html:
    """Return a value as markup: elements as they are, everything else as escaped text.

    Parameters
    ----------
    value
        Anything.
    """
    return value if isinstance(value, Html) else Html(_escaped(value))


def table(heading: Sequence[object], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,)) -> Html:
    """Return a table that can be scrolled sideways where it is wider than the page.

    Parameters
    ----------
    heading
        Names of the columns.
    rows
        The cells.
    left
        Columns that are aligned on the left.
    """
    classes = ["left" if column in left else None for column in range(len(heading))]
    head = tag("tr", *(tag("th", name, class_=one, scope="col") for name, one in zip(heading, classes, strict=True)))
    body = (tag("tr", *(tag("td", cell, class_=one) for cell, one in zip(row, classes, strict=True))) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0)


def _escaped(value: object) -> str:
    """Return a value as text in which nothing is markup, and nothing cannot be printed."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in str(value)
    )
    return html.escape(shown, quote=True)
