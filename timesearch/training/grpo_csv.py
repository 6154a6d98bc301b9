"""GRPO with completeness self-verification (GRPO-CSV; arXiv 2511.05489, Section 3.2) on TRL's `GRPOTrainer`.

For each question the policy plays G episodes of thought, search and answer. Then it meets the question once more, with
nothing but the frames that the episode searched, and answers again: the *re-answer*. An episode's reward is

    R = 1.0 format + 0.5 accuracy + 0.5 completeness,    completeness = accuracy x accuracy of the re-answer,

its advantage is R minus the mean of its group, and the clipped policy-gradient loss (plus beta times the KL
divergence from the start) is taken over the tokens that the policy wrote. Re-answers are scored, never learned from.

Everything but that is TRL's: episodes (`environment_factory`), generation by transformers or vLLM, losses, KL, LoRA,
DeepSpeed. It departs from the paper's code in that the searched frames stay visible to the policy in the loss (there
they are hidden by the attention mask), and in that an image lost on its way stops the run.

Private names of TRL that are used, each held by a test: `_generate`, `_generate_single_turn`,
`_generate_and_score_completions`, `_get_per_token_logps_and_entropies`, `_get_tool_suffix_ids`, `_get_train_sampler`,
`_prepare_inputs`, `_sync_tool_dicts`, `_tokenize_prompts`, `_batch_environments`, `_image_pad_token_id`, `_tokenizer`.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoConfig, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from timesearch.batch import write_failures
from timesearch.errors import RequestError, TimeSearchError
from timesearch.messages import Message, final_answer, parse_turn, searched_seconds
from timesearch.progress import console, progress_bar
from timesearch.rewards import accuracy, score_episode
from timesearch.search.budget import prompt_tokens
from timesearch.search.checkpoint import load_processor, multiply_patches, vision_token_ids
from timesearch.search.environment import SearchEnvironment, environment_factory
from timesearch.search.episode import system_message
from timesearch.search.prompts import Prompts
from timesearch.search.search import Search
from timesearch.settings import Settings, Train
from timesearch.training.data import dataset_row, load_training_samples, require_trainable
from timesearch.training.folder import latest_checkpoint, prepare_run_folder
from timesearch.training.launch import refuse_unfit
from timesearch.training.replay import ReplayBuffer, idle_groups, refill

RESAMPLES = 2
"""Further batches that are played to replace groups without advantages."""
PARTS = ("format", "accuracy", "completeness")


class ImageMismatchError(TimeSearchError):
    """The image tokens of an episode do not fit its images: the policy would be trained on frames that it never saw."""


class Judge(Protocol):
    """What the reward needs of a judge."""

    async def score_many(self, triples: Sequence[tuple[str, str, str]]) -> list[float]:
        """Scores in [0, 1] of (question, reference answer, candidate answer)."""
        ...


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


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the epoch, so that a resumed run meets the questions it would have.

    TRL's own draws the orders one after another, and a resumed run begins with the first again.
    """

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


