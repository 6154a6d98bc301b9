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
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError
from timesearch.base.progress import Bar, progress_bar
from timesearch.pocket.dataset import samples_of
from timesearch.pocket.filesystem import scene_of
from timesearch.pocket.lessons import Corpus, Episodes, Lookup, Mixture, Reading
from timesearch.pocket.policy import make_policy, make_processor, make_tokenizer, save_policy
from timesearch.pocket.traces import BASE, CLEAN, SKILLED
from timesearch.pocket.world import COLOURS, SHAPES, generator
from timesearch.settings import Settings
from timesearch.training.supervised import Plan, fine_tune

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

VIDEOS = 500
"""Videos that the base is pretrained on; their seeds and split are nobody else's."""
ALIGN_STEPS = 400
Report = Callable[[int, dict[str, float]], None]


def pretrain(settings: Settings, encoder: Encoder, folder: Path, seed: int = 0) -> Path:
    """Train the base policy and write its checkpoint to `folder`, after each phase.

    Args:
        settings: of frames, features and search; the checkpoint is made for them.
        encoder: the pocket encoder.
        folder: gets the whole checkpoint.
        seed: of weights and examples.
    """
    with tempfile.TemporaryDirectory() as scratch:
        corpus = cached_corpus(settings, encoder, Path(scratch), "guess-proof", "pretrain", VIDEOS)
        tokenizer = make_tokenizer(settings.search.prompts)
        processor, model = make_processor(tokenizer), make_policy(tokenizer, seed)
        with progress_bar("align", ALIGN_STEPS) as bar:
            align(model, processor, corpus, ALIGN_STEPS, seed, partial(_advance, bar))
        save_policy(model, processor, folder)
        for title, examples, plan in _phases(corpus, seed):
            model.model.visual.requires_grad_(title == "base")
            with progress_bar(title, plan.steps) as bar:
                trainer = Path(scratch) / "trainer"
                model = fine_tune(model, processor, examples, plan, trainer, partial(_advance, bar))
            save_policy(model, processor, folder)
    return folder


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

    samples = [sample for seed in range(videos) for sample in samples_of(scene_of(world, split, seed))]
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


def _advance(bar: Bar, step: int, values: dict[str, float]) -> None:
    bar.advance(note=f"loss {values['loss']:.3f}")
