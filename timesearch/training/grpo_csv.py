"""GRPO with completeness self-verification (GRPO-CSV; arXiv 2511.05489, Section 3.2) on TRL's `GRPOTrainer`.

For each question the policy plays G episodes of thought, search and answer. Then it meets the question once more, with
nothing but the frames that the episode searched, and answers again: the *re-answer*. An episode's reward is

    R = 1.0 format + 0.5 accuracy + 0.5 completeness,    completeness = accuracy x accuracy of the re-answer,

its advantage is R minus the mean of its group, and the clipped policy-gradient loss (plus beta times the KL
divergence from the start) is taken over the tokens that the policy wrote. Re-answers are scored, never learned from.

Of the cures that others propose where tool use dies in training, three are switches. A bonus or cost a call is the
weight of *calls* in the reward. *Format at the marks*: what an episode earned by its form is credited to the marks of
turns (``<think>``, ``</tool_call>``, ...) and not to what stands between them. *A random preview* is
drawn in `timesearch.training.data.training_rows`.

Everything but that is TRL's: episodes (`environment_factory`), generation by transformers or vLLM, losses, KL, LoRA,
DeepSpeed; `timesearch.training.rollouts` is the adapter. It departs from the paper's code in that the searched frames
stay visible to the policy in the loss (there they are hidden by the attention mask), and in that an image lost on its
way stops the run.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from timesearch.data.messages import final_answer, parse_turn
from timesearch.dialects import QWEN
from timesearch.rewards import accuracy, calls, score_episode, weighed
from timesearch.training.replay import ReplayBuffer, idle_groups, refill
from timesearch.training.rollouts import Clock, Episode, RolloutTrainer

RESAMPLES = 2
"""Further batches that are played to replace groups without advantages."""
_MARKS = re.compile("|".join(re.escape(mark.replace("<", slash)) for mark in QWEN.marks for slash in ("<", "</")))


class Judge(Protocol):
    """What the reward needs of a judge."""

    async def score_many(self, triples: Sequence[tuple[str, str, str]]) -> Sequence[float | None]:
        """Scores in [0, 1] of (question, reference answer, candidate answer); None where there is no verdict."""
        ...


class GRPOCSVTrainer(RolloutTrainer):
    """`RolloutTrainer` with the rewards of GRPO-CSV.

    Args:
        judge: scores open-ended answers.
        weights: of the parts of the reward by name; without completeness this is plain GRPO, without re-answers.
        zero_advantage: what becomes of groups that teach nothing: `keep`, `replay` or `resample`.
        mask_truncated: episodes cut by the length limit carry no loss.
        format_tokens: what the format's share of an advantage falls on: `all` tokens, or the `marks` of turns; `marks`
            wants advantages that are not scaled.
        clock: shared with the environments, which time their decoding in it.
        **arguments: those of `GRPOTrainer`, without `reward_funcs`.
    """

    def __init__(
        self,
        *,
        judge: Judge,
        weights: Mapping[str, float],
        zero_advantage: str,
        mask_truncated: bool,
        format_tokens: str,
        clock: Clock,
        **arguments: Any,
    ) -> None:
        self._judge = judge
        self._format_weight = weights["format"] if format_tokens == "marks" else 0.0
        parts = weighed(weights)
        self._verify = any(part.reanswers for part in parts)
        self._zero_advantage = zero_advantage
        rewards = [self._reward(part.name) for part in parts]
        super().__init__(mask_truncated=mask_truncated, clock=clock, reward_funcs=rewards, **arguments)
        # As many groups as this process plays in a step: more than that are never put back.
        episodes = self.args.generation_batch_size // self.accelerator.num_processes
        self._replay = ReplayBuffer(capacity=episodes // math.gcd(episodes, self.num_generations))

    def _reward(self, part: str) -> Callable[..., list[float]]:
        """The reward function of one part; the first of a batch re-answers and scores all episodes."""

        def reward(log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
            if not self.episodes[0].scores:
                if self._verify:
                    with self.clock("reanswer"):
                        self._reanswer()
                self._score(log_metric)
            return [episode.scores[part] for episode in self.episodes]

        reward.__name__ = part
        return reward

    def _reanswer(self) -> None:
        """Let the current policy answer every question again from the searched frames alone.

        All local rollouts go through the trainer's own generation in one batch. One that searched nothing takes part
        with its question only, and its answer is dropped: where generation is collective (ZeRO-3, tensor parallel, a
        vLLM server) every process must bring the same number of rollouts.
        """
        contents = [environment.search.reanswer() for environment in self.environments]
        asked = [
            content or [{"type": "text", "text": row["question"]}]
            for content, row in zip(contents, self._rows, strict=True)
        ]
        for episode, content, said in zip(self.episodes, contents, self.ask(asked), strict=True):
            if content:
                episode.reanswer = parse_turn(said).answer

    def _score(self, log_metric: Callable[[str, float], None]) -> None:
        judged = asyncio.run(self._judge_answers())
        for episode in self.episodes:
            row = episode.row

            def verdict(reference: str, candidate: str, question: str = row["question"]) -> float:
                return judged[question, reference, candidate] or 0.0

            episode.scores = score_episode(
                episode.messages, row["answer"], row["type"], episode.reanswer, judge=verdict
            )
            again = accuracy(episode.reanswer, row["answer"], row["type"], judge=verdict)
            episode.scores |= {"reanswer_accuracy": again, "calls": float(calls(episode.messages))}
        for name, value in episode_metrics(self.episodes).items():
            log_metric(name, value)
        log_metric("unjudged", sum(score is None for score in judged.values()) / max(1, len(judged)))

    async def _judge_answers(self) -> dict[tuple[str, str, str], float | None]:
        """Verdicts on the batch's distinct open-ended answers; one without a verdict counts as wrong."""
        triples = sorted(
            {
                (episode.row["question"], episode.row["answer"], candidate)
                for episode in self.episodes
                if episode.row["type"] == "open_ended"
                for candidate in (final_answer(episode.messages), episode.reanswer)
                if candidate and candidate.strip()
            }
        )
        return dict(zip(triples, await self._judge.score_many(triples), strict=True))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._play(inputs)
        if self._zero_advantage == "keep":
            return batch
        size = math.gcd(len(inputs), self.num_generations)
        pad_token = self._tokenizer.pad_token_id
        if self._zero_advantage == "replay":
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._logps_of(batch)
            batch, replaced = self._replay.exchange(batch, size, pad_token)
        else:
            replaced = 0
            for attempt in range(RESAMPLES):
                idle = torch.tensor(len(idle_groups(batch["advantages"], size)), device=self.accelerator.device)
                if not self.accelerator.gather(idle).any():
                    break
                kept = self.episodes
                others = self._play(self._other_rows(len(inputs), attempt))
                batch, more = refill(batch, others, size, pad_token)
                self.episodes = kept + self.episodes
                replaced += more
        batch["num_items_in_batch"] = self._loss_tokens(batch)
        self._metrics["train"]["replaced"].append(replaced * size / len(inputs))
        return batch

    def _play(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as TRL makes it, and where the marks alone are credited for it, the format's share of advantages."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._format_weight:
            earned = torch.tensor([episode.scores["format"] for episode in self.episodes])
            groups = self.accelerator.gather(earned.to(self.accelerator.device)).view(-1, self.num_generations)
            share = self._format_weight * (groups - groups.mean(dim=1, keepdim=True)).flatten()
            begin = self.accelerator.process_index * len(inputs)
            batch["format_advantages"] = share[begin : begin + len(inputs)]
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if "format_advantages" in inputs:
            marks_BC = torch.tensor(
                [of_marks(self._tokenizer.convert_ids_to_tokens(ids)) for ids in inputs["completion_ids"].tolist()],
                device=inputs["completion_ids"].device,
            )
            elsewhere = inputs["advantages"] - inputs["format_advantages"]
            by_token_BC = torch.where(marks_BC, inputs["advantages"][:, None], elsewhere[:, None])
            inputs = inputs | {"advantages": by_token_BC}
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def _other_rows(self, count: int, attempt: int) -> list[dict[str, Any]]:
        """This process's share of a fresh draw of questions, the same in every process."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        draw = torch.Generator().manual_seed(hash((self.args.seed, self.state.global_step, attempt)))
        questions = torch.randperm(len(self.train_dataset), generator=draw).tolist()
        groups = count * processes // self.num_generations
        rows = [index for index in (questions * groups)[:groups] for _ in range(self.num_generations)]
        return [self.train_dataset[index] for index in rows[rank * count : (rank + 1) * count]]


def of_marks(tokens: Sequence[str]) -> list[bool]:
    """For each token of a text whether it is part of a mark of a turn, which may be one token or several."""
    ends = list(accumulate(map(len, tokens)))
    spans = [match.span() for match in _MARKS.finditer("".join(tokens))]
    found, place = [], 0
    for begin, end in zip([0, *ends], ends, strict=False):
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        found.append(place < len(spans) and spans[place][0] < end)
    return found


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a person watches, as means over episodes: shares in [0, 1], and counts an episode."""
    count = len(episodes)
    made = [calls(episode.messages) for episode in episodes]
    return {
        "answer_rate": sum(final_answer(episode.messages) is not None for episode in episodes) / count,
        "search_rate": sum(map(bool, made)) / count,
        "reanswer_accuracy": sum(episode.scores["reanswer_accuracy"] for episode in episodes) / count,
        "tool_calls": sum(made) / count,
        "frames": sum(len(set(episode.searched)) for episode in episodes) / count,
        "ill_formed": sum(episode.scores["format"] < 1 for episode in episodes) / count,
        "truncated": sum(episode.truncated for episode in episodes) / count,
    }
