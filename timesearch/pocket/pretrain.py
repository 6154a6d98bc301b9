"""How a base policy is pretrained, from nothing but the generator: `timesearch models --rebuild`.

Which phases there are, and why, is in `timesearch.pocket.recipes`. Each runs in as many processes as training has on
this machine, which average their gradients, and each ends with a line of what it reached on videos that nothing was
learned from: of the turns of lessons, played greedily, the share with the right call or answer; of *align*, that of
vision tokens read rightly.

The videos are rendered, encoded, decoded and embedded by the same code as everybody's.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import json_digest, write_json
from timesearch.base.model_folders import read_config
from timesearch.base.progress import Bar, console, progress_bar
from timesearch.data.messages import parse_turn, text_of
from timesearch.data.samples import Sample
from timesearch.dialects import act_of
from timesearch.pocket.dataset import samples_of
from timesearch.pocket.filesystem import scene_of
from timesearch.pocket.hops import HopScene
from timesearch.pocket.lessons import Corpus, Lessons
from timesearch.pocket.policy import make_policy, make_processor, save_policy
from timesearch.pocket.recipes import RECIPES, Phase, Recipe
from timesearch.pocket.world import generator
from timesearch.search.checkpoint import load_model, load_processor
from timesearch.search.engine_transformers import Request, TransformersPolicy
from timesearch.settings import Settings
from timesearch.training.supervised import fine_tune

if TYPE_CHECKING:
    import numpy as np
    import torch

    from timesearch.retrieval.encoder import Encoder

Report = Callable[[int, dict[str, float]], None]
_ALIGN = "align"
_PLAYED = 24
"""Lessons whose turns are played to say what a phase reached."""
_HELD = 20
"""Videos that nothing is learned from, beyond those of the recipe."""
_TOGETHER, _WRITTEN = 32, 192
"""Turns that are played at the same time, and tokens of one at most."""


def pretrain(settings: Settings, encoder: Encoder, folder: Path, seed: int = 0) -> Path:
    """Train the base policy and write its checkpoint to `folder`, with a ``recipe.json`` that says how it was made.

    What is done is kept in `.rebuild` of the models' folder until then: a run that was stopped goes on where its phase
    last wrote a checkpoint, or from the start of the phase. Of another recipe, or an edited one, the phases are kept
    that come before what differs.

    Args:
        settings: of frames, features and search; the checkpoint is made for them.
        encoder: the pocket encoder.
        folder: gets the whole checkpoint.
        seed: of weights and examples.

    Raises:
        RequestError: there is no recipe for the encoder.
    """
    from timesearch.training.launch import run_processes

    if settings.models.encoder not in RECIPES:
        raise RequestError(
            f"models.encoder is {settings.models.encoder!r}, for which no base policy is pretrained: "
            f"a rebuild takes one of {', '.join(RECIPES)}"
        )
    recipe, work = RECIPES[settings.models.encoder], settings.paths.models / ".rebuild"
    digests = _digests(settings, recipe, encoder, seed)
    done = _begun(work, digests, seed)
    _keep_caches(settings, recipe, encoder, work)
    if not (work / "start" / "config.json").is_file():
        tokenizer = recipe.tokenizer(settings.search.prompts)
        model = make_policy(tokenizer, seed, recipe.layers, recipe.parts)
        save_policy(model, make_processor(tokenizer), work / "start")
    for title in list(digests)[1:]:
        if title in (phase["phase"] for phase in done["phases"]):
            continue
        last = work / (done["phases"][-1]["phase"] if done["phases"] else "start")
        if done.get("begun") != digests[title]:
            shutil.rmtree(work / "trainer", ignore_errors=True)
            write_json(work / "recipe.json", done | {"begun": digests[title]})
        if settings.train.processes > 1 and title != _ALIGN:
            write_json(work / "settings.json", settings.model_dump(mode="json"))
            run_processes(settings.train.processes, ["-m", __name__, str(work), title, last.name], work)
        else:
            carry_out(settings, encoder, title, last)
        done["phases"].append({**read_config(work / title / "reached.json"), "digest": digests[title]})
        write_json(work / "recipe.json", done)
        shutil.rmtree(work / "trainer", ignore_errors=True)
        values = {name: value for name, value in done["phases"][-1].items() if name not in ("phase", "steps", "digest")}
        reached = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        steps = done["phases"][-1]["steps"]
        console.print(f"{title}: {steps} steps, {reached}", markup=False, highlight=False)
    save_policy(load_model(work / title), load_processor(work / title), folder)
    made = {"recipe": digests[title], **done, "made": datetime.now(UTC).date().isoformat()}
    write_json(folder / "recipe.json", {name: value for name, value in made.items() if name not in ("caches", "begun")})
    shutil.rmtree(work)
    return folder


def carry_out(settings: Settings, encoder: Encoder, title: str, before: Path) -> None:
    """Carry out one phase, alone or as one of several processes; its folder gets a checkpoint and ``reached.json``.

    Args:
        settings: as of `pretrain`.
        encoder: the pocket encoder.
        title: of the phase.
        before: checkpoint of the phase before; the phase's own is written beside it.
    """
    recipe, work = RECIPES[settings.models.encoder], before.parent
    model, processor = load_model(before), load_processor(before)
    corpus = _corpus(settings, recipe, encoder, work, range(recipe.videos))
    phase = _phase(recipe, corpus, settings.seed, title)
    first = os.environ.get("RANK", "0") == "0"
    steps = phase.plan.steps if phase else recipe.align_steps
    with progress_bar(title, steps) as bar:
        last = _Last(bar)
        if phase is None:
            align(model, processor, corpus, recipe, steps, settings.seed, last)
        else:
            model.requires_grad_(True)
            tell = last if first else None
            model = fine_tune(model, processor, phase.lessons, phase.plan, work / "trainer", tell, phase.sees)
    if first:
        unlearned = _corpus(settings, recipe, encoder, work, range(recipe.videos, recipe.videos + _HELD))
        held = _phase(recipe, unlearned, settings.seed, title)
        if held is None:
            right = share_read(model, processor, unlearned, recipe)
        else:
            right = share_right(model.eval(), processor, held.lessons)
        save_policy(model, processor, work / title)
        write_json(work / title / "reached.json", {"phase": title, "steps": steps, **last.values, "right": right})


def _phase(recipe: Recipe, corpus: Corpus, seed: int, title: str) -> Phase | None:
    """A phase by its title, with lessons of a corpus; None of *align*, which has none."""
    return next((phase for phase in recipe.phases(corpus, seed) if phase.title == title), None)


class _Last:
    """Shows the loss of each step, and remembers the last values."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self.values: dict[str, float] = {}

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.values = {"loss": values["loss"]}
        self._bar.advance(note=f"loss {values['loss']:.3f}")


