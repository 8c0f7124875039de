"""Which settings of a stored description the user has chosen, and which have their default values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from dbmpi.config.sections import Run

_DEEPEST = 20


def settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a description as the dotted keys that ``--set`` takes, and their values.

    Parameters
    ----------
    value
        The description, of dictionaries and lists as in JSON.
    key
        What the keys begin with.
    """
    below = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) and value else None
    )
    if below is None or key.count(".") > _DEEPEST:
        yield key, value
        return
    for name, inner in below:
        yield from settings(inner, f"{key}.{name}" if key else str(name))


def chosen(text: str) -> set[str] | None:
    """Return the dotted keys of the settings that differ from the defaults; those of a layer's type always do.

    Parameters
    ----------
    text
        The description of a run, as JSON.

    Returns
    -------
    set of str or None
        None where the text is no description of a run that this version knows.
    """
    try:
        run = Run.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError):
        return None
    found = {f"network.layers.{number}.type" for number in range(len(run.network.layers))}
    return found | {
        key
        for key, _ in settings(run.model_dump(mode="json", exclude_defaults=True))
        if not _follows(run, *key.partition(".")[::2])
    }


def _follows(run: Run, section: str, key: str) -> bool:
    """Return whether a setting is what others make of its default, as the rule does of those of its own."""
    if "." in key:
        return False
    values = run.model_dump()
    if values.get(section) is None or values[section].pop(key, None) is None:
        return False
    try:
        return Run.model_validate(values) == run
    except ValidationError:
        return False
