"""The comparison table: one row a method, uniform sampling first."""

from __future__ import annotations

from collections.abc import Sequence

from timesearch.evaluation.episodes import MethodScores

METHODS = {
    "uniform": "uniform sampling",
    "one_shot": "one-shot retrieval",
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


def table_rows(methods: Sequence[MethodScores]) -> list[list[str]]:
    """The cells as text: shares in per cent, with half the width of their 95% interval."""
    rows = []
    for method in methods:
        cells = [method_label(method.name)]
        for _, name, scale in TABLE_COLUMNS:
            value = method.metrics[name]
            interval = method.metrics.get("intervals", {}).get(name) if scale == 100 else None
            text = "–" if value is None else f"{value * scale:.1f}"
            if value is not None and interval:
                text += f" ± {(interval[1] - interval[0]) * scale / 2:.1f}"
            cells.append(text)
        rows.append(cells)
    return rows


def markdown_table(methods: Sequence[MethodScores]) -> str:
    """The comparison table in Markdown."""
    heads = ["method", *(column for column, _, _ in TABLE_COLUMNS)]
    rows = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in table_rows(methods)]
    lines = [heads, ["---", *["---:"] * len(TABLE_COLUMNS)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(methods: Sequence[MethodScores]) -> None:
    """Show the comparison table on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption="in per cent, ± half a 95% interval")
    table.add_column("method", no_wrap=True)
    for column, _, _ in TABLE_COLUMNS:
        table.add_column(column.replace("accuracy", "acc.").replace(" ", "\n"), justify="right", no_wrap=True)
    for label, *cells in table_rows(methods):
        shown = (cell.replace(" ± ", "\n[dim]±") + "[/dim]" * (" ± " in cell) for cell in cells)
        table.add_row(Text(label), *shown)
    Console().print(table)
