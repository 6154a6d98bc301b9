"""The comparison table: one row a method, uniform sampling first.

Where questions say in `meta.hops` how many pieces of evidence they need, their accuracy stands by that number too, and
beside it what can be known from the frames, where the generator of the videos tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Scored(Protocol):
    """What the table needs of a method: `MethodScores`, or what was written of them."""

    @property
    def name(self) -> str:
        """Of the predictions' file."""

    @property
    def metrics(self) -> dict[str, Any]:
        """All of its numbers."""


METHODS = {
    "uniform": "uniform sampling",
    "one_shot": "one-shot retrieval",
    "oracle": "oracle frames",
    "base": "untrained policy",
    "coldstart": "cold start",
    "grpo": "GRPO",
    "grpo_csv": "GRPO-CSV",
}
"""Methods by file name, in the order of the table; other files follow under their own names."""


def method_label(name: str) -> str:
    """The words for a method: `one_shot_topk` is one-shot retrieval (topk); another file's name stands as it is, with
    control characters as escapes.
    """
    if name in METHODS:
        return METHODS[name]
    for known in sorted(METHODS, key=len, reverse=True):
        if name.startswith(f"{known}_"):
            return f"{METHODS[known]} ({name.removeprefix(known)[1:].replace('_', ' ')})"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def method_order(name: str) -> tuple[int, str]:
    """Sort key: methods in the order of the table, variants beside theirs, then others by name."""
    known = [known for known in METHODS if name == known or name.startswith(f"{known}_")]
    return (list(METHODS).index(max(known, key=len)) if known else len(METHODS), name)


TABLE_COLUMNS = (
    ("temporal P", "temporal_precision", 100),
    ("temporal R", "temporal_recall", 100),
    ("temporal F1", "temporal_f1", 100),
    ("visual F1", "visual_f1", 100),
    ("QA accuracy", "qa_accuracy", 100),
    ("frames seen", "frames_mean", 1),
    ("tool calls", "tool_calls_mean", 1),
)


_MOST_HOPS = 5
"""Columns by hops: a table has no room for more."""


def hop_columns(methods: Sequence[Scored]) -> list[tuple[str, str, str]]:
    """Heads of the columns by hops, each with the group's value and a metric; none where no question tells."""
    told = {value for method in methods for value in method.metrics["by"].get("hops", {})}
    ceilings = any(method.metrics.get("knowable") is not None for method in methods)
    columns = []
    for number in range(1, _MOST_HOPS + 1):
        if str(number) in told:
            columns.append((f"{number} hop{'s' * (number > 1)}", str(number), "qa_accuracy"))
            columns += [("at most", str(number), "knowable")] * ceilings
    return columns


def table_rows(methods: Sequence[Scored]) -> list[list[str]]:
    """The cells as text: shares in per cent, with half the width of their 95% interval."""
    hops = hop_columns(methods)
    rows = []
    for method in methods:
        cells = [method_label(method.name)]
        cells += [_cell(method.metrics, name, scale) for _, name, scale in TABLE_COLUMNS]
        by = method.metrics["by"].get("hops", {})
        cells += [_cell(by.get(value, {}), name, 100, name == "qa_accuracy") for _, value, name in hops]
        rows.append(cells)
    return rows


def _cell(metrics: Mapping[str, Any], name: str, scale: int, spread: bool = True) -> str:
    value = metrics.get(name)
    interval = metrics.get("intervals", {}).get(name) if scale == 100 and spread else None
    text = "–" if value is None else f"{value * scale:.1f}"
    if value is not None and interval:
        text += f" ± {(interval[1] - interval[0]) * scale / 2:.1f}"
    return text


def _heads(methods: Sequence[Scored]) -> list[str]:
    """Heads of the columns after the first."""
    return [*(column for column, _, _ in TABLE_COLUMNS), *(column for column, *_ in hop_columns(methods))]


def markdown_table(methods: Sequence[Scored]) -> str:
    """The comparison table in Markdown."""
    heads = ["method", *(_escaped(head) for head in _heads(methods))]
    rows = [[_escaped(cell) for cell in row] for row in table_rows(methods)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def side_notes(methods: Sequence[Scored]) -> list[str]:
    """What published scripts would say, a line a method where that is another number than the table's."""
    notes = []
    for method in methods:
        metrics, told = method.metrics, []
        if metrics.get("qa_differ") or metrics.get("qa_strict") != metrics.get("qa_published"):
            strict, published = (f"{metrics[name] * 100:.1f}" for name in ("qa_strict", "qa_published"))
            differ = metrics["qa_differ"]
            told.append(f"multiple choice {strict} read strictly, {published} as published ({differ} read differently)")
        if (searched := metrics.get("temporal_tstar_f1")) is not None and searched != metrics["temporal_f1"]:
            told.append(f"temporal F1 {searched * 100:.1f} by T*, which leaves episodes without search out")
        if len(metrics["tools"]) > 1:
            told += [_use(name, use) for name, use in metrics["tools"].items()]
        if told:
            notes.append(f"{method_label(method.name)}: {'; '.join(told)}")
    return notes


def _use(name: str, use: Mapping[str, Any]) -> str:
    """One tool in words."""
    hits = "" if use["hit_rate"] is None else f", {use['hit_rate'] * 100:.0f}% of them at the ground truth"
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return f"{plain} {use['calls_mean']:.2f} calls an episode{hits}"


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|")


def print_table(methods: Sequence[Scored]) -> None:
    """Show the comparison table on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    caption = "in per cent, ± half a 95% interval"
    heads, rows = _heads(methods), table_rows(methods)
    # A terminal of 80 columns has no room for the columns by hops beside the others.
    parts = [slice(0, len(TABLE_COLUMNS)), slice(len(TABLE_COLUMNS), None)]
    for part in parts if hop_columns(methods) else parts[:1]:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
        table.add_column("method", no_wrap=True)
        for column in heads[part]:
            table.add_column(column.replace("accuracy", "acc.").replace(" ", "\n"), justify="right", no_wrap=True)
        for label, *cells in rows:
            shown = (cell.replace(" ± ", "\n[dim]±") + "[/dim]" * (" ± " in cell) for cell in cells[part])
            table.add_row(Text(label), *shown)
        console.print(table)
    for note in side_notes(methods):
        console.print(Text(note, style="dim"))
