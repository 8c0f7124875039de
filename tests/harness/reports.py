"""From what every rank saw of a test to the one thing that the session reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr
from _pytest._io import TerminalWriter

PHASES = ("setup", "call", "teardown")
Reports = Mapping[int, Sequence[pytest.TestReport]]


class Problem(TerminalRepr):
    """A failure that is told in words, not by a traceback of this process."""

    def __init__(self, item: pytest.Item, headline: str, text: str) -> None:
        path, line, _ = item.location
        self.reprcrash = ReprFileLocation(path, (line or 0) + 1, headline)
        self._text = f"{headline}\n{text}".rstrip()

    def toterminal(self, tw: TerminalWriter) -> None:
        for line in self._text.splitlines():
            tw.line(line)


@dataclass
class Broken:
    """Why a test has no outcome on every rank: it hangs, or a rank is gone."""

    headline: str
    stacks: dict[int, str] = field(default_factory=dict)
    output: str = ""


def to_data(config: pytest.Config, report: pytest.TestReport) -> dict[str, Any]:
    """Return a report as what JSON can hold."""
    data: dict[str, Any] | None = config.hook.pytest_report_to_serializable(config=config, report=report)
    assert data is not None
    return data


def from_data(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """Return the report that :func:`to_data` was given."""
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=data)
    if isinstance(report.longrepr, list):  # a skip's (path, line, reason), which JSON has no tuple for
        report.longrepr = tuple(report.longrepr)
    return report


def differ(reports: Reports) -> bool:
    """Return whether the test failed on some ranks only, after which nobody knows what is still under way."""
    failed = [any(report.failed for report in own) for own in reports.values()]
    return any(failed) and not all(failed)


def merge(item: pytest.Item, reports: Reports) -> list[pytest.TestReport]:
    """Return one report a phase: failed if any rank failed; skipped only if all ranks skipped."""
    merged = []
    for phase in PHASES:
        own = {rank: report for rank, all_ in reports.items() for report in all_ if report.when == phase}
        if own:
            merged.append(_merge_phase(item, len(reports), own))
    if any(report.failed and report.when == "setup" for report in merged):
        merged = [report for report in merged if report.when != "call" or report.failed]
    return merged


def _merge_phase(item: pytest.Item, size: int, own: dict[int, pytest.TestReport]) -> pytest.TestReport:
    failed = {rank: report for rank, report in own.items() if report.failed}
    outcomes = {rank: (report.outcome, hasattr(report, "wasxfail")) for rank, report in own.items()}
    first = next(iter((failed or own).values()))
    first.duration = max(report.duration for report in own.values())
    if failed:
        first.sections = [*_told(failed, size), *first.sections]
    elif len(set(outcomes.values())) > 1:
        told = "\n".join(f"rank {rank} of {size}: {outcome}" for rank, (outcome, _) in outcomes.items())
        first.outcome = "failed"
        first.longrepr = Problem(item, f"the ranks do not agree on whether the test {first.when} is skipped", told)
    return first


def _told(failed: dict[int, pytest.TestReport], size: int) -> list[tuple[str, str]]:
    """Return who failed, and the failures beyond the first rank's, each text once."""
    sections = [(f"failed on rank {', '.join(map(str, failed))} of {size}", "")]
    texts: dict[str, list[int]] = {}
    for rank, report in failed.items():
        texts.setdefault(_text(report), []).append(rank)
    for text, ranks in list(texts.items())[1:]:
        sections.append((f"rank {', '.join(map(str, ranks))} of {size}", text))
    return sections


def _text(report: pytest.TestReport) -> str:
    """Return a failure and what was captured, as plain text."""
    captured = [f"--- {title} ---\n{content}" for title, content in report.sections if content]
    return "\n".join([report.longreprtext, *captured])


def incomplete(item: pytest.Item, size: int, reports: Reports, broken: Broken, seconds: float) -> pytest.TestReport:
    """Return the failure of a test that did not end on all ranks."""
    parts = []
    for rank in range(size):
        for report in reports.get(rank, ()):
            if report.failed:
                parts.append(f"=== rank {rank} of {size} failed in {report.when}:\n{_text(report)}")
    finished = [rank for rank in range(size) if rank in reports]
    if finished:
        parts.append(f"=== finished the test: rank {', '.join(map(str, finished))} of {size}")
    parts += [f"=== stacks of rank {rank} of {size}:\n{text}" for rank, text in broken.stacks.items() if text]
    if broken.output.strip():
        parts.append(f"=== last output of the launcher and its ranks:\n{broken.output.rstrip()}")
    return failure(item, Problem(item, broken.headline, "\n".join(parts)), "call", seconds)


def failure(item: pytest.Item, problem: Problem, phase: str, seconds: float = 0.0) -> pytest.TestReport:
    """Return a failed report that no rank has made."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=problem,
        when=phase,  # type: ignore[arg-type]
        duration=seconds,
    )
