"""Supervised fine-tuning on whole episodes: the loss falls on what the policy itself wrote, and on nothing else.

An example is a conversation as an episode leaves it (system, preview, assistant, tool message with frames, assistant,
...), rendered by the processor's chat template with the tools and with the images of tool messages in their place, so
that its token ids are those of GRPO and of inference. Assistant turns, each with its closing `<|im_end|>`, carry the
loss; prompts, previews and searched frames are seen and carry none. The optimiser loop is transformers' `Trainer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError, RequestError
from timesearch.data.messages import Message
from timesearch.training.folder import latest_checkpoint

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a token that carries no loss."""
UNKNOWN = "I don't know"
"""What the re-answer says where the frames do not settle the question, in the words of its prompt."""


@dataclass(frozen=True)
class Example:
    """A conversation to imitate; `tools` are the schemas that its system message shows."""

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Collator:
    """Turns examples into a padded batch with labels.

    Args:
        processor: of the policy; its chat template must know tools.
        learned_only: let the model compute the logits of learned tokens alone. The loss is the same to rounding; those
            of a whole long episode would take tens of GiB.
    """

    def __init__(self, processor: Any, learned_only: bool = False) -> None:
        self._processor = processor
        self._learned_only = learned_only
        tokenizer = processor.tokenizer
        self._opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self._closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._image = tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Encode examples.

        Returns:
            The processor's tensors, with `input_ids`, `attention_mask` and `labels` of shape (examples, longest),
            padded on the right. With `learned_only` also `logits_to_keep`, the K positions before a learned token of
            any example, and `shift_labels` (examples, K), the labels of the tokens after them.

        Raises:
            ItemError: `image_mismatch` or `turn_mismatch`, naming the example.
        """
        import torch

        texts = [
            self._processor.apply_chat_template(example.messages, tools=example.tools or None, tokenize=False)
            for example in examples
        ]
        images = [images_of(example.messages) for example in examples]
        for example, text, group in zip(examples, texts, images, strict=True):
            marks = text.count(self._processor.image_token)
            if marks != len(group):
                raise ItemError(
                    f"{example.name}: {marks} image marks in its text, {len(group)} images; is there vision markup?",
                    reason="image_mismatch",
                )
        batch = self._processor(
            text=texts,
            images=[image for group in images for image in group] or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        done = 0
        merge = self._processor.image_processor.merge_size**2
        for row, (example, group) in enumerate(zip(examples, images, strict=True)):
            ids = batch["input_ids"][row]
            features = sum(
                int(grid.prod()) // merge for grid in batch.get("image_grid_thw", [])[done : done + len(group)]
            )
            done += len(group)
            tokens = int((ids == self._image).sum())
            if tokens != features:
                raise ItemError(
                    f"{example.name}: {tokens} image tokens stand for {features} image features",
                    reason="image_mismatch",
                )
            spans = self.assistant_spans(ids.tolist())
            turns = sum(message["role"] == "assistant" for message in example.messages)
            if len(spans) != turns:
                raise ItemError(
                    f"{example.name}: {len(spans)} assistant turns are found in the tokens of {turns}; "
                    "does its text hold chat markup?",
                    reason="turn_mismatch",
                )
            for start, end in spans:
                labels[row, start:end] = ids[start:end]
        if not self._learned_only:
            return {**batch, "labels": labels}
        kept = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
        return {**batch, "labels": labels, "logits_to_keep": kept, "shift_labels": labels[:, kept + 1]}

    def assistant_spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """[start, end) of each assistant turn in token ids: after its header, up to and with its closing token."""
        spans, at, header = [], 0, len(self._opening)
        while at + header <= len(ids):
            if ids[at : at + header] != self._opening:
                at += 1
                continue
            start = at + header
            end = ids.index(self._closing, start) + 1 if self._closing in ids[start:] else start
            if end > start:
                spans.append((start, end))
            at = max(end, start)
        return spans


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures of a conversation, in order."""
    return [
        block["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for block in message["content"]
        if block["type"] == "image"
    ]


def adapters(rank: int, vision: bool) -> Any:
    """LoRA of a rank on all linear layers, those of the vision tower only where it is trained (`vision`)."""
    from peft import LoraConfig

    frozen = None if vision else r".*\bvisual\b.*"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=frozen)


def freeze_vision(model: Any) -> None:
    """Let the vision tower of a model stay as it is."""
    model.model.visual.requires_grad_(False)


@dataclass(frozen=True)
class Plan:
    """How to optimise: `batch_size` examples a step over all processes, each taking `micro_batch` at a time."""

    steps: int
    batch_size: int
    learning_rate: float
    micro_batch: int | None = None
    warmup: int = 10
    decay: bool = True
    """fall linearly to zero; else stay constant"""
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    save_steps: int = 0
    """write a checkpoint to resume from every so many steps; 0: never"""
    in_order: bool = False
    """take examples by their numbers, for datasets that are in disorder already and make batches of one kind"""


def fine_tune(
    model: Any,
    processor: Any,
    examples: Any,
    plan: Plan,
    folder: Path | str,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    vision: bool = True,
) -> Any:
    """Train `model` on examples, and give it back with adapters merged.

    Args:
        model: a vision-language model of transformers.
        processor: of the model.
        examples: a map-style dataset of `Example`.
        plan: how to optimise.
        folder: takes checkpoints while training goes on; a run that finds one there resumes from it.
        on_step: is told the step from 1 and `loss`, `learning_rate`, `grad_norm`; in the first process alone. A run
            that resumes tells the steps before it again.
        vision: train the vision tower too.

    Raises:
        RequestError: the batch cannot be divided as the plan asks.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for logs in state.log_history:
                self._tell(state, logs["step"], logs)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            self._tell(state, state.global_step, logs or {})

        def _tell(self, state: Any, step: int, logs: dict[str, float]) -> None:
            if on_step and state.is_world_process_zero and "loss" in logs:
                on_step(step, {key: logs[key] for key in ("loss", "learning_rate", "grad_norm")})

    cuda = torch.cuda.is_available()
    if plan.lora_rank:
        from peft import get_peft_model

        model = get_peft_model(model, adapters(plan.lora_rank, vision))
    elif not vision:
        freeze_vision(model)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = plan.batch_size // processes
    micro = min(plan.micro_batch or local, local)
    if micro * (local // micro) * processes != plan.batch_size:
        raise RequestError(
            f"a batch of {plan.batch_size} cannot be shared by {processes} processes in micro-batches of {micro}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=local // micro,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear" if plan.decay else "constant_with_warmup",
        warmup_steps=plan.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        seed=plan.seed,
        train_sampling_strategy="sequential" if plan.in_order else "random",
        bf16=plan.bf16,
        use_cpu=not cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        gradient_checkpointing=plan.gradient_checkpointing,
        save_strategy="steps" if plan.save_steps else "no",
        save_steps=plan.save_steps or 1,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=cuda,
    )
    # A process trains on one GPU. On several that it sees, `Trainer` would split batches by `DataParallel`, which cuts
    # the rows of pixels without regard to whose they are.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        # On a CPU nothing is left out: the pocket models' published numbers rest on every rounding.
        data_collator=Collator(processor, learned_only=cuda),
        processing_class=processor,
        callbacks=[Report()],
    )
    # Every learned token counts the same, however a batch is cut. transformers takes Qwen-VL for models that cannot be
    # told the number of tokens, and would take the mean of the micro-batches' means.
    trainer.model_accepts_loss_kwargs = local > micro
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=latest_checkpoint(Path(folder), processes) if plan.save_steps else None)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return trained.merge_and_unload() if plan.lora_rank else trained
