"""Rows that others publish, turned into the project's own: benchmarks' questions and other systems' predictions.

A row's form is told by the fields that only it has:

=====================  ==============================================================================================
LongVideoBench         ``video_path``, ``candidates`` (or ``option0`` ...), ``correct_choice``; ``position``: frame
                       numbers of the source video
Haystack-LVBench       the reference's form: ``video``, ``question``, ``target``, ``gt_frame_index``, and the
                       LongVideoBench row as a JSON text in ``meta``; its output files add ``prediction``
Haystack-Ego4D         LV-Haystack's table: ``video_id``, ``frame_indexes_video``, ``video_metadata``
T*                     ``video_path``, ``options`` as one text, ``keyframe_timestamps`` in seconds
Video-MME              ``videoID``, ``question_id``, ``task_type``
MLVU                   ``video``, ``question_type``, ``candidates`` or ``scoring_points``
LVBench                ``key``, and ``qa``: one row a video, one entry a question; or a table of a row a question,
                       with ``time_reference``
lmms-eval              its log of samples: ``doc_id``, ``doc`` (the published row), ``filtered_resps``
=====================  ==============================================================================================

Fields that a sample has no place for stay in its `meta`, where evaluation finds the groups to report by.

What can be read in two ways, or in none, is an `UnreadableError` that says so: a guess would let a right letter stand
for another option, and nobody would see it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.data.samples import LETTERS, Prediction, UnreadableError
from timesearch.dialects.qwen import tagged_answers

Row = dict[str, Any]

_OWN_FIELDS = frozenset(Prediction.model_fields)
_EPISODE_FIELDS = (
    *("prediction", "keyframe_timestamps", "searched_seconds", "predicted_answer", "error", "reanswer"),
    *("preview_seconds", "seen", "fingerprint"),
)
_BULKY_FIELDS = ("frame_distribution", "keyframe_distribution", "grounding_objects")
_LONGVIDEOBENCH_FIELDS = (
    *("id", "video_path", "question", "candidates", "correct_choice", "duration", "position", "gt_frame_index"),
    *(f"option{i}" for i in range(5)),
)
_LISTED_LETTER = re.compile(r"\s*+[(\[]?([A-Za-z])\s*+[)\].:]\s*+")
_MARK = re.compile(r"([(\[]?)([A-Za-z])([)\].:])")
_SEPARATORS = ";,|/"
_LONGEST = 20_000
"""Characters of a question with its options, at most: in a longer text no letters are looked for."""
_CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,4}):(\d{1,2})(?:[.,](\d{1,3})(?![\d:]))?(?![\d:])")
_TO = re.compile(r"\s?(?:-|–|—|~|to)\s?")
_NEXT = re.compile(r"(?:[\s,;&]|and\b)*+")


def to_rows(row: Row, number: int) -> list[Row]:
    """Turn a row of any known form into rows of the project's own, with the fields of `Sample` or `Prediction`.

    Args:
        row: an object of a JSON lines, JSON or Parquet file.
        number: its place in the file, from 1; part of the ids of rows that have none.

    Returns:
        One row, or one for each question of a row that holds several. A row in the project's own form, or in none that
        is known, comes back as it is: validation then says what is wrong with it.
    """
    if row.keys() <= _OWN_FIELDS and not isinstance(row.get("meta"), str):
        return [_own(row)]
    for knows, convert in _FORMS:
        if knows(row):
            return [{**_episode(row), **sample} for sample in convert(row, number)]
    return [row]


def _own(row: Row) -> Row:
    """A row in the project's own fields; options, spans and what was said may be written as others write them."""
    told: Row = {}
    if isinstance(row.get("options"), str | dict):
        told["options"] = _options(row["options"])
    if isinstance(row.get("gt_spans"), str):
        told["gt_spans"] = _spans(row["gt_spans"])
    elif isinstance(row.get("gt_spans"), list) and any(isinstance(span, str) for span in row["gt_spans"]):
        told["gt_spans"] = [span for text in row["gt_spans"] for span in _spans(text)]
    if isinstance(row.get("prediction"), str) or isinstance(row.get("error"), str):
        told |= _episode(row)
        told["prediction"] = row["prediction"] if isinstance(row.get("prediction"), list) else []
    return {**row, **told} if told else row


