"""What ``dbmpi inspect`` prints: lines of text from the dictionaries of :mod:`dbmpi.checkpoint.summary`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dbmpi.cli.tables import printable, table

_NAMES_SHOWN = 20


def lines(found: dict[str, Any], everything: bool = False) -> Iterator[str]:
    """Yield the lines about what was `found`; with `everything`, settings that have their defaults are shown, too."""
    if found["kind"] == "run":
        yield from _run_lines(found, everything)
    elif found["kind"] == "checkpoint":
        yield from _checkpoint_lines(found, everything)
    elif found["kind"] == "comparison":
        yield from _comparison_lines(found)
    else:
        yield f"{printable(found['path'])}  ({_size(found['bytes'])})"
        for name, value in found.get("attributes", {}).items():
            yield f"  {printable(name)} = {printable(value)}"
        yield ""
        yield from _array_lines(found["arrays"])


def _run_lines(found: dict[str, Any], everything: bool) -> Iterator[str]:
    yield f"{printable(found['path'])}"
    if found["notice"]:
        yield f"  note: {printable(found['notice'], 500)}"
    whole = [brief for brief in found["checkpoints"] if "unreadable" not in brief]
    other_step = any(brief["test_step"] not in (0, brief["step"]) for brief in whole)
    rows = []
    for brief in whole:
        marks = [mark for mark in ("latest", "best") if found[mark] == brief["name"]]
        at = f"{brief['test_step']:,}" if brief["test_step"] else "-"
        rows.append(
            [
                brief["name"],
                _time(brief["created"]),
                f"{brief['step']:,}",
                f"{brief['samples']:,}",
                _size(brief["bytes"]),
                *_progress(brief).values(),
                *([at] if other_step else []),
                ", ".join(marks),
            ]
        )
    heading = ["", "written", "step", "samples", "size", "loss", "accuracy", "held-out loss", "accuracy"]
    if rows:
        yield from table([*heading, *(["at step"] if other_step else []), ""], rows, left=(0, 1, len(rows[0]) - 1))
    for brief in found["checkpoints"]:
        if "unreadable" in brief:
            yield f"  {brief['name']}  cannot be read: {printable(brief['unreadable'])}"
    if found["lost"]:
        from dbmpi.monitor.history import LostReplica

        yield f"  lost: {'; '.join(str(LostReplica(**lost)) for lost in found['lost'])}"
    for one in found["ends"]:
        yield f"  ended early: session {one['session']}, step {one['step']:,}: {printable(one['reason'], 500)}"
    if found["withheld"]:
        yield f"  withheld: {found['withheld']:,} (pushes of gradients that were not finite)"
    if found["discarded"]:
        yield f"  stale: {found['discarded']:,} (pushes that shards have dropped)"
    yield ""
    yield from _checkpoint_lines(found["newest"], everything)


def _progress(brief: dict[str, Any]) -> dict[str, str]:
    """Return the four numbers that say how good a checkpoint is; a dash for each that is not known."""
    return {
        "loss": _number(brief["loss"]),
        "accuracy": _percent(brief["accuracy"]),
        "held-out loss": _number(brief["test_loss"]),
        "held-out accuracy": _percent(brief["test_accuracy"]),
    }


def _checkpoint_lines(found: dict[str, Any], everything: bool) -> Iterator[str]:
    learned = found["frontier"] - len(found["holes"])
    stream = f"{learned:,} of {found['total']:,} batches learned"
    if found["holes"]:
        stream += f"; missing before batch {found['frontier']:,}: {_list(found['holes'])}"
    from_loop = found["total"] == 0  # of a user's own, which has no stream of batches
    written = " on ".join(filter(None, (found["user"], found["host"])))
    data = " ".join(filter(None, (found["data_name"], f"({found['data_samples']:,} samples)")))
    facts = {
        "created": _time(found["created"]) + (f" by {written}" if written else ""),
        "step": f"{found['step']:,}",
        "samples": f"{found['samples']:,}",
        **({} if found["seconds"] is None else {"trained": f"{found['seconds']:,.1f} s"}),
        **{name: text for name, text in _results(found).items() if text},
        **({} if from_loop else {"stream": stream, "per replica": _list(found["done"])}),
        "topology": f"{_count(found['shards'], 'shard')}, {_count(found['replicas'], 'replica')} "
        f"of {_count(found['partitions'], 'partition')}",
        "versions": _list(found["shard_versions"]),
        **({"data": data} if found["data_name"] else {}),
        **({} if from_loop else _samples(found)),
        "parameters": f"{found['parameters']:,}",
        "checksums": "compared with all that was read" if found["verified"] else "none, as in the format's version 1",
        "libraries": ", ".join(f"{name} {text}" for name, text in found["libraries"].items()),
    }
    yield f"{printable(found['path'])}  ({_size(found['bytes'])})"
    for name, text in facts.items():
        yield f"  {name:<12} {printable(text, 500)}"
    for name, value in (found["meaning"] or {}).items():
        yield f"  {name.replace('_', ' '):<12} {printable(value)}"
    yield from _setting_lines(found["configuration"], found["chosen"], everything)
    yield ""
    yield from _array_lines(found["arrays"])


def _results(found: dict[str, Any]) -> dict[str, str]:
    """Return what is known of how well the network does."""
    held_out = {"loss": found["test_loss"], "accuracy": found["test_accuracy"], **found["test_metrics"]}
    then = f", at step {found['test_step']:,}" if found["test_step"] not in (0, found["step"]) else ""
    return {
        "learned": _measures({"loss": found["loss"], "accuracy": found["accuracy"]}),
        "held-out": measured + then if (measured := _measures(held_out)) else "",
    }


def _measures(numbers: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {_percent(value) if name == 'accuracy' else _number(value)}"
        for name, value in numbers.items()
        if value is not None
    )


def _setting_lines(configuration: Any, chosen: Sequence[str] | None, everything: bool) -> Iterator[str]:
    """Yield the settings that the user has chosen, then how many there are beside them, or these as well."""
    from dbmpi.config.defaults import settings

    every, own = list(settings(configuration)), set(chosen or ())
    if chosen is None:
        yield "  configuration"
        yield from (f"    {printable(key)} = {printable(value)}" for key, value in every)
        return
    yield "  settings"
    yield from (f"    {printable(key)} = {printable(value)}" for key, value in every if key in own)
    others = [(key, value) for key, value in every if key not in own]
    if everything:
        yield "  defaults"
        yield from (f"    {printable(key)} = {printable(value)}" for key, value in others)
    else:
        yield f"    ({_count(len(others), 'other')} at their defaults: --all)"


def _samples(found: dict[str, Any]) -> dict[str, str]:
    targets = f"{found['classes']} classes" if found["classes"] else "values"
    return {"inputs": _shape(found["input_shape"]), "targets": targets}


def _array_lines(arrays: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line an array, under a heading; numbers in columns."""
    if not arrays:
        yield "no arrays"
        return
    rows, below, estimated = [], [], False
    for array in arrays:
        row = [printable(array["name"]), _shape(array["shape"]), printable(array["dtype"])]
        if "not_read" in array:
            row.append(array["not_read"])
        else:
            percentiles = [_number(value) for value in array["percentiles"].values()]
            if not array["percentiles_exact"]:
                percentiles = [f"~{value}" for value in percentiles]
                estimated = True
            numbers = [_number(array[key]) for key in ("min", "max", "mean", "std")]
            share = _share(array["zeros"], math.prod(array["shape"]))
            row += [numbers[0], *percentiles, *numbers[1:], share, f"{array['non_finite'] or 'none'}"]
        rows.append(row)
        below.append([f"    {printable(key)} = {printable(v)}" for key, v in array.get("attributes", {}).items()])
    names = ["min", "1 %", "median", "99 %", "max", "mean", "std", "zeros", "non-finite"]
    heading, *shown = table(["", "shape", "dtype", *names], rows, left=(0, 1, 2))
    yield heading
    for line, attributes in zip(shown, below, strict=True):
        yield line
        yield from attributes
    if estimated:
        yield "  ~ within 1 % of itself, from a histogram"


