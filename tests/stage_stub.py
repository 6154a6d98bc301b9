"""A stand-in for the stage commands in tests of the orchestration: quick, with outputs that follow from its inputs.

    python stage_stub.py STAGE

It reads params.yaml, waits `seconds.txt` seconds, and writes the stage's outputs of dvc.yaml. `train` keeps
a step count in its output and goes on from it, as training does from a checkpoint. `fail.txt` holds lines
`STAGE STATUS TIMES`: that stage ends with that exit status so many times. Each run is noted in ran.log.
"""

import json
import os
import sys
import time
from pathlib import Path

import yaml

stage = sys.argv[1]
params = yaml.safe_load(Path("params.yaml").read_text())
noted = Path(os.environ.get("STAGE_STUB_LOG", "ran.log"))
with noted.open("a") as log:
    log.write(f"{stage} {Path.cwd().name}\n")

fail = Path("fail.txt")
for line in fail.read_text().splitlines() if fail.exists() else []:
    name, status, times = line.split()
    counter = Path(f".failed-{name}")
    failed = int(counter.read_text()) if counter.exists() else 0
    if name == stage and failed < int(times):
        counter.write_text(str(failed + 1))
        print(f"timesearch: planted failure {failed + 1}, token {os.environ.get('HF_TOKEN')}", flush=True)
        sys.exit(int(status))

seconds = float(Path("seconds.txt").read_text()) if Path("seconds.txt").exists() else 0.0
for done in range(5):
    time.sleep(seconds / 5)
    print(f"{stage}: {done + 1}/5, from https://user:planted@example.org/a?token=planted", flush=True)

text = f"{stage} {params.get(stage)} {params['seed']}"
outputs = {
    "download": ["cache/videos/a.mp4"],
    "models": ["models/encoder/m", "models/policy/m"],
    "frames": ["cache/frames/a.frames"],
    "features": ["cache/features/a.safetensors"],
    "subtitles": ["cache/subtitles/a.subtitles"],
    "coldstart": ["runs/coldstart/m"],
    "train": ["runs/train/m", "runs/train/metrics.csv", "runs/train/config.json", "runs/train/model.safetensors"],
    "infer": ["results/predictions/grpo_csv.jsonl"],
    "evaluate": [
        "results/metrics.json",
        "results/table.md",
        "results/report.html",
        "results/evaluation/grpo_csv.json",
        "results/plots/f1_by_frames.csv",
        "results/plots/tool_calls_by_turn.csv",
    ],
}
inputs = {"infer": "runs/train/m", "evaluate": "results/predictions/grpo_csv.jsonl", "train": "runs/coldstart/m"}
if stage in inputs:
    text += "\n" + Path(inputs[stage]).read_text()
for output in outputs[stage]:
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {"qa_accuracy": params["train"]["learning_rate"], "temporal_f1": 0.5}
    if path.name == "metrics.json":
        path.write_text(json.dumps({"uniform": {"qa_accuracy": 0.25}, "grpo_csv": figures}))
    elif path.name == "grpo_csv.json":
        others = ("temporal_precision", "temporal_recall", "visual_f1")
        made = {"digest": "abc", "made_of": {"seed": params["seed"]}, "questions": {"count": 3, "digest": "def"}}
        rest = {"by": {}, "failures": {}, "threshold": 5.0, "episodes": 3, "errors": 0, "fingerprint": made}
        rest["intervals"] = {"temporal_f1": [0.4, 0.6]}
        path.write_text(json.dumps({**dict.fromkeys(others), **figures, **rest}))
    elif path.name == "config.json":
        path.write_text("{}")
    elif path.name == "metrics.csv":
        path.write_text("step,reward,accuracy,completeness\n1,0.5,0.2,0.1\n")
    elif path.name == "f1_by_frames.csv":
        path.write_text("method,frames,temporal_f1,episodes\ngrpo_csv,1-4,0.5,3\n")
    elif path.name == "tool_calls_by_turn.csv":
        path.write_text("method,turn,tool_calls,episodes\ngrpo_csv,1,0.5,3\n")
    elif path.name == "table.md":
        path.write_text(f"| method | lr |\n| --- | --- |\n| grpo_csv | {params['train']['learning_rate']} |\n")
    else:
        path.write_text(text)
