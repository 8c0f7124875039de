"""Records of runs that never were."""

from __future__ import annotations

import json
from pathlib import Path

SAMPLES, BATCH = 6000, 60  # 100 steps an epoch


def make_run(directory: Path, workers: int = 2, shards: int = 1, sessions: int = 2, *, classes: bool = True) -> Path:
    """Write the records of a run: a report a second, 50 steps a second by all replicas, 2 epochs a session.

    Every session but the first takes the last half epoch again.  A session begins to train 1.5 seconds after its start.
    """
    (directory / "records").mkdir(parents=True)
    lines: dict[str, list[str]] = {}

    def add(kind: str, role: str, number: int, session: int, elapsed: float, **fields: object) -> None:
        record = {"kind": kind, "role": role, "number": number, "session": session, "elapsed": elapsed}
        record |= {"time": 1e9 + 1000 * session + elapsed} | fields
        record |= {"steps_before": 150 * (session - 1), "steps_per_epoch": SAMPLES // BATCH}
        lines.setdefault(f"{role}-{number}", []).append(json.dumps(record) + "\n")

    speed = 50 * BATCH / max(workers, 1)
    for session in range(1, sessions + 1):
        first = 1.5 * (session - 1)
        for second in range(1, 5):
            epoch, elapsed = first + second / 2, 1.5 + second
            for number in range(workers):
                add(
                    "worker", "worker", number, session, elapsed,
                    step=50 * second // workers, epoch=epoch, samples=int(speed * second), loss=2.0 / epoch,
                    accuracy=1 - 0.5 / (1 + epoch) if classes else None, samples_per_second=speed,
                    pushed_bytes=1000, fetched_bytes=1000,
                    seconds={"compute": 0.6, "fetch": 0.1, "push": 0.2, "wait": 0.1, "data": 0.0},
                )  # fmt: skip
            for number in range(shards):
                add(
                    "shard", "shard", number, session, elapsed + 0.1,
                    version=int(100 * first) + 50 * second, pushes=50 * second, queue=0.5,
                    staleness={"p50": 1, "p90": 1, "max": 3, "mean": 1.2}, staleness_histogram={"1": 45, "3": 5},
                    seconds={"apply": 0.25, "serve": 0.0, "idle": 0.75}, applied_bytes=1000,
                )  # fmt: skip
            if second % 2 == 0:
                add(
                    "evaluation", "worker", 0, session, elapsed + 0.2,
                    step=50 * second, epoch=epoch, loss=2.5 / epoch, accuracy=0.9 if classes else None, samples=1000,
                )  # fmt: skip
    for name, own in lines.items():
        (directory / "records" / f"{name}.jsonl").write_text("".join(own))
    return directory
