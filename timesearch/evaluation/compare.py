"""Two results side by side: first what differs in how they were made, then which is better on the same questions.

A side is a file of predictions, which is scored here, a file of metrics that `timesearch evaluate` wrote, or a folder
of results. Only what is known of both sides can be found to differ; what is not known is said.

Neither of two results that differ in nothing is better, whatever a test says: what differs is the draw of the sampling,
or the rounding of the engine. Of others one is better in what is unlikely to be chance, by Holm's correction for the
number of values that are tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from timesearch.base.errors import RequestError
from timesearch.data.rows import read_rows
from timesearch.evaluation.results import episode_row, files_by_name, load_metrics
from timesearch.evaluation.scoring import MakeJudge, evaluate_files
from timesearch.evaluation.statistics import holm, mcnemar, paired_bootstrap
from timesearch.evaluation.table import method_label
from timesearch.inference.fingerprint import words_for
from timesearch.search.rendering import UNKNOWN
from timesearch.settings import Evaluate

_MEASURES = {
    "qa_accuracy": ("QA accuracy", 100),
    "qa_published": ("QA as published", 100),
    "grounding_iou": ("grounding IoU", 100),
    "temporal_f1": ("temporal F1", 100),
    "visual_f1": ("visual F1", 100),
    "completeness": ("completeness", 100),
    "frames": ("frames seen", 1),
}
"""Value of an episode: its words, and what it is multiplied by."""
_CHANCE = 0.05
"""Corrected p-value below which a difference is no chance."""
_NAMED = 20
"""Flipped rows and missing videos that the text names; the JSON has all."""
_SEEN = {
    "engines": "engine as it ran",
    "templates": "chat template, by what the engine made of a short conversation",
    "encoders": "encoder as it ran",
    "retried": "requests that were sent again",
    "failed": "requests without an answer",
    "empty": "replies without a word",
}


_LEFT_OUT = {
    "missing_video": "episodes whose video was missing when they were scored",
    "unjudged": "answers without a verdict of the judge",
    "unknown_frame_rate": "episodes whose ground truth had no frame rate",
    "not_json": "rows that could not be read",
    "invalid_row": "rows with a wrong value",
    "unknown_type": "rows of a type that is not scored",
    "duplicate_id": "rows whose id was there before",
}


@dataclass(frozen=True)
class Side:
    """One result."""

    where: Path
    method: str
    metrics: Mapping[str, Any]
    episodes: Mapping[str, Mapping[str, Any]]
    """scores by id, as `episode_row` writes them"""

    @property
    def made(self) -> Mapping[str, Any]:
        """`metrics["fingerprint"]`, empty of results that were evaluated before there were any."""
        made = self.metrics.get("fingerprint")
        if not isinstance(made, dict) or not isinstance(made.get("digest"), str | None):
            return {}
        return made


@dataclass(frozen=True)
class Difference:
    """An ingredient that differs, with its values."""

    what: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.what}: A {_said(self.a)}, B {_said(self.b)}"


@dataclass
class Comparison:
    """What `timesearch compare` finds."""

    a: Side
    b: Side
    differences: list[Difference]
    unknown: list[str]
    """what could not be compared, in sentences"""
    questions: list[str]
    """how the question sets differ, in sentences; empty where they are the same"""
    episodes: int = 0
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    only_a_right: list[str] = field(default_factory=list)
    only_b_right: list[str] = field(default_factory=list)

    @property
    def only_drawn(self) -> bool:
        """Whether nothing that is known differs but the seed, so that other numbers are another draw of the same."""
        known = all(side.made.get("digest") and not side.made.get("rows_without") for side in (self.a, self.b))
        return known and all(each.what == words_for("seed") for each in self.differences)

    @property
    def better(self) -> dict[str, list[str]]:
        """In which values ``a`` and ``b`` are better than the other; frames are a cost, and no merit."""
        found: dict[str, list[str]] = {"a": [], "b": []}
        for name, measure in self.measures.items():
            if name != "frames" and not self.only_drawn and measure.get("p_corrected", 1.0) < _CHANCE:
                found["b" if measure["difference"] > 0 else "a"].append(name)
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "a": {"path": str(self.a.where), "method": self.a.method, "fingerprint": self.a.made.get("digest")},
            "b": {"path": str(self.b.where), "method": self.b.method, "fingerprint": self.b.made.get("digest")},
            "differences": [{"what": each.what, "a": each.a, "b": each.b} for each in self.differences],
            "unknown": self.unknown,
            "questions": self.questions,
            "episodes": self.episodes,
            "measures": self.measures,
            "better": self.better,
            "only_a_right": self.only_a_right,
            "only_b_right": self.only_b_right,
        }


def load_sides(path: Path, settings: Evaluate, make: MakeJudge, seed: int = 0) -> dict[str, Side]:
    """The results at a path, by method.

    Args:
        path: a file of predictions, a file of metrics, or a folder of results.
        settings: by which predictions are scored that have not been; visual metrics are left out.
        make: makes the judge of open-ended answers, if there are any.
        seed: of the bootstrap.

    Raises:
        RequestError: there is nothing of the kind.
    """
    if path.is_dir():
        folder = path / "evaluation" if (path / "evaluation").is_dir() else path
        read = {found: _metrics(found) for found in sorted(folder.glob("*.json"))}
        evaluated = {found.stem: _evaluated(found, metrics) for found, metrics in read.items() if metrics is not None}
        if evaluated:
            return evaluated
        files = sorted({*path.glob("*.jsonl"), *path.glob("predictions/*.jsonl")} - set(path.rglob("failures.jsonl")))
        if not files:
            raise RequestError(f"{path} holds neither metrics nor predictions: name a folder that `evaluate` wrote")
        return _scored(files, settings, make, seed)
    if path.name == "metrics.json" and (path.parent / "evaluation").is_dir():
        return load_sides(path.parent / "evaluation", settings, make, seed)
    if (metrics := _metrics(path)) is not None:
        return {path.stem: _evaluated(path, metrics)}
    return _scored([path], settings, make, seed)


def _metrics(path: Path) -> dict[str, Any] | None:
    """The metrics that a file holds; None where it holds something else."""
    if path.suffix == ".json" and path.is_file():
        with suppress(RequestError):
            return load_metrics(path)
    return None


def _evaluated(path: Path, metrics: Mapping[str, Any]) -> Side:
    name = path.stem
    rows = path.parent / "episodes" / f"{name}.jsonl"
    if not rows.is_file():
        raise RequestError(f"{rows} is missing, which holds the episodes of {path}: copy it too, or evaluate again")
    return Side(path, name, metrics, {str(row.get("id")): row for _, row in read_rows(rows)})


def _scored(files: Sequence[Path], settings: Evaluate, make: MakeJudge, seed: int) -> dict[str, Side]:
    methods = evaluate_files(files_by_name(files), settings, None, make, seed)
    found = {}
    for method in methods:
        if not method.episodes:
            raise RequestError(f"{method.path} holds no prediction that can be read")
        rows = {episode.id: episode_row(episode) for episode in method.episodes}
        found[method.name] = Side(method.path, method.name, method.metrics, rows)
    return found


def pairs_of(a: Mapping[str, Side], b: Mapping[str, Side]) -> list[tuple[Side, Side]]:
    """Which sides stand against each other: the only ones, else those of one name.

    Raises:
        RequestError: there are several, and no name is on both sides.
    """
    if len(a) == len(b) == 1:
        return [(next(iter(a.values())), next(iter(b.values())))]
    if len(a) == 1 or len(b) == 1:
        (name,) = a if len(a) == 1 else b
        if name in a and name in b:
            return [(a[name], b[name])]
    common = [name for name in a if name in b]
    if not common:
        raise RequestError(
            f"no method is on both sides ({', '.join(a)} and {', '.join(b)}): name one file of each, such as "
            "results/evaluation/grpo_csv.json"
        )
    return [(a[name], b[name]) for name in common]


def compare_sides(a: Side, b: Side, settings: Evaluate, seed: int = 0) -> Comparison:
    """Compare two results; the questions that only one of them answered are left out of the numbers."""
    common = [identity for identity in a.episodes if identity in b.episodes]
    changed = [
        identity
        for identity in common
        if a.episodes[identity].get("asked")
        and b.episodes[identity].get("asked")
        and a.episodes[identity]["asked"] != b.episodes[identity]["asked"]
    ]
    same = [identity for identity in common if identity not in set(changed)]
    pairs = [(a.episodes[identity], b.episodes[identity]) for identity in same]
    found = Comparison(a, b, [], [], _questions(a, b, common, changed), len(same))
    found.differences = [*_ingredients(a, b), *_shown(pairs)]
    found.unknown = list(_unknown(a, b))
    for name in _MEASURES:
        values = [(one[name], other[name]) for one, other in pairs if _has(one, name) and _has(other, name)]
        if not values:
            continue
        numbers = np.array(values, dtype=np.float64)
        measure = {"episodes": len(values), "a": float(numbers[:, 0].mean()), "b": float(numbers[:, 1].mean())}
        if settings.bootstrap:
            measure |= paired_bootstrap(numbers[:, 0], numbers[:, 1], settings.bootstrap, seed)
            # A share of so many draws is known no finer.
            measure["p_value"] = max(measure["p_value"], min(1.0, 2 / (settings.bootstrap + 1)))
        else:
            measure["difference"] = measure["b"] - measure["a"]
        if name == "qa_accuracy":
            measure |= mcnemar(list(numbers[:, 0] > 0.5), list(numbers[:, 1] > 0.5))
        found.measures[name] = measure
    tested = [measure for measure in found.measures.values() if "p_value" in measure]
    for measure, corrected in zip(tested, holm([each["p_value"] for each in tested]), strict=True):
        measure["p_corrected"] = corrected
    for name, measure in found.measures.items():
        found.measures[name] = {key: float(f"{value:.9g}") for key, value in measure.items()}
    for identity, (one, other) in zip(same, pairs, strict=True):
        if (right := _right(one)) is not None and (again := _right(other)) is not None and right != again:
            (found.only_a_right if right else found.only_b_right).append(identity)
    return found


def _has(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def _right(row: Mapping[str, Any]) -> bool | None:
    name = "qa_accuracy" if "qa_accuracy" in row else "grounding_iou"
    return row[name] > 0.5 if _has(row, name) else None


def _questions(a: Side, b: Side, common: Sequence[str], changed: Sequence[str]) -> list[str]:
    told = []
    for name, other, side in (("A", "B", a), ("B", "A", b)):
        if alone := len(side.episodes) - len(common):
            told.append(f"{alone} of {name}'s {len(side.episodes)} questions are not in {other}")
    if changed:
        shown = ", ".join(changed[:_NAMED])
        told.append(f"{len(changed)} ids stand for another question, options or right answer ({shown})")
    return told


def _ingredients(a: Side, b: Side) -> Iterator[Difference]:
    """What differs of how both were played and scored."""
    ours, theirs = a.made, b.made
    if ours.get("made_of") and theirs.get("made_of"):
        for each in _different(ours["made_of"], theirs["made_of"]):
            yield Difference(words_for(each.what), each.a, each.b)
    elif ours.get("digest") and theirs.get("digest") and ours["digest"] != theirs["digest"]:
        yield Difference("fingerprint", ours["digest"], theirs["digest"])
    seen, other = ours.get("seen"), theirs.get("seen")
    if isinstance(seen, dict) and isinstance(other, dict):
        for name, words in _SEEN.items():
            one, another = seen.get(name), other.get(name)
            if name == "templates" and not (_rendered(seen) and _rendered(other)):
                continue
            if one != another and name in ("engines", "templates", "encoders"):
                yield Difference(words, one, another)
            elif one != another:
                yield Difference(words, _of_requests(seen, name), _of_requests(other, name))
    if ours and theirs:
        for name, words in (("errors", "episodes that ended in an error"), ("missing_videos", "missing videos")):
            if ours.get(name) != theirs.get(name):
                yield Difference(words, ours.get(name), theirs.get(name))
        yield from _different(ours.get("scored"), theirs.get("scored"))
    judged, again = ours.get("judged"), theirs.get("judged")
    if isinstance(judged, dict) and isinstance(again, dict) and judged.get("retried") != again.get("retried"):
        yield Difference("requests to the judge that were sent again", _of_requests(judged), _of_requests(again))
    left_out = [side.metrics["failures"] if isinstance(side.metrics["failures"], dict) else {} for side in (a, b)]
    for reason, words in _LEFT_OUT.items():
        one, other = (counts.get(reason, 0) for counts in left_out)
        if one != other:
            yield Difference(words, one, other)


def _of_requests(counts: Mapping[str, Any], name: str = "retried") -> str:
    return f"{counts.get(name)} of {counts.get('requests')}"


def _rendered(seen: Any) -> list[str]:
    """Digests of what the engines of a side made of a short conversation; none where it is not known of all."""
    templates = seen.get("templates") if isinstance(seen, dict) else None
    known = isinstance(templates, list) and not {"", UNKNOWN}.intersection(map(str, templates))
    return templates if known and isinstance(templates, list) else []


def _different(a: Any, b: Any) -> Iterator[Difference]:
    a, b = (side if isinstance(side, dict) else {} for side in (a, b))
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            for each in _different(one, other):
                yield Difference(f"{name}, {each.what}", each.a, each.b)
        elif one != other:
            yield Difference(name, one, other)


def _shown(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Iterator[Difference]:
    """What differs of the frames that both were shown of one question's video."""
    shown = [
        (one["shown"], other["shown"])
        for one, other in pairs
        if all(isinstance(side.get("shown"), list) and len(side["shown"]) == 4 for side in (one, other))
    ]
    parts = (
        "frames of the preview",
        "pixels of a preview frame",
        "pixels of a searched frame",
        "times told beside frames",
    )
    for place, words in enumerate(parts):
        apart = [
            (_plain(one[place]), _plain(other[place]))
            for one, other in shown
            if one[place] and other[place] and _plain(one[place]) != _plain(other[place])
        ]
        if apart:
            where = f", in {len(apart)} of {len(shown)} episodes; the first" if len(shown) > 1 else ""
            first = tuple(_sizes(value) if place in (1, 2) else value for value in apart[0])
            yield Difference(f"{words}{where}", *first)