def _digests(settings: Settings, recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, str]:
    """Of each phase by its title, what its checkpoint follows from as far as that may change; first of the caches."""
    made_from = {
        "seed": seed,
        "encoder": encoder.digest,
        "search": settings.search.shaping(),
        "frames": settings.frames.shaping(),
        "world": recipe.world,
        "videos": recipe.videos,
    }
    digests = {"caches": json_digest(made_from)}
    phases = recipe.phases(Corpus([], settings.search, encoder, Path(), Path()), seed)
    digest = digests["caches"]
    for title, plan in ((_ALIGN, recipe.align_steps), *((phase.title, asdict(phase.plan)) for phase in phases)):
        digest = digests[title] = json_digest([digest, title, plan])
    return digests


def _begun(work: Path, digests: dict[str, str], seed: int) -> dict[str, Any]:
    """What was done by this recipe or begins as it; what follows from anything else is removed."""
    mark = work / "recipe.json"
    done = read_config(mark) if mark.is_file() else {}
    if done.get("caches") != digests["caches"]:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        done = {"seed": seed, "caches": digests["caches"], "phases": []}
    phases = done["phases"]
    kept = list(takewhile(lambda phase: phase["digest"] == digests.get(phase["phase"]), phases))
    for phase in phases[len(kept) :]:
        shutil.rmtree(work / phase["phase"], ignore_errors=True)
    done["phases"] = kept
    write_json(mark, done)
    return done


