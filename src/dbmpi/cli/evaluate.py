"""``dbmpi evaluate``: loss and accuracy of a trained network on a data file."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from dbmpi.cli import options

if TYPE_CHECKING:
    from dbmpi.objective import Outcome
    from dbmpi.runs.trained_network import TrainedNetwork

SUMMARY = "compute the loss and accuracy of a checkpoint on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_inference(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate with these `arguments`, print, and return the exit code."""
    with options.opened(arguments, targets=True) as (network, source):
        with options.progress(source, "evaluating", network.is_first) as shown:
            outcome = network.evaluate(source, shown)
        if network.is_first:
            _print(arguments, network.trained, outcome)
        broken = "" if outcome.are_numbers else "some outputs are NaN or infinite; such samples count as wrong"
        return options.verdict(network, broken)


def _print(arguments: argparse.Namespace, trained: TrainedNetwork, outcome: Outcome) -> None:
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
        print(json.dumps(result, allow_nan=False))
        return
    print(f"checkpoint  {trained.path} (step {trained.info.step:,})")
    print(f"   samples  {outcome.samples:,}")
    print(f"      loss  {loss:.6g}")
    if accuracy is not None:
        print(f"  accuracy  {100 * accuracy:.2f} % ({outcome.correct:,} of {outcome.samples:,})")
    for name, mean in outcome.metrics.items():
        print(f"{name:>10}  {mean:.6g}")
