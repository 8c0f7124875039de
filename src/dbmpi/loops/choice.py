"""The rule that a user chooses: by name with settings, or as an object."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from dbmpi.config import OptimizerSection, explain
from dbmpi.errors import UserError, suggestion
from dbmpi.paramserver import rules
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.schedule import Schedule


def choose(chosen: str | Rule, settings: dict[str, Any]) -> Rule:
    """Return the rule of a name, with its settings in the units of ``[optimizer]``, or the object that was given.

    Parameters
    ----------
    chosen
        A name or a rule.
    settings
        For a rule by name.

    Raises
    ------
    UserError
        If there is no such rule or setting.
    """
    if not isinstance(chosen, str):
        if not all(hasattr(chosen, name) for name in ("init", "apply", "state_names")):
            raise UserError(f"ParameterServer: rule is a {type(chosen).__name__}: expected a name or a rule object")
        if settings:
            raise UserError(f"ParameterServer: {', '.join(settings)}: a rule object has its settings already")
        return chosen
    try:
        rule = rules.rule(OptimizerSection.model_validate({"rule": chosen, **settings}))
    except ValidationError as error:
        raise UserError(explain(error, OptimizerSection, "ParameterServer", {"rule": chosen, **settings})) from None
    # Schedules count samples, of which a loop of a user's own says nothing.
    known: list[str] = [field.name for field in fields(rule) if field.name != "schedule"] if is_dataclass(rule) else []
    for name in settings:
        if name not in known:
            raise UserError(f"ParameterServer: the rule {chosen!r} has no {name!r}; {suggestion(name, known)}")
    return rule


def written(rule: Rule) -> str:
    """Return a `rule` as text, the same for equal rules; one of dbmpi's own can be read again by `read`."""
    name = type(rule).__name__
    if type(rule).__module__ == rules.__name__ and is_dataclass(rule):
        return json.dumps([name, asdict(rule)])
    return json.dumps([f"{type(rule).__module__}.{type(rule).__qualname__}", None])


def read(text: str) -> Rule:
    """Return the rule that `written` has made a text of.

    Parameters
    ----------
    text
        Of another rank.

    Raises
    ------
    UserError
        If the rule is the user's own.
    """
    name, settings = json.loads(text)
    if settings is None:
        raise UserError(
            f"ParameterServer: the shards of dbmpi.serve know dbmpi's own rules alone, not {name}; leave serve out and "
            "make the ParameterServer on all ranks"
        )
    rule: Rule = getattr(rules, name)(**settings | {"schedule": Schedule(**settings["schedule"])})
    return rule
