"""Descriptions of runs with mistakes, and with settings that are merely unusual: of every section and every kind."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
from parallel import tiny
from pydantic import BaseModel

from dbmpi.config import LAYERS, Run

Random = np.random.Generator
NUMBERS = (0, 1, 2, 3, 5, 7, 10, 40, 41, -1, -7, 2**31, 2**53, 2**53 + 1, 2**63, 10**30)
FLOATS = (0.0, 0.5, 0.999, 1.0, 1.5, -0.1, 1e-12, 1e12, 1e308, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    "x",
    "a/b",
    "/dev/null",
    "/proc/none",
    "no such",
    "auto",
    "none",
    "ü\u0000",
    "x" * 3000,
    "os:system",
    "../x",
)
ODD: tuple[Any, ...] = (True, False, [], [1, 2], ["a"], {}, {"a": 1}, [[1]], {"a": {"b": [1]}})
MOST_CHANGES = 3


def base(place: Path, random: Random) -> dict[str, Any]:
    """Return a description that is right, as tables."""
    layers = [
        [dict(layer) for layer in tiny.LAYERS],
        [{"units": 4, "activation": "relu"}, {"type": "dropout", "rate": 0.2}, {"units": tiny.CLASSES}],
        [{"units": tiny.CLASSES}],
    ][random.integers(3)]
    optimizer = {"learning_rate": 0.1, "batch_size": int(random.choice([6, 20])), "epochs": 2}
    if random.random() < 0.3:
        optimizer["method"] = "sandblaster"
    return {
        "run": {"directory": str(place / "run"), "seed": 3},
        "data": {"train": str(place / "train.h5"), "test": str(place / "test.h5")},
        "network": {"layers": layers},
        "optimizer": optimizer,
        "monitor": {"progress": "none"},
    }


def settings() -> list[tuple[str, str, Any]]:
    """Return section, key and type of every setting, those of layers with the section ``layers``."""
    found = []
    for name, field in Run.model_fields.items():
        for part in _models(field.annotation):
            found += [(name, key, inner.annotation) for key, inner in part.model_fields.items() if key != "layers"]
    for layer in LAYERS:
        found += [("layers", key, inner.annotation) for key, inner in layer.model_fields.items()]
    return found


def mutated(place: Path, random: Random) -> tuple[str, str]:
    """Return the text of a configuration with some changes, and what they are."""
    table = base(place, random)
    told = [_change(table, random) for _ in range(random.integers(1, MOST_CHANGES + 1))]
    text = toml(table)
    if random.random() < 0.1:
        text, what = _tear(text, random)
        told.append(what)
    return text, "; ".join(told)


def _change(table: dict[str, Any], random: Random) -> str:
    """Change one setting of a table; return what."""
    if random.random() < 0.08:
        section = str(random.choice([*table, "optimiser", "topolgy", ""]))
        value = _value(random, Any)
        table[section] = value
        return f"{section} = {value!r:.60}"
    section, key, kind = SETTINGS[random.integers(len(SETTINGS))]
    if random.random() < 0.05:
        key += "s"
    value = _value(random, kind)
    if section != "layers":
        entry = table.setdefault(section, {})
        if not isinstance(entry, dict):
            return "nothing"
        if random.random() < 0.1 and entry:
            key = str(random.choice(list(entry)))
            del entry[key]
            return f"no {section}.{key}"
        entry[key] = value
        return f"{section}.{key} = {value!r:.60}"
    network = table.get("network")
    layers = network.get("layers") if isinstance(network, dict) else None
    if not isinstance(layers, list) or not layers or not isinstance(layers[0], dict):
        return "nothing"
    layers[random.integers(len(layers))][key] = value
    return f"layer's {key} = {value!r:.60}"


def _value(random: Random, kind: Any) -> Any:
    """Return a value for a setting: often one of its type, also one that is allowed, and otherwise anything."""
    choices = _literals(kind)
    draw = random.random()
    if choices and draw < 0.6:
        return choices[random.integers(len(choices))]
    pools: list[tuple[Any, ...]] = [NUMBERS, FLOATS, TEXTS, ODD]
    if draw < 0.85:
        likely = [pool for name, pool in (("int", NUMBERS), ("float", FLOATS), ("str", TEXTS)) if name in str(kind)]
        likely += [(True, False)] if "bool" in str(kind) else []
        pools = likely or pools
    pool = pools[random.integers(len(pools))]
    return pool[random.integers(len(pool))]


def _literals(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [value for inner in typing.get_args(kind) for value in _literals(inner)]


def _models(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for inner in typing.get_args(kind) for model in _models(inner)]


def _tear(text: str, random: Random) -> tuple[str, str]:
    """Damage the text itself."""
    place = int(random.integers(len(text)))
    match random.integers(4):
        case 0:
            return text[:place], f"cut at {place}"
        case 1:
            return text[:place] + str(random.choice(list('"[]={}\n\t\\#.'))) + text[place:], f"a letter at {place}"
        case 2:
            return text + text[place:], "some of it twice"
        case _:
            return text[:place] + text[place + 1 :], f"one letter less at {place}"


def toml(table: dict[str, Any]) -> str:
    """Return tables as TOML, all in lines of ``key = value``."""
    lines = []
    for name, section in table.items():
        if isinstance(section, dict) and name:
            lines.append(f"[{_key(name)}]")
            lines += [f"{_key(key)} = {_toml(value)}" for key, value in section.items()]
        else:
            lines.insert(0, f"{_key(name)} = {_toml(section)}")
    return "\n".join(lines) + "\n"


def _key(text: str) -> str:
    return text if text.isidentifier() and text.isascii() else _toml(text)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\0", "\\u0000")
        return f'"{escaped}"'
    return repr(value)


SETTINGS = settings()
