"""How the base policy is pretrained, from nothing but the generator: `timesearch models --rebuild`.

The base stands in for Qwen2.5-VL: it reads frames, knows the tool and the format, and searches badly. Phases, each on
top of the one before:

1. *align*: single frames; each vision token is matched with the embeddings of the frame's colour and shape word.
2. *see*: re-answers on few frames, look-ups without frames, and episodes that search well. The vision tower is
   frozen until the last phase: the noisy gradients of these steps would undo what it has learned about shapes.
3. *search*: more frames, questions that the frames do not answer ("I don't know"), and faulty episodes among good ones.
4. *base*: few steps on episodes with the `BASE` manners, which spoil the behaviour and leave the skill.

Good episodes come before bad ones, because copying the asked shape into the query is learned from consistent examples
alone.

The videos are rendered, encoded, decoded and embedded by the same code as everybody's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError
from timesearch.base.files import json_digest, write_json
from timesearch.base.model_folders import read_config
from timesearch.base.progress import Bar, console, progress_bar
from timesearch.data.samples import Sample
from timesearch.pocket.dataset import samples_of
from timesearch.pocket.filesystem import scene_of
from timesearch.pocket.lessons import Corpus, Episodes, Lookup, Mixture, Reading
from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
from timesearch.pocket.traces import BASE, CLEAN, SKILLED
from timesearch.pocket.world import COLOURS, SHAPES, generator
from timesearch.search.checkpoint import load_model
from timesearch.settings import Settings
from timesearch.training.supervised import Plan, fine_tune

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

VIDEOS = 500
"""Videos that the base is pretrained on; their seeds and split are nobody else's."""
ALIGN_STEPS = 400
Report = Callable[[int, dict[str, float]], None]


def pretrain(settings: Settings, encoder: Encoder, folder: Path, seed: int = 0) -> Path:
    """Train the base policy and write its checkpoint to `folder`, with a ``recipe.json`` that says how it was made.

    What is done is kept in `.rebuild` of the models' folder until then: a run that was stopped goes on, from the start
    of its phase at the latest. Each phase ends with a line of what it reached.

    Args:
        settings: of frames, features and search; the checkpoint is made for them.
        encoder: the pocket encoder.
        folder: gets the whole checkpoint.
        seed: of weights and examples.
    """
    work = settings.paths.models / ".rebuild"
    done = _begun(work, _recipe(settings, encoder, seed))
    corpus = _kept_corpus(settings, encoder, work)
    tokenizer = make_tokenizer(settings.search.prompts)
    processor, model = make_processor(tokenizer), make_policy(tokenizer, seed)
    if done["phases"]:
        model = load_model(work / done["phases"][-1]["phase"])

    def finish(title: str, steps: int, values: dict[str, float]) -> None:
        save_policy(model, processor, work / title)
        done["phases"].append({"phase": title, "steps": steps, **values})
        write_json(work / "recipe.json", done)
        shutil.rmtree(work / "trainer", ignore_errors=True)
        reached = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        console.print(f"{title}: {steps} steps, {reached}", markup=False, highlight=False)

    phases = [phase["phase"] for phase in done["phases"]]
    if "align" not in phases:
        with progress_bar("align", ALIGN_STEPS) as bar:
            last = _Last(bar)
            align(model, processor, corpus, ALIGN_STEPS, seed, last)
        finish("align", ALIGN_STEPS, last.values)
    for title, examples, plan in _phases(corpus, seed):
        if title in phases:
            continue
        model.model.visual.requires_grad_(title == "base")
        with progress_bar(title, plan.steps) as bar:
            last = _Last(bar)
            model = fine_tune(model, processor, examples, plan, work / "trainer", last)
        finish(title, plan.steps, last.values)
    save_policy(model, processor, folder)
    write_json(folder / "recipe.json", {**done, "made": datetime.now(UTC).date().isoformat()})
    shutil.rmtree(work)
    return folder


class _Last:
    """Shows the loss of each step, and remembers the last values."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self.values: dict[str, float] = {}

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.values = {name: value for name, value in values.items() if name in ("loss", "right")}
        self._bar.advance(note=f"loss {values['loss']:.3f}")


def _recipe(settings: Settings, encoder: Encoder, seed: int) -> dict[str, Any]:
    """What the checkpoint follows from, as far as it may change, and its digest."""
    nothing = Corpus([], settings.search, encoder, Path(), Path())
    made_from = {
        "seed": seed,
        "encoder": encoder.digest,
        "search": settings.search.shaping(),
        "frames": settings.frames.shaping(),
        "videos": VIDEOS,
        "align": ALIGN_STEPS,
        "phases": [[title, asdict(plan)] for title, _, plan in _phases(nothing, seed)],
    }
    return {"recipe": json_digest(made_from), "seed": seed}


def _begun(work: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What was done by this recipe; what another recipe left is removed."""
    mark = work / "recipe.json"
    done = read_config(mark) if mark.is_file() else {}
    if done.items() >= recipe.items():
        return done
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    done = {**recipe, "phases": []}
    write_json(mark, done)
    return done


