"""TRL's `GRPOTrainer` over search episodes: what is needed to play them right, and to keep them as they were written.

The method is in `timesearch.training.grpo_csv`; here is the adapter that it stands on. It differs from TRL 1.16 in that

- a rollout is kept as an `Episode` of messages whose assistant turns are raw text, never re-rendered from parsed calls;
- every tool call reaches the search, which answers a wrong one as it does in inference;
- image tokens are counted against images, and an image lost on its way stops the run;
- a group's prompt, and the pixels of a tool message, are processed once;
- the order of questions follows from the epoch, so that a resumed run meets those that it would have met.

Private names of TRL that are used, each held by a test: `_compute_loss`, `_generate`, `_generate_single_turn`,
`_generate_and_score_completions`, `_get_per_token_logps_and_entropies`, `_get_tool_suffix_ids`, `_get_train_sampler`,
`_prepare_inputs`, `_sync_tool_dicts`, `_tokenize_prompts`, `_batch_environments`, `_image_pad_token_id`, `_tokenizer`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from timesearch.base.errors import TimeSearchError
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.data.messages import Block, Message, blocks_of, searched_seconds
from timesearch.search.checkpoint import multiply_patches, vision_token_ids
from timesearch.search.environment import SearchEnvironment


class ImageMismatchError(TimeSearchError):
    """The image tokens of an episode do not fit its images: the policy would be trained on frames that it never saw."""


class Clock:
    """Seconds spent by name; time inside an inner block counts for the inner name only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a block for `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now


@dataclass
class Episode:
    """One rollout as the policy wrote it: assistant turns are raw text, never re-rendered from parsed calls."""

    row: dict[str, Any]
    messages: list[Message]
    truncated: bool
    reanswer: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def searched(self) -> list[float]:
        """Times (s) of the frames that tool calls showed."""
        return searched_seconds(self.messages)


class _Tools(dict[str, Any]):
    """Tools of one environment: any call reaches it, so that a wrong one is answered as it is in inference.

    TRL turns every exception of a tool into text for the policy. Here a wrong call raises none, so that an exception is
    a fault of this machine (a lost file, a broken cache): it is kept, to stop the run.
    """

    def __init__(self, environment: SearchEnvironment) -> None:
        super().__init__()
        self._environment = environment
        self.fault: Exception | None = None

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            try:
                with self._environment.timer():
                    return self._environment.search.call(name, arguments)
            except Exception as error:
                self.fault = error
                raise

        return call


def _parsed_response(
    parse: Callable[..., dict[str, Any]], calls: int, *arguments: Any, **keywords: Any
) -> dict[str, Any]:
    """A turn as the tokenizer's parser reads it, within the bounds of `parse_json`, with its first `calls` calls.

    TRL takes a turn that raises ValueError here for plain text; of deep nesting and of half surrogate pairs it dies.
    """
    try:
        parsed: dict[str, Any] = parse_json(json.dumps(parse(*arguments, **keywords)))
    except RecursionError as error:
        raise UntrustedError("nested too deeply") from error
    if parsed.get("tool_calls"):
        parsed["tool_calls"] = parsed["tool_calls"][:calls]
    return parsed


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the epoch, so that a resumed run meets the questions it would have.

    TRL's own draws the orders one after another, and a resumed run begins with the first again.
    """

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


class RolloutTrainer(GRPOTrainer):
    """`GRPOTrainer` that keeps each rollout as an `Episode`.

    Args:
        mask_truncated: episodes cut by the length limit carry no loss.
        calls_per_turn: calls of a turn that are carried out at most, the first ones.
        clock: shared with the environments, which time their decoding in it.
        **arguments: those of `GRPOTrainer`.
    """

    def __init__(self, *, mask_truncated: bool, calls_per_turn: int, clock: Clock, **arguments: Any) -> None:
        self._mask_truncated = mask_truncated
        self.clock = clock
        self.episodes: list[Episode] = []
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[list[int]] = []
        self._batch_environments: list[str | None] = []
        super().__init__(**arguments)
        multiply_patches(self.model)
        self._vision_tokens = set(vision_token_ids(self._tokenizer))
        self._tokenizer.parse_response = partial(_parsed_response, self._tokenizer.parse_response, calls_per_turn)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(
            data_source=dataset or self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows, self._prompts, self.episodes = inputs, [], []
        batch = super()._generate_and_score_completions(inputs)
        if self._mask_truncated:
            # TRL's own option hides cut episodes from attention too, and their images then count for the next ones.
            cut = torch.tensor([episode.truncated for episode in self.episodes], device=batch["tool_mask"].device)
            batch["tool_mask"] = batch["tool_mask"] * ~cut[:, None]
            batch["num_items_in_batch"] = self._loss_tokens(batch)
        return batch

    def _loss_tokens(self, batch: dict[str, Any]) -> torch.Tensor:
        """Tokens that carry loss, over all processes."""
        return self.accelerator.gather((batch["completion_mask"] * batch["tool_mask"]).sum()).sum()

    @torch.no_grad()
    def _logps_of(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities (B, C) of the completions under the policy that played them."""
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
            **{name: batch[name] for name in names if name in batch},
        )
        return logps

    def _generate(self, prompts: list[list[Message]]) -> tuple[Any, ...]:
        self._sync_tool_dicts = [_Tools(environment) for environment in self.environments]
        rollouts = super()._generate(prompts)
        for tools in self._sync_tool_dicts:
            if tools.fault:
                raise tools.fault
        _, completion_ids, tool_mask, completions, *_ = rollouts
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        for index, row in enumerate(self._rows):
            self._check_vision_tokens(row, completion_ids[index], tool_mask[index])
            turns = iter(self._written_turns(completion_ids[index], tool_mask[index]))
            said: list[Message] = [
                {"role": "assistant", "content": next(turns)} if message["role"] == "assistant" else message
                for message in completions[index]
            ]
            self.episodes.append(
                Episode(
                    row=row,
                    messages=[*prompts[index], *said],
                    truncated=not completion_ids[index] or completion_ids[index][-1] not in ends,
                )
            )
        return rollouts

    def _tokenize_prompts(self, prompts: list[list[Message]]) -> tuple[Any, ...]:
        """TRL's, once a question: all episodes of a group begin with the same prompt."""
        first: dict[str, Any] = {}
        names = list(self._batch_environments)
        for row, prompt, name in zip(self._rows, prompts, names, strict=True):
            if row["id"] not in first:
                self._batch_environments = [name]
                first[row["id"]] = super()._tokenize_prompts([prompt])
        self._batch_environments = names
        tokenized = [first[row["id"]] for row in self._rows]
        ids = [list(of_one[0]) for of_one, _, _ in tokenized]
        images = [list(of_one[0] or []) if of_one else None for _, of_one, _ in tokenized]
        fields = {
            name: torch.cat(values)
            if isinstance(values[0], torch.Tensor)
            else [row for value in values for row in value]
            for name in tokenized[0][2]
            if (values := [of_one[name] for _, _, of_one in tokenized])
        }
        return ids, images if any(images) else None, fields

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: list[Any] | None, *arguments: Any, **keywords: Any
    ) -> tuple[Any, ...]:
        self._prompts = self._prompts or list(prompt_ids)
        for ids, shown in zip(prompt_ids, images or [None] * len(prompt_ids), strict=True):
            self._check_images(ids, shown or [])
        with self.clock("generate"):
            return super()._generate_single_turn(prompt_ids, images, *arguments, **keywords)

    def ask(self, contents: Sequence[Sequence[Block]]) -> list[str]:
        """One turn of the current policy for each content of a user message, apart from any episode.

        All local rollouts go through the trainer's own generation in one batch, for it may be collective.
        """
        conversations = [[{"role": "user", "content": content}] for content in contents]
        tokenized = self.processing_class.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        fields = {name: value for name, value in tokenized.items() if name not in ("input_ids", "attention_mask")}
        # None, and not an empty list, stands for "no image" in TRL's calls of vLLM.
        images = [[block["image"] for block in content if block["type"] == "image"] or None for content in contents]
        written, _ = super()._generate_single_turn(
            tokenized["input_ids"], images if any(images) else None, fields, num_generations=1
        )
        return [self._tokenizer.decode(ids).removesuffix(self._tokenizer.eos_token) for ids in written]

    def _get_tool_suffix_ids(self, tool_messages: list[Message]) -> list[int]:
        """TRL's, from the text and the sizes of images: TRL processes all pixels to count their tokens."""
        said = [{"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant")]
        render = partial(self.processing_class.apply_chat_template, chat_template=self.chat_template, tokenize=False)
        before = render(said)
        text = render([*said, *tool_messages], add_generation_prompt=True)
        suffix = text[before.rindex(self._tokenizer.eos_token) + len(self._tokenizer.eos_token) :]
        token = self.processing_class.image_token
        first, *rest = suffix.split(token)
        images = [block["image"] for message in tool_messages for block in blocks_of(message) if "image" in block]
        for image, part in zip(images, rest, strict=True):
            first += token * self._tokens_of([image]) + part
        return self._tokenizer(first, add_special_tokens=False)["input_ids"]

    def _tokens_of(self, images: Sequence[Any]) -> int:
        """Tokens that stand for some images."""
        processor = self.processing_class.image_processor
        patches = sum(processor.get_number_of_image_patches(image.height, image.width) for image in images)
        return patches // processor.merge_size**2

    def _written_turns(self, ids: Sequence[int], mask: Sequence[int]) -> list[str]:
        """Text of each run of tokens that the policy wrote, the end-of-turn token left out."""
        runs = [[token for token, _ in run] for own, run in groupby(zip(ids, mask, strict=True), lambda x: x[1]) if own]
        return [self._tokenizer.decode(run).removesuffix(self._tokenizer.eos_token) for run in runs]

    def _check_images(self, ids: list[int], images: Sequence[Any]) -> None:
        tokens, expected = ids.count(self._image_pad_token_id), self._tokens_of(images)
        if tokens != expected:
            known = zip(self._prompts, self._rows, strict=True)
            sample = next((row["id"] for prompt, row in known if ids[: len(prompt)] == prompt), "?")
            raise ImageMismatchError(
                f"sample {sample!r}: {tokens} image tokens stand for {len(images)} images of {expected} tokens: "
                "the chat template, the image processor and the frame cache do not fit each other"
            )

    def _check_vision_tokens(self, row: dict[str, Any], ids: Sequence[int], mask: Sequence[int]) -> None:
        written = {token for token, own in zip(ids, mask, strict=True) if own} & self._vision_tokens
        if written:
            raise ImageMismatchError(
                f"sample {row['id']!r}: the policy wrote {self._tokenizer.decode(sorted(written))}, which stands for "
                "an image that is not there: suppress these tokens in generation"
            )

    # Where the time goes

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """TRL's, timed."""
        with self.clock("loss"):
            return super().training_step(*arguments, **keywords)

    def _prepare_inputs(self, *arguments: Any, **keywords: Any) -> Any:
        with self.clock("other"):
            return super()._prepare_inputs(*arguments, **keywords)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **keywords: Any) -> Any:
        with self.clock("loss"):
            return super()._get_per_token_logps_and_entropies(*arguments, **keywords)
