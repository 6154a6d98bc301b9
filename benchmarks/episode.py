"""One episode as a picture: what the policy thought and asked, turn by turn, and the frames that came back.

    uv run python benchmarks/episode.py results/predictions/grpo_csv.jsonl [ID] [--frames cache/frames] \
        [--out docs/episode.png]

Without an ID the first right episode is drawn that searched most, within `--calls` calls.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from timesearch.data.messages import blocks_of, describe_call, parse_turn, text_of
from timesearch.video.frames import FrameCache

WIDTH = 52
"""Characters of a line of text."""


def chosen(path: Path, identity: str | None, calls: int) -> dict[str, Any]:
    """The row of a prediction file that is drawn."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if identity:
        return next(row for row in rows if row["id"] == identity)
    right = [row for row in rows if row["predicted_answer"] == row["answer"] == row["reanswer"]]
    return max((row for row in right if row["tool_calls"] <= calls), key=lambda row: row["tool_calls"])


def draw(row: dict[str, Any], frames: FrameCache, out: Path) -> None:
    """Draw an episode: a line a turn, its words on the left, what it was shown on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: list[tuple[str, str, list[tuple[Any, int]]]] = []
    for message in row["prediction"]:
        if message["role"] == "system":
            continue
        shown = [(block["seconds"], block["frame"]) for block in blocks_of(message) if block.get("frame") is not None]
        if message["role"] == "user":
            lines.append(("question", row["question"], shown))
        elif message["role"] == "assistant":
            turn = parse_turn(text_of(message))
            words = turn.thought or ""
            act = describe_call(turn.calls[0]) if turn.calls else f"answer: {turn.answer}"
            lines.append((act, words, []))
        elif lines:
            lines[-1] = (*lines[-1][:2], shown)
    most = max(len(shown) for *_, shown in lines)
    figure, axes = plt.subplots(
        len(lines), most + 1, figsize=(5.2 + 1.25 * most, 1.3 * len(lines)), width_ratios=[4.2, *[1] * most]
    )
    for axis in axes.flat:
        axis.axis("off")
    for (head, words, shown), (text, *pictures) in zip(lines, axes, strict=True):
        text.text(0, 0.78, head, weight="bold", size=10, va="center")
        text.text(0, 0.62, textwrap.fill(words, WIDTH), size=9, va="top", style="italic" if shown else "normal")
        for (seconds, number), picture in zip(shown, pictures, strict=False):
            picture.imshow(frames[number])
            picture.set_title(f"{seconds:.1f} s", size=8, pad=2)
    figure.tight_layout(h_pad=0.6, w_pad=0.2)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Choose an episode and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("id", nargs="?")
    parser.add_argument("--frames", type=Path, default=Path("cache/frames"))
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/episode.png"))
    given = parser.parse_args()
    row = chosen(given.predictions, given.id, given.calls)
    draw(row, FrameCache.open(given.frames / f"{row['video']}.frames"), given.out)
    print(f"{given.out}: {row['id']}, {row['question']}")


if __name__ == "__main__":
    main()
