"""``dbmpi data``: data files made from other formats, checked, described, split and normalised."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.data.importers.table import IMPORTERS, Importer
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.data.importers.reading import Progress
    from dbmpi.data.reading import Reading
    from dbmpi.data.source import Source

SUMMARY = "make data files from other formats; check, describe, split and normalise them"
_MEMORY_MIB = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to `parser`: those of its actions, and those that the importers declare."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "make a data file from another format"
    kinds = actions.add_parser("import", help=text, description=text).add_subparsers(
        title="kinds", metavar="KIND", required=True
    )
    for importer in IMPORTERS:
        summary = importer.summary
        _add(kinds.add_parser(importer.kind, help=summary, description=f"Make a data file from {summary}."), importer)
    _add_check(actions)
    _add_describe(actions)
    _add_split(actions)
    _add_normalize(actions)


def run(arguments: argparse.Namespace) -> int:
    """Do what the parsed `arguments` say, print what was done, and return the exit code."""
    return int(arguments.action(arguments))


def _import(arguments: argparse.Namespace) -> int:
    options = {name: getattr(arguments, name) for name in arguments.parameters}
    with _progress("importing") as progress:
        written = arguments.importer.load()(**options, progress=progress)
    for each in written if isinstance(written, list) else [written]:
        print(each, flush=True)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Say whether `train` would take the data: everything is read that it would read."""
    reading, section = _reading(arguments)
    with _opened(arguments, reading) as source:
        source.validate(full=True, inputs=True)
        if section is not None:
            _check_network(arguments, source, section)
        for note in source.notes:
            print(f"{'note':>8}  {note}")
        shape = " x ".join(map(str, source.input_shape))
        kind = f"{source.classes} classes" if source.classes else f"{source.target_size} values a sample"
        targets = kind if source.has_targets else "no targets"
        what = "the run" if section is not None else "a run"
        print(f"{source.path}: {what} would take it: {source.samples:,} samples of {shape}, {targets}")
    return 0


def _check_network(arguments: argparse.Namespace, source: Source, section: Any) -> None:
    """Compare the data with the network of a configuration."""
    from dbmpi.cli import options
    from dbmpi.network import own

    network = section.network
    if not network.layers:
        return
    load = own.from_files(arguments.allow_code)
    made = options.make_network(network, section.data, section.run.seed, source.input_shape, load)
    if network.loss != "reconstruction":
        if not source.has_targets:
            raise UserError(f"{source.path}: has no targets, but the loss {network.loss!r} needs some")
        source.expect(made.outputs, network.loss)


def _describe(arguments: argparse.Namespace) -> int:
    from dbmpi.data.survey import Survey

    reading, _ = _reading(arguments)
    with _opened(arguments, reading) as source, _progress("reading") as progress:
        survey = Survey.of(source, progress)
        if arguments.plot is not None:
            from dbmpi.data import sheet

            sheet.draw(arguments.plot, survey)
        if arguments.json:
            print(json.dumps(survey.summary(), indent=2, allow_nan=False))
            return 0
    print(f"{'data':>10}  {arguments.data}")
    for of, text in survey.lines():
        print(f"{of:>10}  {text}")
    if arguments.plot is not None:
        print(f"\n{arguments.plot}")
    return 0


def _split(arguments: argparse.Namespace) -> int:
    import numpy as np

    from dbmpi.data import division
    from dbmpi.data.groups import groups_of

    fraction, named = arguments.fraction, arguments.hold_out
    if (fraction is None) == (named is None):
        raise UserError("data split: expected either --fraction, e.g. 0.2, or --hold-out with the names of groups")
    reading, _ = _reading(arguments)
    with _opened(arguments, reading, required=True) as source, _progress("writing") as progress:
        by = "group" if named is not None else arguments.by
        names, owners = groups_of(source, arguments.group) if by == "group" else ((), np.empty(0, np.int32))
        if by == "group" and not names:
            raise UserError(f"{source.path}: does not say whose each sample is; name a dataset that does with --group")
        if named is not None:
            unknown = [name for name in named if name not in names]
            if unknown:
                some = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
                raise UserError(f"{source.path}: has no group {unknown[0]!r}; expected some of {some}")
            test = np.isin(owners, [names.index(name) for name in named])
        elif by == "group":
            test = division.by_group(owners, fraction, arguments.seed)
        elif by == "class":
            if source.classes is None:
                raise UserError(f"{source.path}: its targets are no classes; say --by sample, or --by group")
            classes = np.concatenate([block for block, _ in source.answers()])
            test = division.by_class(classes, fraction, arguments.seed)
        else:
            test = division.at_random(source.samples, fraction, arguments.seed)
        outs = [arguments.out, arguments.test_out]
        written = division.divide(source, test, outs, group=arguments.group, force=arguments.force, seen=progress)
    for each in written:
        print(each, flush=True)
    return 0


