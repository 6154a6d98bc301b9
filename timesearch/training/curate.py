"""The paper's two filters for training data (arXiv 2511.05489, Section 4.1), by any policy.

Filter 1 drops what a few uniform frames already solve: nothing there has to be searched. Filter 2 drops what a dense
preview and search cannot solve: no episode of a group would be right, and nothing is learned. What is left is written
as samples, and `curation.jsonl` says of every sample what became of it and why.

Both passes are played by the engine of the stage `infer`, and go on where they were stopped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timesearch.base.errors import RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.files import write_jsonl
from timesearch.base.progress import progress_bar
from timesearch.data.messages import final_answer
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.fingerprint import fingerprint_of
from timesearch.inference.journal import Journal
from timesearch.inference.methods import from_chosen_frames
from timesearch.inference.playing import Episode, Job, play, search_maker
from timesearch.inference.policies import open_policy, require_fit, served
from timesearch.judge.client import make_judge
from timesearch.rewards import accuracy
from timesearch.search.episode import run_episode
from timesearch.settings import SearchSettings, Settings
from timesearch.training.data import load_training_samples

VERDICTS = {
    "kept": "neither too easy nor too hard",
    "too_easy": "solved from {easy} uniform frames",
    "too_hard": "not solved with {hard} preview frames and search",
    "failed": "no episode could be played",
}


@dataclass(frozen=True)
class Curation:
    """What became of the samples."""

    counts: dict[str, int]
    reasons: dict[str, str]
    samples: Path

    def table(self) -> str:
        """Markdown: verdict, samples, share, reason."""
        total = max(1, sum(self.counts.values()))
        lines = ["| verdict | samples | share | reason |", "| --- | ---: | ---: | --- |"]
        for verdict, count in self.counts.items():
            lines.append(f"| {verdict} | {count} | {count / total:.1%} | {self.reasons[verdict]} |")
        return "\n".join(lines)


def run(settings: Settings, policy: Path, out: Path, easy_frames: int = 4, hard_frames: int = 64) -> Curation:
    """Filter the train samples.

    Args:
        settings: a run; `paths.train_samples`, the caches, `infer` (engine) and `judge` are used.
        policy: checkpoint that plays.
        out: folder for `train.jsonl` (the kept rows), `curation.jsonl`, `curation.md`, and the passes' predictions
            (`easy.jsonl`, `hard.jsonl`).
        easy_frames: uniform frames of filter 1.
        hard_frames: preview frames of filter 2.

    Raises:
        RequestError: no sample that could be played, or no policy.
        TemporaryError: another process works in `out`.
    """
    if settings.infer.model is None and not policy.is_dir():
        raise RequestError(f"{policy} is missing: name a checkpoint by --policy")
    with exclusive(out):
        return _curate(settings, policy, out, easy_frames, hard_frames)


def _curate(settings: Settings, policy: Path, out: Path, easy_frames: int, hard_frames: int) -> Curation:
    samples, unfit = load_training_samples(settings)
    easy, hard = _filters(settings, easy_frames, hard_frames)
    solved = _solved(_play(settings, policy, out, samples, easy), settings)
    open_still = [sample for sample in samples if solved.get(sample.id) is False]
    solved_by_search = _solved(_play(settings, policy, out, open_still, hard), settings)

    verdicts = {failure.item: (failure.reason, failure.message) for failure in unfit}
    reasons = {name: text.format(easy=easy_frames, hard=hard_frames) for name, text in VERDICTS.items()}
    for sample in samples:
        attempt = solved.get(sample.id)
        verdict = (
            "too_easy"
            if attempt
            else "failed"
            if attempt is None or sample.id not in solved_by_search
            else "kept"
            if solved_by_search[sample.id]
            else "too_hard"
        )
        verdicts[sample.id] = (verdict, reasons[verdict])
    reasons |= dict.fromkeys({failure.reason for failure in unfit}, "cannot be used for training")
    write_jsonl(
        out / "curation.jsonl",
        [{"id": name, "verdict": verdict, "reason": reason} for name, (verdict, reason) in verdicts.items()],
    )
    kept = [sample for sample in samples if verdicts[sample.id][0] == "kept"]
    write_jsonl(out / "train.jsonl", [sample.model_dump(mode="json", exclude_unset=True) for sample in kept])
    counts = Counter(dict.fromkeys(VERDICTS, 0))
    counts.update(verdict for verdict, _ in verdicts.values())
    curation = Curation(dict(counts), reasons, out / "train.jsonl")
    (out / "curation.md").write_text(curation.table() + "\n", encoding="utf-8")
    return curation


@dataclass(frozen=True)
class Filter:
    """How the episodes of a filter go, and what they see: `frames` at once, or else what they search."""

    name: str
    episode: Episode
    frames: int | None
    search: SearchSettings


def _filters(settings: Settings, easy_frames: int, hard_frames: int) -> tuple[Filter, Filter]:
    search = settings.search
    tokens = max(search.total_video_tokens, hard_frames * search.min_tokens)
    dense = search.model_copy(update={"max_frames": hard_frames, "total_video_tokens": tokens})
    return (
        Filter("easy", from_chosen_frames("uniform", easy_frames), easy_frames, search),
        Filter("hard", run_episode, None, dense),
    )


def _play(
    settings: Settings, policy: Path, folder: Path, samples: Sequence[Sample], filter: Filter
) -> list[Prediction]:
    """The episodes of a filter, those that an earlier run has played included."""
    from timesearch.retrieval.features import default_encoder

    if not samples:
        return []
    mark = fingerprint_of(settings, policy, filter.name, filter.frames, filter.search)
    with Journal(folder, filter.name, samples, mark, settings.paths.subtitles) as journal:
        jobs = [Job(sample, filter.episode) for sample in samples if sample.id not in journal.done]
        if jobs:
            require_fit(settings, policy)
            make_search = search_maker(settings, default_encoder(settings), filter.search)
            with (
                progress_bar(f"filter {filter.name}", len(jobs)) as bar,
                open_policy(settings, policy, served(settings, policy)) as player,
            ):

                def record(_: Job, prediction: Prediction) -> None:
                    journal.add(prediction)
                    bar.advance()

                asyncio.run(play(jobs, player, make_search, record, settings.infer.concurrency))
        return journal.finish()


def _solved(predictions: Sequence[Prediction], settings: Settings) -> dict[str, bool]:
    """Whether each episode's answer is right; episodes that failed or got no verdict are left out."""
    played = [(row, final_answer(row.prediction)) for row in predictions if row.error is None]
    triples = sorted({(row.question, row.answer, said) for row, said in played if said and row.type == "open_ended"})
    scores = dict(zip(triples, asyncio.run(make_judge(settings.judge).score_many(triples)), strict=True))
    right = {}
    for row, said in played:
        score = scores.get((row.question, row.answer, said or ""), 0.0)
        if score is None:
            continue

        def verdict(reference: str, candidate: str, score: float = score) -> float:
            return score

        right[row.id] = accuracy(said, row.answer, row.type, judge=verdict) > 0.5
    return right
