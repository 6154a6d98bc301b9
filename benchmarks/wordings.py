"""What a tool's wording costs: the policy of the hop world, told of the same tool in words that it never met.

    uv run python benchmarks/wordings.py [--policy pretrained/hops] [--encoder models/encoder] [--episodes 100]

Episodes that follow every hop are written about held-out videos, and each of their turns is played greedily on what was
there before. Printed by wording is the share of turns with the right call or answer:

- *its own*: the schema that the tool has;
- *as pretrained*: a schema drawn as in pretraining, among them tools and arguments by other names;
- *unseen description*: what tool and arguments are for, in words that pretraining has not;
- *unseen names*: the tool and its arguments by such names too, which have to be copied letter by letter.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from timesearch.pocket.encoder import CURRICULA, train_encoder
from timesearch.pocket.hop_lessons import questions_of
from timesearch.pocket.hop_traces import HOP_CLEAN, write_hop_trace
from timesearch.pocket.hops import WORLD
from timesearch.pocket.lessons import Corpus
from timesearch.pocket.pretrain import cached_corpus, share_right
from timesearch.pocket.wordings import Wording, draw_wording
from timesearch.pocket.world import generator
from timesearch.profiles import load_profile
from timesearch.retrieval.encoder import load_encoder
from timesearch.search.checkpoint import load_model, load_processor
from timesearch.training.supervised import Example

DESCRIPTION = "Fetch stills out of this film by comparing them against a phrase; repeated usage helps."
SAID = {
    "query": "Phrase naming an object worth finding.",
    "start_time": "Earliest second that counts.",
    "end_time": "Final second that counts.",
    "num_frames": "Upper bound on stills handed back.",
}
NAMES = {"query": "phrase", "start_time": "earliest", "end_time": "final", "num_frames": "bound"}
Draw = Callable[[np.random.Generator, Sequence[dict[str, Any]]], Wording]


class Episodes:
    """Lessons that differ in the wording alone."""

    def __init__(self, corpus: Corpus, draw: Draw) -> None:
        self._corpus, self._draw = corpus, draw
        self._asked = questions_of(corpus.samples)

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, number: int) -> Example:
        sample, question = self._asked[number]
        row = {"video": sample.video, "question": sample.question}
        trace = write_hop_trace(self._corpus.search, row, question, HOP_CLEAN, generator("wordings", number))
        wording = self._draw(generator("wordings", "tool", number), self._corpus.tools)
        return Example(sample.id, [self._corpus.system, *wording.say(trace)], wording.tools)


def unseen(tools: Sequence[dict[str, Any]], named: bool) -> Wording:
    """The tool in the words above; `named` anew too, or by its own name."""
    schema = copy.deepcopy(tools[0])
    function = schema["function"]
    function["description"] = DESCRIPTION
    parameters = function["parameters"]
    for name, described in parameters["properties"].items():
        described["description"] = SAID[name]
    if not named:
        return Wording([schema])
    function["name"] = "fetch_stills"
    parameters["properties"] = {NAMES[name]: described for name, described in parameters["properties"].items()}
    parameters["required"] = [NAMES[name] for name in parameters["required"]]
    return Wording([schema], function["name"], NAMES)


WORDINGS: dict[str, Draw] = {
    "its own": lambda rng, tools: Wording(list(tools)),
    "as pretrained": draw_wording,
    "unseen description": lambda rng, tools: unseen(tools, named=False),
    "unseen names": lambda rng, tools: unseen(tools, named=True),
}


def main() -> None:
    """Cache the videos, play the turns and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("pretrained/hops"))
    parser.add_argument("--encoder", type=Path, help="folder of an encoder; one is trained where none is given")
    parser.add_argument("--episodes", type=int, default=100, help="five to a video")
    given = parser.parse_args()
    settings = load_profile("hops")
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.encoder or train_encoder(
            Path(scratch) / "encoder", settings.models.encoder_steps, curriculum=CURRICULA["pocket-hops"]
        )
        corpus = cached_corpus(
            settings, load_encoder(str(folder)), Path(scratch), WORLD, "heldout", -(-given.episodes // 5)
        )
        model, processor = load_model(given.policy).eval(), load_processor(given.policy)
        for name, draw in WORDINGS.items():
            shares[name] = share_right(model, processor, Episodes(corpus, draw), given.episodes)
    table = Table(title=f"{given.episodes} episodes of {given.policy}")
    table.add_column("wording")
    table.add_column("turns right, %", justify="right")
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