def _kept_corpus(settings: Settings, encoder: Encoder, work: Path) -> Corpus:
    mark = work / "cached"
    if mark.is_file():
        return Corpus(
            _samples("guess-proof", "pretrain", VIDEOS), settings.search, encoder, work / "frames", work / "features"
        )
    corpus = cached_corpus(settings, encoder, work, "guess-proof", "pretrain", VIDEOS)
    mark.touch()
    return corpus


def _phases(corpus: Corpus, seed: int) -> list[tuple[str, Any, Plan]]:
    """Name, examples and plan of the phases after the first."""
    count = 10**6
    shown = Mixture(Reading(corpus, count, 4, 0.3, seed), Episodes(corpus, count, CLEAN, 0.0, seed), 0.5)
    skilled = Episodes(corpus, count, SKILLED, 0.25, seed + 1, reworded_tools=0.05)
    mixed = Mixture(Reading(corpus, count, 8, 0.4, seed + 1), skilled, 0.4)
    base = Episodes(corpus, count, BASE, 0.3, seed + 2, reworded_tools=0.05)
    return [
        ("see", Mixture(Lookup(count, seed), shown, 0.25), Plan(200, 48, 1.5e-3, warmup=20, decay=False, seed=seed)),
        ("search", mixed, Plan(150, 40, 1.5e-3, warmup=20, seed=seed)),
        ("base", base, Plan(50, 40, 5e-4, seed=seed)),
    ]


def cached_corpus(settings: Settings, encoder: Encoder, root: Path, world: str, split: str, videos: int) -> Corpus:
    """Render `videos` videos and make their caches under `root`.

    Args:
        settings: of frames, features and search.
        encoder: embeds the frames.
        root: gets `frames/` and `features/`; the videos themselves are removed.
        world: of the videos.
        split: of the videos; seeds are 0, 1, ...
        videos: how many.
    """
    from timesearch.retrieval.features import cache_features
    from timesearch.video.download import download_videos
    from timesearch.video.frames import cache_frames

    samples = _samples(world, split, videos)
    names = sorted({sample.video for sample in samples})
    results = [
        download_videos(samples, root / "videos", settings.download),
        cache_frames({name: root / "videos" / name for name in names}, root / "frames", settings.frames),
    ]
    caches = {name: root / "frames" / f"{name}.frames" for name in names}
    results.append(cache_features(caches, root / "features", encoder, settings.features))
    for result in results:
        if result.failures:
            raise ItemError(result.failures[0].message, reason=result.failures[0].reason)
    shutil.rmtree(root / "videos")
    return Corpus(samples, settings.search, encoder, root / "frames", root / "features")


def _samples(world: str, split: str, videos: int) -> list[Sample]:
    return [sample for seed in range(videos) for sample in samples_of(scene_of(world, split, seed))]


def align(model: Any, processor: Any, corpus: Corpus, steps: int, seed: int, report: Report) -> None:
    """Phase 1: match every vision token of single frames with the embeddings of their colour and shape word.

    Only the vision tower learns. Every token is to carry both words, so that attention to any of them reads the frame.
    """
    import torch

    ids = processor.tokenizer.convert_tokens_to_ids
    colour_ids = torch.tensor([ids(f"Ġ{colour}") for colour in COLOURS])
    shape_ids = torch.tensor([ids(f"Ġ{shape}") for shape in SHAPES])
    embeddings = model.get_input_embeddings()
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    rng = generator("align", seed)
    search = corpus.search
    for step in range(1, steps + 1):
        pictures: list[Any] = []
        colours, shapes = [], []
        while len(pictures) < 112:
            asked = corpus.asked[int(rng.integers(len(corpus.asked)))]
            search.open(asked.row)
            frames = search.video.frames
            for event in asked.scene.events:
                window = frames.window(event.start, event.end - 0.5)
                pictures.append(frames[int(rng.choice(window))])
                colours.append(list(COLOURS).index(event.colour))
                shapes.append(SHAPES.index(event.shape))
        batch = processor.image_processor(images=pictures, return_tensors="pt")
        features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        tokens_NTD = torch.stack(list(features))
        loss = torch.zeros(())
        for words, truth in ((colour_ids, colours), (shape_ids, shapes)):
            logits_NTW = tokens_NTD @ embeddings.weight[words].detach().T
            wanted_NT = torch.tensor(truth)[:, None].expand(logits_NTW.shape[:2])
            loss = loss + torch.nn.functional.cross_entropy(logits_NTW.flatten(0, 1), wanted_NT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = (logits_NTW.argmax(dim=2) == wanted_NT).float().mean()
        report(step, {"loss": float(loss.detach()), "right": float(right)})
