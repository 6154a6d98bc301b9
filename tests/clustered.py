"""A command on a cluster, in a process of its own: ``python tests/clustered.py STAGE FOLDER SETTINGS.json``.

The processes of a training on the cluster import this file too: they let a scripted policy play, by an encoder that
knows the shapes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL.Image import Image
from scripted import ANSWER, CALL, script_trainer, use_oracle

from timesearch.base.errors import TemporaryError, TimeSearchError
from timesearch.settings import Settings

TURNS = [[CALL, ANSWER], [ANSWER, ANSWER.replace("{colour}", "blue")]]


class SlowColours:
    """An encoder that takes its time."""

    name, pretrained, preprocessing, digest = "colours", "", "", ""

    def prepare(self, images: list[Image]) -> np.ndarray:
        return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images])

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(1.0)
        return np.eye(4, dtype=np.float32)[[0] * len(batch)]


def train(settings: Settings) -> Path:
    """What each process of the training does."""
    from timesearch.training.launch import load_trainer

    stage = load_trainer(settings.train.generation)
    use_oracle()
    script_trainer(TURNS)
    trained: Path = stage.run(settings)
    return trained


def coldstart(settings: Settings) -> Path:
    """What the process of the cold start does; in it the stage is as it is."""
    from timesearch.training.coldstart import coldstart_here

    use_oracle()
    return coldstart_here(settings)


def run(stage: str, settings: Settings) -> None:
    if stage == "train":
        import clustered  # by its own name, under which other processes find it

        from timesearch.training import launch

        launch.train_here = clustered.train
        launch.run(settings)
    elif stage == "coldstart":
        import clustered

        from timesearch.training import coldstart as stage_of_it

        stage_of_it.coldstart_here = clustered.coldstart  # type: ignore[assignment]
        stage_of_it.run(settings)
    elif stage == "infer":
        from timesearch.inference.infer import run as infer

        use_oracle()
        infer(settings)


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    try:
        run(sys.argv[1], Settings.model_validate_json(Path(sys.argv[3]).read_text()))
    except TimeSearchError as error:
        print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, TemporaryError) else 2)
