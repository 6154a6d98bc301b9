"""Trains two steps with vLLM colocated on its CPU build: ``python tests/colocated.py FOLDER`` prints what arrived.

The first episode of a step is made to search, the others are what a policy of random weights writes.

A program of its own, because vLLM wants its environment set before it is imported. Its CPU backend packs linear weights
away, so that an update does not find them; the plain linear is put in place of that here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}

import torch
import vllm.model_executor.layers.utils as layers
from scripted import CALL, build_project, make_settings, use_oracle

from timesearch.training import grpo_csv, train


def plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def by_length(messages: list[Any], *_: Any, **__: Any) -> dict[str, float]:
    return {"format": len(messages[-1]["content"]) % 7 / 7, "accuracy": 0.0, "completeness": 0.0}


def watch_engine(seen: list[dict[str, float]]) -> None:
    """Compare the engine's weights with the trainer's whenever episodes were generated; let the first one search."""
    generate = grpo_csv.GRPOCSVTrainer._generate_single_turn

    def watched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        written = generate(self, *arguments, **keywords)
        engine = self.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        theirs = dict(engine.named_parameters())
        mine = dict(self.model.named_parameters())
        embedding = mine["model.language_model.embed_tokens.weight"].detach()
        # vLLM holds its weights in bf16 and pads the vocabulary.
        arrived = theirs["language_model.model.embed_tokens.weight"][: len(embedding)]
        apart = float((arrived - embedding.to(arrived.dtype)).abs().max())
        seen.append({"step": self.state.global_step, "apart": apart, "sum": float(arrived.double().abs().sum())})
        ids, logps = written
        if len(ids) > 1:  # the first turn: only one episode has a second
            call = self._tokenizer(CALL.format(shape="ring") + "<|im_end|>", add_special_tokens=False)["input_ids"]
            ids[0], logps[0] = call, [0.0] * len(call)
        return ids, logps

    grpo_csv.GRPOCSVTrainer._generate_single_turn = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    layers.dispatch_cpu_unquantized_gemm = plain_linear
    root = Path(sys.argv[1])
    build_project(root, videos=4)
    os.chdir(root)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path.cwd()}/mlflow.db"
    use_oracle()
    grpo_csv.score_episode = by_length  # type: ignore[assignment]
    seen: list[dict[str, float]] = []
    watch_engine(seen)
    train.run(make_settings(generation="vllm_colocate", steps=2, max_completion_length=200))
    rows = [json.loads(line) for line in Path("runs/train/metrics.jsonl").read_text().splitlines()]
    print("RESULT " + json.dumps({"seen": seen, "rows": rows}))