class GRPOCSVTrainer(GRPOTrainer):
    """`GRPOTrainer` that keeps each rollout as an `Episode` and can ask for re-answers.

    Args:
        judge: scores open-ended answers.
        verify: generate re-answers; without them this is plain GRPO on format and accuracy.
        zero_advantage: what becomes of groups that teach nothing: `keep`, `replay` or `resample`.
        mask_truncated: episodes cut by the length limit carry no loss.
        clock: shared with the environments, which time their decoding in it.
        **arguments: those of `GRPOTrainer`, without `reward_funcs`.
    """

    def __init__(
        self,
        *,
        judge: Judge,
        verify: bool,
        zero_advantage: str,
        mask_truncated: bool,
        clock: Clock,
        **arguments: Any,
    ) -> None:
        self._judge = judge
        self._verify = verify
        self._zero_advantage = zero_advantage
        self._mask_truncated = mask_truncated
        self.clock = clock
        self.episodes: list[Episode] = []
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[list[int]] = []
        self._batch_environments: list[str | None] = []
        super().__init__(reward_funcs=[self._reward(part) for part in PARTS[: 3 if verify else 2]], **arguments)
        multiply_patches(self.model)
        self._vision_tokens = set(vision_token_ids(self._tokenizer))
        # As many groups as this process plays in a step: more than that are never put back.
        episodes = self.args.generation_batch_size // self.accelerator.num_processes
        self._replay = ReplayBuffer(capacity=episodes // math.gcd(episodes, self.num_generations))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(
            data_source=dataset or self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    # Rollouts

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
                batch, more = refill(batch, self._play(self._other_rows(len(inputs), attempt)), size, pad_token)
                self.episodes = kept + self.episodes
                replaced += more
        batch["num_items_in_batch"] = self._loss_tokens(batch)
        self._metrics["train"]["replaced"].append(replaced * size / len(inputs))
        return batch

    def _play(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
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

    def _other_rows(self, count: int, attempt: int) -> list[dict[str, Any]]:
        """This process's share of a fresh draw of questions, the same in every process."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        draw = torch.Generator().manual_seed(hash((self.args.seed, self.state.global_step, attempt)))
        questions = torch.randperm(len(self.train_dataset), generator=draw).tolist()
        groups = count * processes // self.num_generations
        rows = [index for index in (questions * groups)[:groups] for _ in range(self.num_generations)]
        return [self.train_dataset[index] for index in rows[rank * count : (rank + 1) * count]]

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
            said = [
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

    def _get_tool_suffix_ids(self, tool_messages: list[Message]) -> list[int]:
        """TRL's, from the text and the sizes of images: TRL processes all pixels to count their tokens."""
        said = [{"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant")]
        render = partial(self.processing_class.apply_chat_template, chat_template=self.chat_template, tokenize=False)
        before = render(said)
        text = render([*said, *tool_messages], add_generation_prompt=True)
        suffix = text[before.rindex(self._tokenizer.eos_token) + len(self._tokenizer.eos_token) :]
        token = self.processing_class.image_token
        first, *rest = suffix.split(token)
        images = [block["image"] for message in tool_messages for block in message["content"] if "image" in block]
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

    # Rewards

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
        conversations = [
            [{"role": "user", "content": content or [{"type": "text", "text": row["question"]}]}]
            for content, row in zip(contents, self._rows, strict=True)
        ]
        tokenized = self.processing_class.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        fields = {name: value for name, value in tokenized.items() if name not in ("input_ids", "attention_mask")}
        # None, and not an empty list, stands for "no image" in TRL's calls of vLLM.
        images = [
            [block["image"] for block in content or [] if block["type"] == "image"] or None for content in contents
        ]
        written, _ = super()._generate_single_turn(
            tokenized["input_ids"], images if any(images) else None, fields, num_generations=1
        )
        for episode, content, ids in zip(self.episodes, contents, written, strict=True):
            if content:
                text = self._tokenizer.decode(ids).removesuffix(self._tokenizer.eos_token)
                episode.reanswer = parse_turn(text).answer

    def _score(self, log_metric: Callable[[str, float], None]) -> None:
        judged = asyncio.run(self._judge_answers())
        for episode in self.episodes:
            row = episode.row

            def verdict(reference: str, candidate: str, question: str = row["question"]) -> float:
                return judged[question, reference, candidate]

            episode.scores = score_episode(
                episode.messages, row["answer"], row["type"], episode.reanswer, judge=verdict
            )
            episode.scores["reanswer_accuracy"] = accuracy(episode.reanswer, row["answer"], row["type"], judge=verdict)
        for name, value in episode_metrics(self.episodes).items():
            log_metric(name, value)

    async def _judge_answers(self) -> dict[tuple[str, str, str], float]:
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


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a person watches, as means over episodes: shares in [0, 1], and counts an episode."""
    count = len(episodes)
    calls = [sum(message["role"] == "tool" for message in episode.messages) for episode in episodes]
    return {
        "answer_rate": sum(final_answer(episode.messages) is not None for episode in episodes) / count,
        "search_rate": sum(bool(episode.searched) for episode in episodes) / count,
        "reanswer_accuracy": sum(episode.scores["reanswer_accuracy"] for episode in episodes) / count,
        "tool_calls": sum(calls) / count,
        "frames": sum(len(set(episode.searched)) for episode in episodes) / count,
        "ill_formed": sum(episode.scores["format"] < 1 for episode in episodes) / count,
        "truncated": sum(episode.truncated for episode in episodes) / count,
    }


# The stage


def run(settings: Settings) -> Path:
    """Train `runs/coldstart` into `runs/train`, in this process or as one of several that a launcher started.

    The folder gets a whole checkpoint (safetensors and processor), `metrics.jsonl`, sampled `episodes/` and
    `failures.jsonl`. While a run lasts, `checkpoints/` is there too, and the same call goes on from it.

    Raises:
        RequestError: too few usable samples, no policy, or settings that `grpo_config` refuses.
    """
    from timesearch.judge.client import make_judge
    from timesearch.judge.server import judge_server
    from timesearch.retrieval.features import default_encoder
    from timesearch.tracking import stage_run
    from timesearch.training.watch import Watch, write_table

    disable_progress_bar()
    folder = settings.paths.train
    samples, failures = load_training_samples(settings)
    if len(samples) < settings.train.prompts_per_step:
        raise RequestError(
            f"a step takes {settings.train.prompts_per_step} questions (train.prompts_per_step), and "
            f"{settings.paths.train_samples} has {len(samples)} fit for training ({len(failures)} left out): "
            "lower it, or add samples"
        )
    policy = settings.paths.coldstart if settings.paths.coldstart.is_dir() else settings.paths.models / "policy"
    if not (policy / "config.json").is_file():
        raise RequestError(f"{policy} holds no policy: run the stages 'models' and 'coldstart' first")
    require_trainable(policy, settings.search)
    config = grpo_config(settings, str(policy))
    main = config.process_index == 0
    if main:
        prepare_run_folder(folder, settings, "train", policy)
        write_failures(folder / "failures.jsonl", failures)
    config.distributed_state.wait_for_everyone()
    checkpoint = latest_checkpoint(folder / "checkpoints", config.world_size)

    clock = Clock()
    encoder = default_encoder(settings)
    make_search = partial(Search, settings.search, encoder, settings.paths.frames, settings.paths.features)
    environment = environment_factory(make_search, settings.search.tools, partial(clock, "decode"))
    system = system_message(Prompts.load(settings.search.prompts), [], "template")["content"]
    with ExitStack() as stack:
        callbacks = []
        if main:
            bar = stack.enter_context(progress_bar("train", settings.train.steps))
            record = stack.enter_context(stage_run(settings, "train", keep=folder / "mlflow_run"))
            if any(sample.type == "open_ended" for sample in samples):
                stack.enter_context(judge_server(settings.judge, say=console.print))
            callbacks = [Watch(folder, record, bar, settings.paths.frames, settings.train.log_episodes_every)]
        trainer = GRPOCSVTrainer(
            judge=make_judge(settings.judge),
            verify=settings.train.completeness_weight > 0,
            zero_advantage=settings.train.zero_advantage,
            mask_truncated=settings.train.mask_truncated,
            clock=clock,
            model=str(policy),
            args=config,
            train_dataset=Dataset.from_list([dataset_row(sample, system) for sample in samples]),
            processing_class=load_processor(policy),
            environment_factory=environment,
            callbacks=callbacks,
            peft_config=_lora(settings.train),
        )
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train(resume_from_checkpoint=checkpoint)
        _save(trainer, folder)
    if main:
        write_table(folder)
    return folder


def grpo_config(settings: Settings, policy: str) -> GRPOConfig:
    """TRL's configuration of a run.

    Raises:
        RequestError: settings that do not go together, or the episodes of a step do not divide into processes and
            micro-batches.
    """
    train, search = settings.train, settings.search
    cuda = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    refuse_unfit(train, processes)
    passes, rest = divmod(train.prompts_per_step * train.num_generations, processes * train.micro_batch)
    if rest:
        raise RequestError(
            f"train.prompts_per_step x train.num_generations ({train.prompts_per_step} x {train.num_generations}) "
            f"does not divide into {processes} processes with micro-batches of {train.micro_batch} episodes"
        )
    processor = load_processor(policy)
    vision = vision_token_ids(processor.tokenizer)
    vllm = train.generation != "transformers"
    # DeepSpeed keeps a float32 master copy of bf16 weights itself; elsewhere what is trained is float32.
    zero = train.launcher in ("zero2", "zero3")
    return GRPOConfig(
        output_dir=str(settings.paths.train / "checkpoints"),
        model_init_kwargs={"dtype": "bfloat16" if train.bf16 and (zero or train.lora_rank) else "float32"},
        max_steps=train.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",
        beta=train.beta,
        num_generations=train.num_generations,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=passes,
        temperature=train.temperature,
        loss_type=train.loss_type,
        scale_rewards=train.scale_rewards,
        reward_weights=[train.format_weight, train.accuracy_weight, train.completeness_weight][
            : 3 if train.completeness_weight > 0 else 2
        ],
        max_completion_length=train.max_completion_length,
        max_tool_calling_iterations=search.max_turns - 1,
        # The policy must not write tokens that stand for images. vLLM takes this as a bias on the logits.
        generation_kwargs={"max_tokens": search.max_new_tokens, "logit_bias": dict.fromkeys(vision, -100.0)}
        if vllm
        else {"max_new_tokens": search.max_new_tokens, "suppress_tokens": vision},
        use_vllm=vllm,
        vllm_mode="server" if train.generation == "vllm_server" else "colocate",
        vllm_server_base_url=train.vllm_url,
        vllm_max_model_length=min(prompt_tokens(search) + train.max_completion_length, _context(policy)),
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=train.bf16,
        use_cpu=not cuda,
        seed=settings.seed,
        save_steps=train.save_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


def _context(policy: str) -> int:
    """Length of a checkpoint's context in tokens."""
    return int(AutoConfig.from_pretrained(policy).get_text_config().max_position_embeddings)


def _lora(train: Train) -> Any:
    if not train.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=train.lora_rank, lora_alpha=2 * train.lora_rank, target_modules="all-linear")


def _save(trainer: GRPOCSVTrainer, folder: Path) -> None:
    """Write the checkpoint, adapters merged into it, and let go of what was kept for resuming."""
    if is_peft_model(trainer.model):
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        (folder / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
