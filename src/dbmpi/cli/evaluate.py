"""``dbmpi evaluate``: loss and accuracy of a trained network on a data file."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.objective import Outcome
    from dbmpi.runs.class_measures import ClassMeasures
    from dbmpi.runs.trained_network import TrainedNetwork
    from dbmpi.runs.value_measures import ValueMeasures

SUMMARY = "compute the loss and accuracy of a checkpoint on a data file, and what is confused with what"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_inference(parser)
    options.add_json(parser)
    parser.add_argument(
        "--details",
        action="store_true",
        help="show precision, recall, F1 and AUC of each class and what it was taken for, or R2 and errors of each "
        "output; computes the outputs once more",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw the confusion matrix (also .pdf or .svg); implies --details",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate with these `arguments`, print, and return the exit code."""
    wanted = arguments.details or arguments.plot is not None

    def check(checkpoint: Path) -> None:
        if arguments.plot is not None:
            from dbmpi.runs import confusion_picture

            confusion_picture.check(arguments.plot)

    with options.opened(arguments, targets=True, check=check) as (network, source):
        if arguments.plot is not None and not network.trained.info.classes:
            raise UserError(f"{arguments.plot}: draws a confusion matrix, and the targets are no classes; leave it out")
        with options.progress(source, "evaluating", network.is_first) as shown:
            outcome = network.evaluate(source, shown)
        measures = None
        if wanted:
            from dbmpi.runs.details import details

            measures = details(network, source)
        if network.is_first:
            _print(arguments, network.trained, outcome, measures)
        broken = "" if outcome.are_numbers else "some outputs are NaN or infinite; such samples count as wrong"
        return options.verdict(network, broken)


def _print(
    arguments: argparse.Namespace,
    trained: TrainedNetwork,
    outcome: Outcome,
    measures: ClassMeasures | ValueMeasures | None,
) -> None:
    from dbmpi.cli import evaluate_text
    from dbmpi.runs.class_measures import ClassMeasures

    if arguments.plot is not None and isinstance(measures, ClassMeasures):
        from dbmpi.runs import confusion_picture

        confusion_picture.draw(measures, f"{trained.path.name} on {arguments.data.name}", arguments.plot)
    loss, accuracy = outcome.mean_loss, outcome.accuracy
    if arguments.json:
        result = {
            "checkpoint": str(trained.path),
            "step": trained.info.step,
            "data": str(arguments.data),
            "samples": outcome.samples,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
            "accuracy": accuracy,
            "correct": None if accuracy is None else outcome.correct,
        }
        if outcome.metrics:
            result["metrics"] = {k: value if math.isfinite(value) else None for k, value in outcome.metrics.items()}
        if measures is not None:
            result["details"] = evaluate_text.as_json(measures)
        print(json.dumps(result, allow_nan=False))
        return
    print(f"checkpoint  {trained.path} (step {trained.info.step:,})")
    print(f"   samples  {outcome.samples:,}")
    print(f"      loss  {loss:.6g}")
    if accuracy is not None:
        print(f"  accuracy  {100 * accuracy:.2f} % ({outcome.correct:,} of {outcome.samples:,})")
    for name, mean in outcome.metrics.items():
        print(f"{name:>10}  {mean:.6g}")
    if measures is not None:
        for line in ["", *evaluate_text.lines(measures)]:
            print(line)
    if arguments.plot is not None:
        print(f"\n{arguments.plot}")
