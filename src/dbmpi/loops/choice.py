"""The rule that a user chooses: by name with settings, or as an object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from dbmpi.config import OptimizerSection, explain
from dbmpi.errors import UserError, suggestion
from dbmpi.paramserver import rules
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.schedule import Schedule

_IN_SAMPLES = {"warmup_samples": "warmup_epochs", "decay_samples": "decay_epochs"}
"""Settings of schedules, and their names in ``[optimizer]``, which counts in epochs."""
_CONSTANT = Schedule()


def choose(chosen: str | Rule, settings: dict[str, Any]) -> Rule:
    """Return the rule of a name, with its settings as in ``[optimizer]``, or the object that was given.

    Schedules have ``warmup_samples`` and ``decay_samples``, as a loop of a user's own has no epochs.

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
    described = {"rule": chosen, **{_IN_SAMPLES.get(name, name): value for name, value in settings.items()}}
    if settings.get("schedule") == "cosine" and "decay_samples" not in settings:
        raise UserError("ParameterServer: schedule = 'cosine' needs decay_samples, after which the rate stays as it is")
    try:
        rule = rules.rule(OptimizerSection.model_validate(described))
    except ValidationError as error:
        text = explain(error, OptimizerSection, "ParameterServer", described)
        for ours, theirs in _IN_SAMPLES.items():
            text = text.replace(f"optimizer.{theirs}", ours).replace(theirs, ours)
        raise UserError(text.replace("optimizer.", "").replace("the epochs", "the samples")) from None
    known: list[str] = [field.name for field in fields(rule)] if is_dataclass(rule) else []
    known += ["decay_factor", *_IN_SAMPLES]
    for name in settings:
        if name not in known:
            raise UserError(f"ParameterServer: the rule {chosen!r} has no {name!r}; {suggestion(name, known)}")
    return rule


def follows_schedule(rule: Rule) -> bool:
    """Return whether the learning rate of a `rule` depends on the samples that were learned from."""
    return getattr(rule, "schedule", _CONSTANT) != _CONSTANT


def mistake_in_state(rule: Rule, state: Any, parameters: np.ndarray) -> str:
    """Return what is wrong with the `state` that a `rule` has for `parameters` (n,), in words; empty if nothing is."""
    names = rule.state_names
    if not isinstance(state, Mapping) or set(state) != set(names):
        given = sorted(state, key=str) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        return f"its state is {given}: expected a dict of arrays with the names in state_names, {list(names)}"
    expected = f"an array of {parameters.dtype} of shape {parameters.shape}"
    for name, array in state.items():
        if not isinstance(array, np.ndarray):
            found = f"a {type(array).__name__}"
        elif (array.dtype, array.shape) != (parameters.dtype, parameters.shape):
            found = f"an array of {array.dtype} of shape {array.shape}"
        elif not array.flags.carray:
            found = "read-only or not contiguous"
        else:
            continue
        return f"its state {name!r} is {found}: expected {expected} for parameters like that, e.g. numpy.zeros_like"
    return ""


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
