"""Write docs/command-line.md from the parsers in dbmpi.cli: usage and a table of arguments for each command.

Run it after a change there; a test compares the file with what this program would write.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from dbmpi.cli import main

TARGET = Path(__file__).parent.parent / "docs" / "command-line.md"
HEAD = """# Command line

`dbmpi COMMAND --help` prints the same. Every command ends with one of these exit codes, under each MPI:

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a failure: a loss is not finite, a rank failed, nothing could be written |
| 2 | a mistake in the arguments, the configuration, the data or the launch |
| 75 | a rank or host has died or does not answer; the same command goes on from the last checkpoint |
| 128 + n | ended by signal n, after writing a checkpoint |

*This page is written by `tools/write_command_line_docs.py` from the parsers of `dbmpi.cli`.*
"""
WIDTH = 100


def text() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name in main.COMMANDS:
        command = _below(main.build_parser([name]))[name]
        parts += _section(command, f"dbmpi {name}")
    return "\n".join(parts)


def _section(parser: argparse.ArgumentParser, words: str) -> Iterator[str]:
    """Yield the description of a command; of one with commands of its own, theirs."""
    below = _below(parser)
    if below:
        for name, child in below.items():
            yield from _section(child, f"{words} {name}")
        return
    yield f"## `{words}`\n"
    yield f"{_sentence(parser.description or '')}\n"
    yield f"```text\n{parser.usage or _usage(parser, words)}\n```\n"
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if arguments:
        yield "| argument | meaning |\n|---|---|"
        yield from (f"| {_names(action)} | {_meaning(action)} |" for action in arguments)
        yield ""


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def _sentence(summary: str) -> str:
    return summary[:1].upper() + summary[1:].rstrip(".") + "."


def _usage(parser: argparse.ArgumentParser, words: str) -> str:
    """Return the line of use, written here as argparse's differs from one Python to the next."""
    grouped = {id(action): group for group in parser._mutually_exclusive_groups for action in group._group_actions}
    options: list[str] = []
    positionals: list[str] = []
    shown = set()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or id(action) in shown:
            continue
        group = grouped.get(id(action))
        alike = [action] if group is None else group._group_actions
        shown.update(map(id, alike))
        word = " | ".join(_form(one) for one in alike)
        needed = action.required or (group is not None and group.required)
        (options if action.option_strings else positionals).append(word if needed else f"[{word}]")
    unbroken = " ".join(word.replace(" ", "\0") for word in [*options, *positionals])
    lines = textwrap.wrap(unbroken, WIDTH - len(words) - 1, break_on_hyphens=False)
    return (
        f"\n{' ' * (len(words) + 1)}".join([f"{words} {lines[0]}", *lines[1:]]).replace("\0", " ") if lines else words
    )


def _form(action: argparse.Action) -> str:
    """Return an argument as it is typed."""
    value = _value(action)
    return " ".join([*action.option_strings[:1], *([value] if value else [])])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    metavar = action.metavar if isinstance(action.metavar, str) else None
    if metavar is None:
        return action.dest.upper()
    return metavar


def _names(action: argparse.Action) -> str:
    value = _value(action)
    names: Sequence[str] = action.option_strings or [value]
    shown = ", ".join(names) + (f" {value}" if action.option_strings and value else "")
    return f"`{shown}`"


def _meaning(action: argparse.Action) -> str:
    meaning = " ".join(((action.help or "") % {"default": action.default, "prog": "dbmpi"}).split())
    return meaning.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
