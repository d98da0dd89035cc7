"""Markdown of a run: what each contestant did, and where achilles must stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.plots import number
from benchmarks.stats import Summary, paired_ratio, summarize
from benchmarks.targets import POOL, Figures, Verdict

EMPTY = "-"


class Row(NamedTuple):
    """A line of the big table."""

    figure: str
    title: str
    unit: str
    more_is_better: bool = False


ROWS = [
    Row("startup_s", "start-up to first result", "s"),
    Row("submit_rate", "no-op `submit`s", "1/s", True),
    Row("p50_us", "round trip, p50", "µs"),
    Row("p99_us", "round trip, p99", "µs"),
    Row("map_rate", "`map` of no-ops, default chunks", "1/s", True),
    Row("map_best_rate", "`map` of no-ops, best chunks", "1/s", True),
    Row("efficiency_0.1ms", "tasks of 0.1 ms, efficiency", "%", True),
    Row("efficiency_1ms", "tasks of 1 ms, efficiency", "%", True),
    Row("efficiency_10ms", "tasks of 10 ms, efficiency", "%", True),
    Row("efficiency_100ms", "tasks of 100 ms, efficiency", "%", True),
    Row("skew_ratio", "skewed lengths, total of the ideal", "x"),
    Row("skew_idle_ms", "skewed lengths, longest idle", "ms"),
    Row("argument_ms", "64 MiB argument", "ms"),
    Row("result_ms", "64 MiB result", "ms"),
    Row("pieces_ms", "64 x 1 MiB arguments", "ms"),
    Row("shared_ms", "one 64 MiB argument in 200 tasks", "ms"),
    Row("words_s", "word count", "s"),
    Row("search_s", "GridSearchCV", "s"),
    Row("cpu_client_us", "CPU a no-op: client", "µs"),
    Row("cpu_broker_us", "CPU a no-op: broker", "µs"),
    Row("cpu_worker_us", "CPU a no-op: worker", "µs"),
    Row("cpu_runner_us", "CPU a no-op: runners", "µs"),
    Row("cpu_rest_us", "CPU a no-op: all but the client", "µs"),
    Row("queued_client_bytes", "a queued task, client", "B"),
    Row("queued_broker_bytes", "a queued task, broker", "B"),
    Row("queued_rest_bytes", "a queued task, all but the client", "B"),
    Row("million_client_bytes", "1,000,000 queued, client, a task", "B"),
    Row("million_broker_bytes", "1,000,000 queued, broker, a task beyond its payload", "B"),
    Row("million_s", "1,000,000 queued, until the last result", "s"),
]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, and stand to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(summary: Summary | None, note: str = "") -> str:
    """A median, and the spread in per cent where there was more than one round."""
    if summary is None:
        return note or EMPTY
    spread = f" ±{summary.spread * 50:.0f}%" if summary.rounds > 1 else ""
    return number(summary.median) + spread


def figures_table(titles: Mapping[str, str], figures: Figures) -> str:
    """A row a figure, a column a contestant; ± is half the distance between the lowest and the highest round."""
    rows = []
    for row in ROWS:
        found = [summarize(figures.get(name, {}).get(row.figure, ())) for name in titles]
        if any(found):
            rows.append([f"{row.title} ({row.unit})", *map(cell, found)])
    return markdown(["", *titles.values()], rows)


def ratios_table(titles: Mapping[str, str], figures: Figures, base: str = POOL) -> str:
    """The same as multiples of ``base`` in the same round; above 1 is more,
    which is not always better.
    """
    rows = []
    for row in ROWS:
        theirs = figures.get(base, {}).get(row.figure, ())
        found = [paired_ratio(figures.get(name, {}).get(row.figure, ()), theirs) for name in titles]
        if any(found):
            better = "more is better" if row.more_is_better else "less is better"
            rows.append([f"{row.title} ({better})", *map(cell, found)])
    return markdown([f"of {titles.get(base, base)}", *titles.values()], rows)


SHORT = (
    ("submit_rate", "`submit`s/s"),
    ("p50_us", "round trip p50, µs"),
    ("map_rate", "`map`, items/s"),
    ("efficiency_1ms", "1 ms tasks, %"),
    ("argument_ms", "64 MiB argument, ms"),
    ("shared_ms", "in 200 tasks, ms"),
    ("startup_s", "start-up, s"),
)


def summary_table(
    titles: Mapping[str, str], figures: Figures, absent: Mapping[str, str] | None = None
) -> str:
    """A row a contestant, with a few figures; those that are absent say why."""
    rows = []
    for name, title in titles.items():
        if absent and name in absent:
            rows.append([title, f"absent: {absent[name]}", *[EMPTY] * (len(SHORT) - 1)])
        else:
            found = [summarize(figures.get(name, {}).get(key, ())) for key, _ in SHORT]
            rows.append([title, *map(cell, found)])
    return markdown(["two slots each", *(title for _, title in SHORT)], rows)


def verdicts_table(titles: Mapping[str, str], verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        goal = verdict.goal
        sign = "≥" if goal.at_least else "≤"
        limit = f"{sign} {goal.limit:,g} {goal.unit}"
        measured = cell(verdict.measured) if verdict.measured else verdict.reason
        name = titles.get(goal.contestant, goal.contestant)
        rows.append([goal.what, name, limit, measured, verdict.word])
    return markdown(["goal", "contestant", "limit", "measured", "verdict"], rows)


def notes_list(titles: Mapping[str, str], notes: Mapping[str, Mapping[str, str]]) -> str:
    """What was not measured, or not as the others, and why; a line each,
    equal reasons of one contestant together.
    """
    lines = []
    for name, reasons in notes.items():
        together: dict[str, list[str]] = {}
        for figure, reason in reasons.items():
            together.setdefault(reason, []).append(figure)
        for reason, found in together.items():
            lines.append(f"- {titles.get(name, name)}: {', '.join(found)}: {reason}\n")
    return "".join(lines)


def with_block(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between its comments ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: they are not there, each once and in this order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended or opening in after or closing in before + after:
        raise ValueError(f"{opening} and {closing} are not there once each, in this order")
    body = body.strip("\n")
    return f"{before}{opening}\n\n{body}\n\n{closing}{after}"