def _comparison_lines(found: dict[str, Any]) -> Iterator[str]:
    then, now = found["then"], found["now"]
    yield f"then  {printable(then['path'])}  ({_size(then['bytes'])})"
    yield f"now   {printable(now['path'])}  ({_size(now['bytes'])})"
    for notice in found["notices"]:
        yield f"  note: {printable(notice, 500)}"
    yield ""
    facts = [
        {
            "created": _time(one["created"]),
            "step": f"{one['step']:,}",
            "samples": f"{one['samples']:,}",
            "parameters": f"{one['parameters']:,}",
            **_progress(one),
        }
        for one in (then, now)
    ]
    rows = [[name, text, facts[1][name]] for name, text in facts[0].items() if {text, facts[1][name]} != {"-"}]
    yield from table(["", "then", "now"], rows, left=(0, 1, 2))
    yield ""
    rows = [[printable(each["key"]), _setting(each["then"]), _setting(each["now"])] for each in found["settings"]]
    yield from table(["settings", "then", "now"], rows, left=(0, 1, 2)) if rows else ["  the settings are the same"]
    yield ""
    yield from _layer_lines(found["layers"])
    for which, text in (("only_then", "only then"), ("only_now", "only now")):
        if names := found[which]:
            more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
            yield f"  {text}: {', '.join(map(printable, names[:_NAMES_SHOWN]))}{more}"
    for each in found["shapes"]:
        yield f"  not compared: {printable(each['name'])}, {_shape(each['then'])} then and {_shape(each['now'])} now"


def _layer_lines(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line a layer, and below it one for each of its arrays."""
    rows = []
    for layer in layers:
        arrays = layer["arrays"]
        alone = len(arrays) == 1
        rows += [[printable(arrays[0]["name"] if alone else layer["name"]), *_changes(arrays[0] if alone else layer)]]
        rows += [
            ["  " + printable(array["name"][len(layer["name"]) + 1 :]), *_changes(array)]
            for array in arrays
            if not alone
        ]
    if not rows:
        yield "  no array is in both"
        return
    heading = ["", "elements", "update/weight", "largest change", "at", "changed", "zeros then", "now", "non-finite"]
    yield from table(heading, rows, left=(0, 4))


def _changes(numbers: dict[str, Any]) -> list[str]:
    if "damaged" in numbers:
        return ["", "damaged"]
    size, change = numbers["size"], numbers["largest_change"]
    at = ", ".join(map(str, numbers.get("largest_change_at", ())))
    return [
        f"{size:,}",
        _number(numbers["update_to_weight"]),
        "0" if change == 0 else f"{change:+.4g}" if change is not None else "-",
        f"({at})" if at else "",
        _share(numbers["changed"], size),
        *(_share(zeros, size) for zeros in numbers["zeros"]),
        f"{numbers['non_finite'] or 'none'}",
    ]


def _setting(value: Any) -> str:
    return "-" if value is None else printable(value, 60)


def _time(text: str) -> str:
    return printable(text[:19].replace("T", " ")) + " UTC"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _share(count: int, size: int) -> str:
    """Return a share of elements: none and all mean just that."""
    if count in (0, size):
        return "none" if count == 0 else "all"
    return f"{min(max(100 * count / size, 0.01), 99.99):.2f} %"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape) or "one number"


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:8]) or "none"
    return shown + (f", ... ({len(numbers):,} in all)" if len(numbers) > 8 else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
