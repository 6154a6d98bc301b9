"""Stage `train`: GRPO-CSV from the cold-started policy, in this process or as one of several."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoConfig, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig

from timesearch.base.batch import write_failures
from timesearch.base.errors import RequestError
from timesearch.base.model_folders import LOADING
from timesearch.base.progress import console, progress_bar
from timesearch.inference.playing import search_maker
from timesearch.rewards import weighed
from timesearch.search.budget import prompt_tokens
from timesearch.search.checkpoint import load_processor, vision_token_ids
from timesearch.search.environment import environment_factory
from timesearch.search.protocol import SearchProtocol
from timesearch.settings import Settings
from timesearch.training.data import load_training_samples, require_trainable, training_rows
from timesearch.training.folder import latest_checkpoint, prepare_run_folder
from timesearch.training.grpo_csv import GRPOCSVTrainer
from timesearch.training.launch import refuse_unfit
from timesearch.training.rollouts import Clock
from timesearch.training.supervised import adapters, freeze_vision


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
    environment = environment_factory(search_maker(settings, encoder), settings.search.tools, partial(clock, "decode"))
    protocol = SearchProtocol.load(settings.search.prompts)
    rank = settings.train.lora_rank
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
            weights=settings.train.rewards,
            zero_advantage=settings.train.zero_advantage,
            mask_truncated=settings.train.mask_truncated,
            calls_per_turn=protocol.rules.calls_per_turn,
            format_tokens=settings.train.format_tokens,
            clock=clock,
            model=str(policy),
            args=config,
            train_dataset=Dataset.from_list(training_rows(samples, settings, protocol.texts["system"])),
            processing_class=load_processor(policy),
            environment_factory=environment,
            callbacks=callbacks,
            peft_config=adapters(rank, not settings.train.freeze_vision) if rank else None,
        )
        if settings.train.freeze_vision and not rank:
            freeze_vision(trainer.model)
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
        model_init_kwargs={"dtype": "bfloat16" if train.bf16 and (zero or train.lora_rank) else "float32", **LOADING},
        max_steps=train.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        beta=train.beta,
        num_generations=train.num_generations,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=passes,
        temperature=train.temperature,
        loss_type=train.loss_type,
        scale_rewards=train.scale_rewards,
        reward_weights=[train.rewards[part.name] for part in weighed(train.rewards)],
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
    return int(AutoConfig.from_pretrained(policy, trust_remote_code=False).get_text_config().max_position_embeddings)


def _save(trainer: GRPOCSVTrainer, folder: Path) -> None:
    """Write the checkpoint, adapters merged into it, and let go of what was kept for resuming."""
    if is_peft_model(trainer.model):
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        (folder / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