def _keep_caches(settings: Settings, recipe: Recipe, encoder: Encoder, work: Path) -> None:
    mark = work / "cached"
    if not mark.is_file():
        cached_corpus(settings, encoder, work, recipe.world, "pretrain", recipe.videos + _HELD)
        mark.touch()


def _corpus(settings: Settings, recipe: Recipe, encoder: Encoder, work: Path, numbers: range) -> Corpus:
    """Some of the cached videos, with all that can be asked about them."""
    scenes = [scene_of(recipe.world, "pretrain", number) for number in numbers]
    asked = [
        sample
        for scene in scenes
        for sample in samples_of(scene, scene.every_question if isinstance(scene, HopScene) else None)
    ]
    return _in_folders(asked, settings, encoder, work)


def _in_folders(samples: Sequence[Sample], settings: Settings, encoder: Encoder, root: Path) -> Corpus:
    folders = [root / name for name in ("frames", "features", "subtitles", "videos")]
    frames, features, *others = folders
    subtitles, videos = (folder if folder.is_dir() else None for folder in others)
    return Corpus(samples, settings.search, encoder, frames, features, subtitles, videos)


def cached_corpus(settings: Settings, encoder: Encoder, root: Path, world: str, split: str, videos: int) -> Corpus:
    """Render `videos` videos and make their caches under `root`.

    Args:
        settings: of frames, features and search.
        encoder: embeds the frames.
        root: gets `frames/`, `features/` and, where what is said is searched, `subtitles/`; the videos themselves are
            removed unless a tool looks at them.
        world: of the videos.
        split: of the videos; seeds are 0, 1, ...
        videos: how many.
    """
    from timesearch.retrieval.features import cache_features
    from timesearch.video.download import download_videos
    from timesearch.video.frames import cache_frames
    from timesearch.video.subtitles import index_subtitles

    samples = [sample for seed in range(videos) for sample in samples_of(scene_of(world, split, seed))]
    names = sorted({sample.video for sample in samples})
    results = [
        download_videos(samples, root / "videos", settings.download),
        cache_frames({name: root / "videos" / name for name in names}, root / "frames", settings.frames),
    ]
    caches = {name: root / "frames" / f"{name}.frames" for name in names}
    results.append(cache_features(caches, root / "features", encoder, settings.features))
    if "search_subtitles" in settings.search.tools:
        results.append(index_subtitles({name: root / "videos" / name for name in names}, root / "subtitles"))
    for result in results:
        if result.failures:
            raise ItemError(result.failures[0].message, reason=result.failures[0].reason)
    if not {"look_closer", "watch"} & set(settings.search.tools):
        shutil.rmtree(root / "videos")
    return _in_folders(samples, settings, encoder, root)


def align(model: Any, processor: Any, corpus: Corpus, recipe: Recipe, steps: int, seed: int, report: Report) -> None:
    """Phase 1: match every vision token of single frames with the embeddings of the words for what they show.

    Only the vision tower learns. Every token is to carry all words, so that attention to any of them reads the frame.
    """
    import torch

    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    rng = generator(_ALIGN, seed)
    for step in range(1, steps + 1):
        loss = torch.zeros(())
        for logits_NTW, truth_NT in _readings(model, processor, corpus, recipe, rng):
            loss = loss + torch.nn.functional.cross_entropy(logits_NTW.flatten(0, 1), truth_NT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, {"loss": float(loss.detach())})