def _episode(row: Row) -> Row:
    """What an output file adds to a sample: messages, searched times, answer, error."""
    found: Row = {name: row[name] for name in _EPISODE_FIELDS if row.get(name) is not None}
    if "keyframe_timestamps" in found:
        found["searched_seconds"] = found.pop("keyframe_timestamps")
    if isinstance(found.get("prediction"), str):
        text = found.pop("prediction")
        found["predicted_answer"] = [text.strip(), *tagged_answers(text)][-1]
    if isinstance(found.get("error"), str):
        found["error"] = {"type": "error", "message": found["error"]}
    return found


def _rest(row: Row, *used: str) -> Row:
    dropped = {*used, *_EPISODE_FIELDS, *_BULKY_FIELDS}
    return {name: value for name, value in row.items() if name not in dropped}


def options_of(value: Any) -> list[str]:
    """Options, without their letters, from a list, a text, or a mapping by letter.

    A text holds an option a line, or options behind their letters (``A. one B. two``, ``(A) one``, ``a) one``, ``[A]
    one``) on one line or wrapped over several.

    Raises:
        UnreadableError: there are several ways to read it, or none.
    """
    if isinstance(value, dict):
        return _by_letter(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return _in_text(value)
    items = list(value or [])
    while items and items[-1] is None:
        items.pop()
    return _without_letters([_text(item).strip() for item in items if item != ""])


def holds_options(question: str, options: Sequence[str]) -> bool:
    """Whether a question ends with its options already, behind letters or a line each, so that it is asked as it is."""
    if not options:
        return False
    text = " ".join(question.split())
    texts = [" ".join(option.split()) for option in options]
    for first in "Aa":
        for before, after in (("", "."), ("", ")"), ("(", ")"), ("[", "]"), ("", ":")):
            place = 0
            for number, option in enumerate(texts):
                mark = f"{before}{chr(ord(first) + number)}{after}"
                ends = [
                    found + len(written)
                    for written in (f"{mark} {option}", f"{mark}{option}")
                    if (found := text.find(written, place)) >= 0
                ]
                if not ends:
                    break
                place = min(ends)
            else:
                return True
    lines = [" ".join(line.split()) for line in question.splitlines() if line.strip()]
    return len(lines) > len(texts) > 1 and lines[-len(texts) :] == texts


def _options_in(question: str) -> list[str]:
    """The options that a question ends with, behind letters; none where that is not certain."""
    try:
        found = _lettered(question)
    except UnreadableError:
        return []
    return found[1] if found is not None and found[0] else []


def _options(value: Any) -> list[str]:
    """`options_of`, if its places are those of the letters."""
    options = options_of(value)
    marks = [_LISTED_LETTER.match(option) for option in options]
    letters = [mark[1].upper() for mark in marks if mark]
    if len(options) > 1 and sorted(letters) == list(LETTERS[: len(options)]):
        raise UnreadableError(
            f"its options stand in the order {', '.join(letters)}: put them into that of their letters"
        )
    if len(options) > len(LETTERS):
        raise UnreadableError(f"{len(options)} options, where letters name {len(LETTERS)}")
    return options


def _text(value: Any) -> str:
    """A text, or a number as one writes it: tables make 15 into 15.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise UnreadableError(f"a text is expected, not {type(value).__name__}")


def _without_letters(options: list[str]) -> list[str]:
    marks = [_LISTED_LETTER.match(option) for option in options]
    letters = "".join(mark[1] for mark in marks if mark)
    if options and letters in (LETTERS[: len(options)], LETTERS[: len(options)].lower()):
        return [option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark]
    return options


def _by_letter(value: Row) -> list[str]:
    """Options by their letters, or by numbers from 0 or 1; those at the end that are None are left out."""
    keys = {str(key).strip().upper(): text for key, text in value.items()}
    numbered = all(key.isascii() and key.isdigit() and len(key) < 4 for key in keys)
    names = sorted(keys, key=int if numbered else None)
    while names and keys[names[-1]] in (None, ""):
        names.pop()
    first = int(names[0]) if numbered and names else 0
    expected = [str(number) for number in range(first, first + len(names))] if first < 2 and numbered else None
    if names != (expected or list(LETTERS[: len(names)])) or any(keys[name] is None for name in names):
        raise UnreadableError(f"its options are not those of the letters A to {LETTERS[len(keys) % 27 - 1]}")
    return [_text(keys[name]).strip() for name in names]


def _in_text(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            listed = parse_json(text)
        except UntrustedError:
            listed = None
        if isinstance(listed, list) and len(listed) > 1:
            return options_of(listed)
    found = _lettered(text)
    if found is not None and not found[0]:
        return found[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if found is not None or len(lines) == 1 or (lines and _LISTED_LETTER.match(lines[0])):
        raise UnreadableError(f"its options cannot be told apart: {text.strip()[:80]!r}")
    return lines


@dataclass(frozen=True)
class _Mark:
    """A letter that may stand before an option: where it begins and ends, its place in the alphabet, how it is set."""

    start: int
    end: int
    letter: int
    style: tuple[str, str, bool]


def _lettered(text: str) -> tuple[str, list[str]] | None:
    """What stands before the options of a text, and the options; None where no letters A, B, ... mark any.

    Marks at the beginnings of lines come first; then those between spaces, then any. All are set in one way.

    Raises:
        UnreadableError: letters may be read as marks in more than one way.
    """
    if len(text) > _LONGEST:
        return None
    marks = [
        _Mark(match.start(), match.end(), ord(match[2].upper()) - ord("A"), (match[1], match[3], match[2].isupper()))
        for match in _MARK.finditer(text)
        if (match[1], match[3]) in (("(", ")"), ("[", "]")) or (not match[1] and match[3] != "]")
    ]
    apart = [mark for mark in marks if _stands_apart(text, mark)]
    leading = _leading(text, apart)
    alone = {mark.start for mark in apart}
    joined = [m for m in marks if m.style[0] or m.start in alone or text[m.end : m.end + 1].isalnum()]
    joined = [mark for mark in joined if mark.style[0] or not text[mark.start - 1 : mark.start].isalnum()]
    for candidates in (leading, apart, joined):
        chains = [
            chain
            for style in dict.fromkeys(mark.style for mark in candidates)
            if len(chain := _chain([mark for mark in candidates if mark.style == style], text)) > 1
        ]
        if not chains:
            continue
        chain = chains[0]
        more = [mark for mark in apart if mark.style == chain[0].style and mark.start > chain[-1].start]
        if len(chains) > 1 or any(mark.letter == len(chain) for mark in more):
            raise UnreadableError(f"its options can be told apart in several ways: {text.strip()[:80]!r}")
        ends = [*(mark.start for mark in chain[1:]), len(text)]
        options = [" ".join(text[mark.end : end].split()) for mark, end in zip(chain, ends, strict=True)]
        separator = options[0][-1:]
        if separator and separator in _SEPARATORS and all(option.endswith(separator) for option in options[:-1]):
            options = [option.removesuffix(separator).rstrip() for option in options]
        if not all(options):
            raise UnreadableError(f"one of its options is empty: {text.strip()[:80]!r}")
        return text[: chain[0].start].strip(), options
    return None


def _leading(text: str, marks: Sequence[_Mark]) -> list[_Mark]:
    """The marks before which their line is blank: on each line it can only be the first."""
    found: list[_Mark] = []
    line, looked_at = 0, -1
    for mark in marks:
        line = max(line, text.rfind("\n", line, mark.start) + 1)
        if line != looked_at and not text[line : mark.start].strip():
            found.append(mark)
        looked_at = line
    return found


def _stands_apart(text: str, mark: _Mark) -> bool:
    """Whether a mark stands between spaces, as a word does."""
    before, after = text[mark.start - 1 : mark.start] if mark.start else "", text[mark.end : mark.end + 1]
    return (not before or before.isspace()) and (bool(mark.style[0]) or not after or after.isspace())


def _chain(marks: Sequence[_Mark], text: str) -> list[_Mark]:
    """The longest run of marks A, B, C, ... of one style, in the order of the text.

    Raises:
        UnreadableError: there are several.
    """
    ways = [0] * len(LETTERS)
    reached: list[int] = []
    for mark in marks:
        reached.append(ways[mark.letter - 1] if mark.letter else 1)
        ways[mark.letter] = min(2, ways[mark.letter] + reached[-1])  # whether there are several is all that counts
    count = next((letter for letter, way in enumerate(ways) if not way), len(LETTERS))
    if count > 1 and ways[count - 1] > 1:
        raise UnreadableError(f"its options can be told apart in several ways: {text.strip()[:80]!r}")
    chain: list[_Mark] = []
    for mark, way in zip(reversed(marks), reversed(reached), strict=True):
        if way and mark.letter == count - 1 - len(chain):
            chain.append(mark)
    return chain[::-1]


def _kind(options: list[str]) -> str:
    return "multiple_choice" if options else "open_ended"


def _longvideobench(row: Row, number: int) -> list[Row]:
    numbered = [row.get(f"option{i}") for i in range(5)]
    while numbered and numbered[-1] in (None, "", "N/A"):
        numbered.pop()
    options = _options(row.get("candidates") or numbered)
    return [
        {
            "id": str(row.get("id") or f"{row.get('video_id', 'question')}_{number}"),
            "video": row["video_path"],
            "question": row["question"],
            "options": options,
            "answer": _letter_at(row.get("correct_choice"), options),
            "type": "multiple_choice",
            "duration": row.get("duration"),
            "gt_frame_index": _frames(row.get("gt_frame_index") or row.get("position")),
            "meta": {
                "benchmark": "LongVideoBench",
                **_rest(row, *_LONGVIDEOBENCH_FIELDS),
            },
        }
    ]


def _letter_at(choice: Any, options: list[str]) -> str:
    """The letter of the option at a place from 0; none where the answer is kept back (None, or -1)."""
    place = -1 if choice is None else _whole(choice)
    if not -1 <= place < len(options):
        raise UnreadableError(f"the right choice is {place}, of {len(options)} options")
    return LETTERS[place] if place >= 0 else ""


def _whole(value: Any) -> int:
    """A whole number, which tables and texts give as 12.0 or "12" too."""
    number = float(value) if isinstance(value, str | float) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number) or abs(number) >= 2**63:
        raise UnreadableError(f"a whole number is expected, not {str(value)[:40]!r}")
    return int(number)


def _frames(value: Any) -> list[int]:
    """Frame numbers: a list, one number, or a list as JSON text."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value)
    return [_whole(frame) for frame in (value if isinstance(value, list) else [value]) if frame not in (None, "")]


def _reference(row: Row, number: int) -> list[Row]:
    """The reference's rows. `target` holds the answer, alone or in an object; options stand in the published `meta`."""
    meta = _unpacked(row.get("meta"))
    published: Row = {}
    for knows, convert in _FORMS:
        if meta and convert is not _reference and knows(meta):
            published = convert(meta, number)[0]
            break
    target = row.get("target", row.get("answer", published.get("answer", "")))
    answer, spans = _target(target)
    options = _options(row.get("options") or row.get("candidates")) or published.get("options", [])
    if not options and row.get("type") in (None, "multiple_choice"):
        options = _options_in(row["question"])
    return [
        {
            "id": str(row.get("id", number)),
            "video": row["video"],
            "question": row["question"],
            "options": options,
            "answer": answer or published.get("answer", ""),
            "type": row.get("type") or _type(options, answer, spans),
            "duration": row.get("duration", published.get("duration")),
            "gt_seconds": row.get("gt_seconds") or [],
            "gt_frame_index": _frames(row.get("gt_frame_index")) or published.get("gt_frame_index", []),
            "gt_spans": row.get("gt_spans") or spans,
            "split": row.get("split") or "",
            "meta": {
                **(published.get("meta") or meta),
                **_rest(row, "meta", "target", "candidates", *_OWN_FIELDS),
            },
        }
    ]


def _type(options: list[str], answer: str, spans: list[Any]) -> str:
    """The type of a question that states none."""
    if options or len(answer.strip()) <= 1:
        return "multiple_choice"
    return "grounding" if spans else "open_ended"


def _unpacked(meta: Any) -> Row:
    """`meta` as an object: the reference writes it as JSON text, sometimes in a list, sometimes twice over."""
    for _ in range(4):
        if isinstance(meta, list) and len(meta) == 1:
            meta = meta[0]
        elif isinstance(meta, str):
            try:
                meta = parse_json(meta)
            except UntrustedError:
                return {"text": meta}
        elif isinstance(meta, dict) and isinstance(meta.get("meta"), str):
            meta = meta["meta"]
        else:
            break
    return meta if isinstance(meta, dict) else {}


def _target(target: Any) -> tuple[str, list[list[float]]]:
    """Answer text and spans of a `target`: a letter or text, ``[start, end]``, or an object that holds them."""
    if isinstance(target, dict):
        spans = target.get("time") or []
        if "start_time" in target and "end_time" in target:
            spans = [[target["start_time"], target["end_time"]]]
        answer = target.get("answer")
        return (str(answer) if answer is not None else json.dumps(spans) if spans else ""), spans
    if isinstance(target, list):
        spans = [target] if len(target) == 2 and not isinstance(target[0], list) else target
        return json.dumps(spans), spans
    return ("" if target is None else str(target)), []


def _haystack_ego4d(row: Row, number: int) -> list[Row]:
    """LV-Haystack's own table; frame numbers count in the whole video, whose rate stands in `video_metadata`."""
    options = _options(row.get("options"))
    metadata = _unpacked(row.get("video_metadata"))
    frames = _frames(row["frame_indexes_video"])
    rate = float(metadata.get("frame_rate") or 0)
    if not 0 <= rate < float("inf"):
        raise UnreadableError(f"its frame rate is {rate}")
    return [
        {
            "id": f"{row['video_id']}_{number}",
            "video": f"{row['video_id']}.mp4",
            "question": row["question"],
            "options": options,
            "answer": _as_letter(row.get("answer"), options),
            "type": _kind(options),
            "duration": metadata.get("video_duration"),
            "gt_frame_index": frames,
            "gt_seconds": [frame / rate for frame in frames] if rate else [],
            "meta": {
                "benchmark": "Haystack-Ego4D",
                **_rest(row, "video_id", "question", "options", "answer", "frame_indexes_video"),
            },
        }
    ]


def _tstar(row: Row, number: int) -> list[Row]:
    options = _options(row.get("options"))
    identity = row.get("id") or f"{row.get('video_id') or row['video_path'].rsplit('/', 1)[-1]}_{number}"
    answer = row.get("gt_answer") if row.get("gt_answer") is not None else row.get("answer")
    return [
        {
            "id": str(identity),
            "video": row["video_path"],
            "question": row.get("question", ""),
            "options": options,
            "answer": _as_letter(answer, options),
            "type": _kind(options),
            "duration": row["duration"] if isinstance(row.get("duration"), (int, float)) else None,
            "gt_frame_index": _frames(row.get("gt_frame_index") or row.get("position")),
            "meta": _rest(
                row, "id", "video_path", "question", "options", "gt_answer", "answer", "gt_frame_index", "position"
            ),
        }
    ]


def _video_mme(row: Row, number: int) -> list[Row]:
    return [
        {
            "id": str(row["question_id"]),
            "video": f"{row['videoID']}.mp4",
            "question": row["question"],
            "options": _options(row["options"]),
            "answer": _text(row.get("answer") or ""),
            "type": "multiple_choice",
            "meta": {"benchmark": "Video-MME", **_rest(row, "question_id", "question", "options", "answer")},
        }
    ]


def _mlvu(row: Row, number: int) -> list[Row]:
    """MLVU gives the right answer as an option's text; its generation tasks have no options."""
    options = _options(row.get("candidates"))
    return [
        {
            "id": str(row.get("question_id") or f"{row['question_type']}_{number}"),
            "video": row["video"],
            "question": row["question"],
            "options": options,
            "answer": _as_letter(row.get("answer"), options),
            "type": _kind(options),
            "duration": row.get("duration"),
            "meta": {
                "benchmark": "MLVU",
                "task": row["question_type"],
                **_rest(row, "question_id", "video", "question", "candidates", "answer", "duration", "question_type"),
            },
        }
    ]


def _lvbench(row: Row, number: int) -> list[Row]:
    """LVBench puts the options behind the question, a line each, and names the evidence as ``mm:ss-mm:ss``."""
    entries = row.get("qa", row)
    entries = entries if isinstance(entries, list) else [entries]
    samples: list[Row] = []
    for position, entry in enumerate(entries, start=1):
        question, options = _question(entry["question"])
        samples.append(
            {
                "id": str(entry.get("uid") or f"{row['key']}_{position if 'qa' in row else number}"),
                "video": f"{row['key']}.mp4",
                "question": question,
                "options": options,
                "answer": _text(entry.get("answer") or ""),
                "type": "multiple_choice",
                "gt_spans": _spans(entry.get("time_reference") or ""),
                "meta": {
                    "benchmark": "LVBench",
                    "video_type": row.get("type"),
                    **_rest(entry, "key", "uid", "type", "question", "answer"),
                },
            }
        )
    return samples


def _lmms_eval(row: Row, number: int) -> list[Row]:
    """A line of lmms-eval's log of samples; one that `timesearch export` wrote carries the whole prediction."""
    doc = dict(row["doc"])
    if isinstance(whole := doc.pop("timesearch", None), dict):
        return [_own(whole)]
    said = row["filtered_resps"]
    while isinstance(said, list) and said:
        said = said[0]
    answers = {"prediction": said} if isinstance(said, str) else {}
    return to_rows({**doc, **answers}, number)


def _question(text: str) -> tuple[str, list[str]]:
    """A question, and the options that follow it: behind letters, or a line each after the line that asks."""
    found = _lettered(text)
    if found is not None:
        return found
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    asking = [number for number, line in enumerate(lines, start=1) if line.endswith("?")]
    if len(lines) < 2 or asking == [len(lines)]:
        return text.strip(), []
    if len(asking) != 1 or len(lines) - asking[0] < 2:
        raise UnreadableError(f"its question and options cannot be told apart: {text.strip()[:80]!r}")
    return "\n".join(lines[: asking[0]]), lines[asking[0] :]


def _spans(text: str) -> list[list[float]]:
    """[start, end] seconds of ``00:15-00:20, 1:02:03.5-1:02:30``; a clock by itself is a moment.

    Raises:
        UnreadableError: anything else.
    """
    spans = []
    place = _NEXT.match(text).end()  # type: ignore[union-attr]
    while place < len(text):
        start = _CLOCK.match(text, place)
        between = start and _TO.match(text, start.end())
        end = _CLOCK.match(text, between.end()) if between else start
        if start is None or end is None:
            raise UnreadableError(f"not a span of time such as 00:15-00:20: {text[place : place + 40]!r}")
        spans.append([_seconds(start), _seconds(end)])
        place = _NEXT.match(text, end.end()).end()  # type: ignore[union-attr]
        if place == end.end() < len(text):
            raise UnreadableError(f"not a span of time such as 00:15-00:20: {text[place : place + 40]!r}")
    return spans


def _seconds(clock: re.Match[str]) -> float:
    hours, minutes, seconds, decimals = clock.groups()
    if int(seconds) > 59 or (hours and int(minutes) > 59):
        raise UnreadableError(f"not a time: {clock[0]!r}")
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(f"{seconds}.{decimals or 0}")


def _as_letter(answer: Any, options: list[str]) -> str:
    """The letter of an answer given as an option's text; any other answer as it is."""
    if answer is None:
        return ""
    text = _text(answer)
    if options.count(text) > 1:
        raise UnreadableError(f"the right answer {text[:80]!r} is the text of several options")
    return LETTERS[options.index(text)] if text in options else text


_FORMS: list[tuple[Callable[[Row], bool], Callable[[Row, int], list[Row]]]] = [
    (lambda row: "doc_id" in row and isinstance(row.get("doc"), dict) and "filtered_resps" in row, _lmms_eval),
    (lambda row: "frame_indexes_video" in row and "video_id" in row, _haystack_ego4d),
    (lambda row: "key" in row and ("qa" in row or {"question", "time_reference"} <= row.keys()), _lvbench),
    (lambda row: "videoID" in row and "task_type" in row, _video_mme),
    (lambda row: "video_path" in row and ("keyframe_timestamps" in row or isinstance(row.get("options"), str)), _tstar),
    (lambda row: "video_path" in row and ("candidates" in row or "option0" in row), _longvideobench),
    (lambda row: "video" in row and "question_type" in row and "target" not in row, _mlvu),
    (lambda row: "video" in row and "question" in row and ("target" in row or "meta" in row), _reference),
]
