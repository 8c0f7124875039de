"""``dbmpi evaluate``: loss and accuracy of a trained network on a data file."""

from __future__ import annotations

import argparse
import json
import math

from dbmpi.cli import inference

SUMMARY = "compute the loss and accuracy of a checkpoint on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    inference.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    inference.prepare()

    from dbmpi.data.source import Source
    from dbmpi.objective import Outcome

    trained = inference.load(arguments.checkpoint, arguments.allow_code)
    outcome = Outcome(0, 0.0, 0)
    with Source.open(arguments.data, inference.MEMORY_MIB) as source:
        trained.expect(source, targets=True)
        source.validate(full=True)
        for indices in inference.batches(source, arguments.batch_size, "evaluating"):
            outcome = outcome.plus(trained.network.evaluate(trained.parameters, source.batch(indices)))
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
        print(json.dumps(result, allow_nan=False))
        return 0
    print(f"checkpoint  {trained.path} (step {trained.info.step:,})")
    print(f"   samples  {outcome.samples:,}")
    print(f"      loss  {loss:.6g}")
    if accuracy is not None:
        print(f"  accuracy  {100 * accuracy:.2f} % ({outcome.correct:,} of {outcome.samples:,})")
    return 0