def _plain(value: Any) -> Any:
    return [list(size) for size in value] if isinstance(value, list | tuple) else value


def _sizes(value: Sequence[Sequence[int]]) -> str:
    return " and ".join(f"{width} x {height}" for width, height in value)


def _unknown(a: Side, b: Side) -> Iterator[str]:
    for name, side in (("A", a), ("B", b)):
        made = side.made
        if not made:
            yield f"{name} was evaluated before there were fingerprints: how it was made is not known"
        elif not made.get("digest"):
            yield f"{name} has no fingerprint: how it was played is not known"
        elif not made.get("made_of"):
            yield (
                f"{name} has the fingerprint {made['digest']}, but what it stands for is not beside the predictions: "
                "copy their .json file, too"
            )
        made_of, seen = made.get("made_of"), made.get("seen")
        if isinstance(made_of, dict) and made_of.get("model"):
            yield f"the weights that {name}'s server has under the name {made_of['model']} are not known"
        if isinstance(seen, dict) and not _rendered(seen) and (UNKNOWN in (seen.get("templates") or ())):
            yield f"the chat template of {name}'s server is unknown: it does not say what it renders (/tokenize)"
        if made.get("digest") and made.get("rows_without"):
            yield f"{made['rows_without']} rows of {name} have no fingerprint"
        if "+" in (made.get("digest") or ""):
            yield f"{name} is of rows that were made in several ways"