def share_read(model: Any, processor: Any, corpus: Corpus, recipe: Recipe, batches: int = 10) -> float:
    """The share of vision tokens of single frames that are nearest to the right words, all of them.

    Args:
        model: a policy after *align*; later phases move the words.
        processor: of the policy.
        corpus: whose frames are read.
        recipe: tells what events show.
        batches: of frames.
    """
    import torch

    rng, shares = generator("read"), []
    for _ in range(batches):
        with torch.no_grad():
            readings = _readings(model, processor, corpus, recipe, rng)
        right = torch.stack([logits_NTW.argmax(dim=2) == truth_NT for logits_NTW, truth_NT in readings]).all(dim=0)
        shares.append(float(right.float().mean()))
    return sum(shares) / len(shares)


def _readings(
    model: Any, processor: Any, corpus: Corpus, recipe: Recipe, rng: np.random.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures of all events of some videos: how near each vision token is to each word (N, T, W), and the right word
    (N, T), for each thing that is told."""
    import torch

    videos = list({sample.video: sample for sample in corpus.samples}.values())
    pictures: list[Any] = []
    told: list[tuple[int, ...]] = []
    while len(pictures) < 112:
        sample = videos[int(rng.integers(len(videos)))]
        corpus.search.open({"video": sample.video, "question": sample.question})
        for picture, places in recipe.pictures(scene_of(*_name(sample)), corpus.search, rng):
            pictures.append(picture)
            told.append(places)
    batch = processor.image_processor(images=pictures, return_tensors="pt")
    features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    tokens_NTD = torch.stack(list(features))
    weight, read = model.get_input_embeddings().weight.detach(), []
    for words, truth in zip(recipe.words, zip(*told, strict=True), strict=True):
        logits_NTW = tokens_NTD @ weight[processor.tokenizer.convert_tokens_to_ids(list(words))].T
        read.append((logits_NTW, torch.tensor(truth)[:, None].expand(logits_NTW.shape[:2])))
    return read


def share_right(model: Any, processor: Any, lessons: Lessons, count: int = _PLAYED) -> float:
    """The share of assistant turns that, played greedily on what was there before, call or answer as they should; one
    that does neither, an exercise, is to be the same words.

    Args:
        model: a policy.
        processor: of the policy.
        lessons: whose first examples are played.
        count: how many.
    """
    asked: list[tuple[Request, str]] = []
    for number in range(count):
        example = lessons[number]
        for place, message in enumerate(example.messages):
            if message["role"] == "assistant":
                asked.append((Request(example.messages[:place], example.tools or [], _WRITTEN), text_of(message)))
    asked.sort(key=lambda each: sum(len(text_of(message)) for message in each[0].messages))
    player = TransformersPolicy(model, processor, "base")
    right = 0
    for begin in range(0, len(asked), _TOGETHER):
        some = asked[begin : begin + _TOGETHER]
        for reply, (_, wanted) in zip(player.generate([request for request, _ in some]), some, strict=True):
            if isinstance(reply, BaseException):
                raise reply
            mine, its = parse_turn(reply.text), parse_turn(wanted)
            acts = act_of(wanted) is not None
            right += (mine.calls, mine.answer) == (its.calls, its.answer) if acts else reply.text == wanted
    return right / len(asked)


def _name(sample: Sample) -> tuple[str, str, int]:
    """World, split and seed of a pocket sample's video."""
    world, split, file = sample.video.split("/")
    return world, split, int(file.removesuffix(".mp4"))


def main() -> None:
    """One of the processes of a phase: `python -m timesearch.pocket.pretrain FOLDER PHASE PHASE-BEFORE`."""
    from timesearch.retrieval.encoder import load_encoder

    work, title, before = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    settings = Settings.model_validate(read_config(work / "settings.json"))
    carry_out(settings, load_encoder(str(settings.paths.models / "encoder")), title, work / before)


if __name__ == "__main__":
    main()