def _normalize(arguments: argparse.Namespace) -> int:
    from dbmpi.data import normalized

    reading, _ = _reading(arguments)
    with _opened(arguments, reading) as source, _progress("reading") as progress:
        path, dataset = normalized.inputs_in_file(source)
        found = normalized.measured(source, arguments.by, progress)
    out = path if arguments.out is None else arguments.out
    normalized.write(path, dataset, found, out, arguments.force)
    constant = f"; {found.constant:,} never vary and are not divided" if found.constant else ""
    numbers = {"input": "each input", "channel": "each channel", "all": "all inputs"}[found.by]
    print(f"{out}: normalised by mean and deviation of {numbers}{constant}")
    return 0


def _opened(arguments: argparse.Namespace, reading: Reading, *, required: bool = False) -> Source:
    from dbmpi.data.source import Source

    return Source.open(arguments.data, _MEMORY_MIB, "required" if required else "optional", reading, keep=False)


def _reading(arguments: argparse.Namespace) -> tuple[Reading, Any]:
    """Return how to read the data, and the configuration if there is one."""
    from dataclasses import replace

    from dbmpi.config import DataSection, NetworkSection
    from dbmpi.config.reading import read
    from dbmpi.data.reading import Reading

    given = {name: getattr(arguments, name) for name in ("inputs", "targets", "missing", "channels")}
    asked = {name: value for name, value in given.items() if value is not None}
    config = getattr(arguments, "config", None)
    if config is None:
        return replace(Reading.of(DataSection(**asked), NetworkSection()), own=False, wanted="any"), None
    section = read(config)
    data = section.data.model_copy(update=asked)
    return Reading.of(data, section.network), section


def _add(parser: argparse.ArgumentParser, importer: Importer) -> None:
    alternatives = None
    parameters = ["force"]
    for argument in importer.arguments:
        if argument.alternative:
            alternatives = alternatives or parser.add_mutually_exclusive_group()
        target = alternatives if argument.alternative and alternatives else parser
        parameters.append(target.add_argument(argument.name, **argument.settings).dest)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(importer=importer, parameters=parameters, action=_import)


def _action(actions: Any, name: str, text: str, action: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add an action that reads data."""
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument("data", type=Path, metavar="DATA", help="a data file, a pattern of some, or FILE.h5:/group")
    for part in ("inputs", "targets"):
        parser.add_argument(f"--{part}", metavar="NAME", help=f"name of the dataset with the {part} (default: {part})")
    parser.add_argument("--missing", type=float, metavar="NUMBER", help="value to use where an input is missing")
    parser.add_argument("--channels", choices=("first", "last"), help="where the channels of an image are")
    parser.set_defaults(action=action)
    return parser


def _add_check(actions: Any) -> None:
    parser = _action(actions, "check", "say whether 'train' would take some data", _check)
    parser.add_argument("--config", type=Path, metavar="CONFIG.toml", help="the run that is to learn from them")
    from dbmpi.cli import options

    options.add_allow_code(parser)


def _add_describe(actions: Any) -> None:
    parser = _action(actions, "describe", "show ranges, gaps and the balance of the classes of some data", _describe)
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw some samples and distributions (also .pdf or .svg)"
    )


def _add_split(actions: Any) -> None:
    parser = _action(actions, "split", "divide data into a file to learn from and one to test on", _split)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.h5", help="file to learn from")
    parser.add_argument("--test-out", type=Path, required=True, metavar="FILE.h5", help="file to test on")
    parser.add_argument("--fraction", type=_fraction, metavar="NUMBER", help="how many are to test on, e.g. 0.2")
    parser.add_argument(
        "--by",
        choices=("sample", "class", "group"),
        default="sample",
        help="draw samples (default), as many of each class, or whole groups",
    )
    parser.add_argument("--group", metavar="NAME", help="dataset that says whose each sample is (default: groups)")
    parser.add_argument(
        "--hold-out", type=_names, metavar="NAME,...", help="groups to test on, e.g. speakers, instead of --fraction"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def _add_normalize(actions: Any) -> None:
    parser = _action(
        actions,
        "normalize",
        "note in a training file the means and deviations its inputs are normalised by",
        _normalize,
    )
    parser.add_argument(
        "--by",
        choices=("input", "channel", "all"),
        help="what has a mean of its own (default: each input; each channel of images with channels; all of others)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.h5", help="write a copy instead of replacing the file")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return number


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """Show a bar on a terminal; elsewhere the lines at the end are enough."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