def _said(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        value = list(map(str, value))
        more = f" and {len(value) - _NAMED} more" if len(value) > _NAMED else ""
        return ", ".join(value[:_NAMED]) + more
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(found: Comparison, common: bool) -> list[str]:
    """The comparison in words, a line each; of different question sets the numbers are told only where `common` is."""
    a, b = found.a, found.b
    lines = []
    for name, side in (("A", a), ("B", b)):
        digest = side.made.get("digest") or "none"
        lines.append(f"{name}  {side.where}: {method_label(side.method)}, {_count(len(side.episodes), 'episode')}")
        lines[-1] += f", fingerprint {digest}"
    lines.append("")
    if found.differences:
        lines += ["What differs in how they were made:", *(f"  {each}" for each in found.differences)]
    elif found.unknown:
        lines.append("Nothing differs of what is known of both:")
    else:
        lines.append("Nothing differs in how they were made.")
    lines += [f"  {each}" for each in found.unknown]
    if found.questions:
        lines += ["", "The questions differ:", *(f"  {each}" for each in found.questions)]
        if not common:
            return lines
    lines += ["", f"On the {_count(found.episodes, 'question')} that both answered:"]
    lines += _table(found)
    for name, ids in (("A", found.only_a_right), ("B", found.only_b_right)):
        if ids:
            more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
            lines.append(f"  only {name} right ({len(ids)}): {', '.join(ids[:_NAMED])}{more}")
    return [*lines, "", _verdict(found)]


def _table(found: Comparison) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "A", "B", "B - A", "95% interval", "p", "p, corrected")]
    for name, measure in found.measures.items():
        words, scale = _MEASURES[name]
        interval = f"{measure['low'] * scale:+.1f} to {measure['high'] * scale:+.1f}" if "low" in measure else ""
        numbers = (f"{measure[side] * scale:.1f}" for side in ("a", "b"))
        chances = (_chance(measure.get(kind)) for kind in ("p_value", "p_corrected"))
        rows.append((words, *numbers, f"{measure['difference'] * scale:+.1f}", interval, *chances))
    columns = range(1, 7 if len(rows) > 2 else 6)  # one test needs no correction
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in columns)]).rstrip()
        for row in rows
    ]


def _chance(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _verdict(found: Comparison) -> str:
    if found.only_drawn:
        return f"Neither is better: {_noise(found)}"
    better = found.better
    told = [
        f"{side.upper()} is better in {', '.join(_MEASURES[name][0] for name in names)}"
        for side, names in better.items()
        if names
    ]
    if not told:
        return f"Neither is better: no difference is larger than chance gives ({_tested(found)})."
    apart = len(found.differences)
    differ = "things differ" if apart > 1 else "thing differs"
    why = f" {apart} {differ} in how they were made: any of them may be the reason." if apart else ""
    return f"{'; '.join(told)} ({_tested(found)}).{why}"


def _tested(found: Comparison) -> str:
    tested = [measure for measure in found.measures.values() if "p_value" in measure]
    return f"p < {_CHANCE:g}" + (f", corrected for {len(tested)} tests by Holm" if len(tested) > 1 else "")


def _noise(found: Comparison) -> str:
    """Why results that differ in nothing have other numbers."""
    if not any(measure["difference"] for measure in found.measures.values()):
        return "no number differs."
    temperature = (found.a.made.get("made_of") or found.b.made.get("made_of") or {}).get("temperature")
    if temperature == 0:
        source = "how the engine rounds, as decoding is greedy"
    else:
        at = f" (temperature {_said(temperature)})" if temperature else ""
        source = f"the draw of the sampling{at}"
    nothing = "in nothing that is known" if found.unknown else "in nothing"
    text = f"they differ {nothing} but {source}. The differences above are its noise."
    low = [name for name, measure in found.measures.items() if measure.get("p_value", 1.0) < _CHANCE]
    if not low:
        return text
    tests = sum("p_value" in measure for measure in found.measures.values())
    return f"{text} A p below {_CHANCE:g} is no sign here: one in twenty such tests has it by chance, of {tests}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
