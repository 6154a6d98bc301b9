"""The pocket world: videos of a minute or two made from nothing but a name, in which a short event answers a question.

A *scene* is what a video shows: muted backgrounds that change every 8 to 20 seconds, and six events of 2 to 5 seconds,
each a large saturated shape of its own kind. Three events (the *needles*) are asked about, "What colour is the
star?", and keep away from the instants that a uniform 4-frame preview shows; the other three are distractors and may be
anywhere. Everything follows from `(world, split, seed)`, so two machines render the same bytes.

Worlds differ in one thing, how often a needle has the commonest colour: where that is at chance, only search answers;
where it is often right, guessing pays, which is what completeness self-verification is for (paper, Section 3.2).
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from timesearch.base.errors import RequestError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (30, 175, 55),
    "blue": (35, 80, 230),
    "yellow": (245, 220, 30),
    "purple": (160, 40, 200),
    "white": (250, 250, 250),
}
"""Answers, with their RGB values; the first is the commonest."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow")
WORLDS: dict[str, float] = {"guess-proof": 1 / 6, "demo": 0.5, "guessable": 0.97}
"""Name of a world -> probability that a needle has the commonest colour."""
SPLITS = ("train", "test", "heldout", "pretrain")
"""Seeds of different splits never give the same video, because the split's name enters the digest."""
SIZE = 128
"""Width and height of a video in pixels."""
FPS = 4
"""Frames a second of a video."""
PREVIEW = 4
"""Frames of the uniform preview that needles keep away from."""

PREVIEW_MARGIN = 1.5
"""Seconds kept free around each instant of the preview: the frame cache's grid may be half a second off."""


@dataclass(frozen=True)
class Event:
    """A shape that is seen from `start` to `end` (s), drifting by `drift` (x, y) pixels over that time."""

    start: float
    end: float
    shape: str
    colour: str
    needle: bool
    size: int
    centre: tuple[int, int]
    drift: tuple[int, int]

    def draw(self, picture: Image.Image, seconds: float) -> None:
        """Paint the event into a picture, as it looks at a time within it."""
        mask = shape_mask(self.shape, self.size)
        share = (seconds - self.start) / (self.end - self.start) - 0.5
        left, top = (
            round(middle + share * drift - self.size / 2) for middle, drift in zip(self.centre, self.drift, strict=True)
        )
        picture.paste(Image.new("RGB", mask.size, COLOURS[self.colour]), (left, top), mask)


@dataclass(frozen=True)
class Background:
    """A muted pattern from `start` (s) on, moving sideways by `speed` pixels a second."""

    start: float
    pattern: str
    dark: tuple[int, int, int]
    light: tuple[int, int, int]
    speed: float


@dataclass(frozen=True)
class Scene:
    """What one video shows; `frame(t)` renders it."""

    world: str
    split: str
    seed: int
    duration: float
    backgrounds: list[Background]
    events: Sequence[Event]

    @property
    def url(self) -> str:
        """Where `PocketFileSystem` serves the video."""
        return f"pocket://{self.world}/{self.split}/{self.seed}.mp4"

    @property
    def needles(self) -> list[Event]:
        """The events that are asked about, in order of time."""
        return [event for event in self.events if event.needle]

    def visible(self, seconds: float) -> Event | None:
        """The event on screen at a time, if any; events never overlap."""
        return next((event for event in self.events if event.start <= seconds < event.end), None)

    def frame(self, seconds: float) -> Image.Image:
        """The RGB picture at a time, SIZE x SIZE pixels."""
        index = max(i for i, background in enumerate(self.backgrounds) if background.start <= seconds)
        background = self.backgrounds[index]
        offset = int((seconds - background.start) * background.speed) % SIZE
        picture = Image.fromarray(np.roll(_texture(background), offset, axis=1))
        event = self.visible(seconds)
        if event is not None:
            event.draw(picture, seconds)
        return picture


def generator(*name: object) -> np.random.Generator:
    """A random generator that depends on nothing but `name`."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def scene_generator(world: str, split: str, seed: int) -> np.random.Generator:
    """The random generator of a video, of any world.

    Raises:
        RequestError: an unknown split.
    """
    if split not in SPLITS:
        raise RequestError(f"pocket split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    return generator(world, split, seed)


def answer_prior(world: str) -> dict[str, float]:
    """Probability of each colour as an answer in a world.

    Raises:
        RequestError: there is no such world.
    """
    if world not in WORLDS:
        raise RequestError(f"pocket world {world!r} is unknown: use one of {', '.join(WORLDS)}")
    commonest, *others = COLOURS
    return {commonest: WORLDS[world], **{colour: (1 - WORLDS[world]) / len(others) for colour in others}}


def make_scene(world: str, split: str, seed: int) -> Scene:
    """The scene of a video.

    Raises:
        RequestError: an unknown world or split.
    """
    prior = answer_prior(world)
    rng = scene_generator(world, split, seed)
    duration = float(rng.integers(90, 151))
    shapes = rng.permutation(SHAPES)[:6]
    needles = rng.permutation([True] * 3 + [False] * 3)
    previewed = preview_instants(duration)
    events: list[Event] = []
    while len(events) < len(shapes):
        needle = bool(needles[len(events)])
        length = float(rng.choice([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]))
        start = float(rng.integers(4, int((duration - length - 1) * 4))) / 4
        end = start + length
        crowded = any(start < event.end + 2 and event.start < end + 2 for event in events)
        shown = any(start - PREVIEW_MARGIN < instant < end + PREVIEW_MARGIN for instant in previewed)
        if crowded or (needle and shown):
            continue
        # Distractors have even colours in every world: frames without the needle say nothing about its colour.
        weights = list(prior.values()) if needle else None
        events.append(
            Event(
                start=start,
                end=end,
                shape=str(shapes[len(events)]),
                colour=str(rng.choice(list(COLOURS), p=weights)),
                needle=needle,
                size=int(rng.integers(72, 97)),
                centre=(int(rng.integers(58, 71)), int(rng.integers(58, 71))),
                drift=(int(rng.integers(-16, 17)), int(rng.integers(-16, 17))),
            )
        )
    return Scene(
        world, split, seed, duration, draw_backgrounds(duration, rng), sorted(events, key=lambda event: event.start)
    )


def draw_backgrounds(duration: float, rng: np.random.Generator) -> list[Background]:
    """Muted patterns for a whole video, each for 8 to 20 seconds."""
    backgrounds: list[Background] = []
    change = 0.0
    while change < duration:
        dark = rng.integers(55, 105, size=3).mean() + rng.integers(-14, 15, size=3)
        light = dark + rng.integers(15, 40)
        backgrounds.append(
            Background(
                start=change,
                pattern=str(rng.choice(list(_patterns()))),
                dark=tuple(int(value) for value in dark),  # type: ignore[arg-type]
                light=tuple(int(value) for value in light),  # type: ignore[arg-type]
                speed=float(rng.integers(-12, 13)),
            )
        )
        change += float(rng.integers(8, 21))
    return backgrounds


def encode_pictures(command: Sequence[str], pictures: Iterable[Image.Image]) -> None:
    """Run an encoder that reads raw pictures from its standard input, one after another as they are drawn.

    Raises:
        CalledProcessError: it failed; with what it said.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as encoder:
        assert encoder.stdin is not None
        with suppress(BrokenPipeError):  # it gave up, and says why
            for picture in pictures:
                encoder.stdin.write(picture.tobytes())
        _, said = encoder.communicate()
    if encoder.returncode:
        raise subprocess.CalledProcessError(encoder.returncode, command, stderr=said)


def preview_instants(duration: float) -> list[float]:
    """The times (s) that a uniform preview shows of a video of `duration` seconds."""
    return [(i + 0.5) / PREVIEW * duration for i in range(PREVIEW)]


def question(shape: str) -> str:
    """What is asked about a shape; the answer is its colour."""
    return f"What colour is the {shape}?"


def read_colour(picture: Image.Image) -> str | None:
    """The colour of the shape in a picture, read from its pixels; None where no shape is seen.

    A yardstick for tests: it shows that a frame holds the answer, without any model.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.int32).reshape(-1, 3)
    palette = np.array(list(COLOURS.values()), dtype=np.int32)
    distance = np.abs(pixels[:, None] - palette[None]).max(axis=2)
    counts = (distance < 45).sum(axis=0)
    best = int(counts.argmax())
    return list(COLOURS)[best] if counts[best] >= 0.03 * len(pixels) else None


@lru_cache(maxsize=1)
def _patterns() -> dict[str, np.ndarray]:
    """Share of the light colour in each pixel, by pattern; periodic in x, so that they can scroll."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    return {
        "plain": np.zeros_like(x),
        "stripes": ((x * 8).astype(int) % 2).astype(np.float32),
        "checks": (((x * 4).astype(int) + (y * 4).astype(int)) % 2).astype(np.float32),
        "waves": (0.5 + 0.5 * np.sin(2 * np.pi * (2 * x + 0.3 * np.sin(2 * np.pi * y)))).astype(np.float32),
        "dots": (((x * 4) % 1 - 0.5) ** 2 + ((y * 4) % 1 - 0.5) ** 2 < 0.06).astype(np.float32),
        "slope": y,
    }


@lru_cache(maxsize=64)
def _texture(background: Background) -> np.ndarray:
    amount = _patterns()[background.pattern][..., None]
    return (np.array(background.dark) * (1 - amount) + np.array(background.light) * amount).astype(np.uint8)


@lru_cache(maxsize=512)
def shape_mask(shape: str, size: int) -> Image.Image:
    """Opacity of a shape in a square of `size` pixels, smoothed by drawing at four times the size."""
    big = 4 * size
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(x * (big - 1), y * (big - 1)) for x, y in points], fill=255)

    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
        if shape == "ring":
            draw.ellipse((big * 0.25, big * 0.25, big * 0.75, big * 0.75), fill=0)
    elif shape == "square":
        polygon([(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)])
    elif shape == "triangle":
        polygon([(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)])
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.2)
        polygon([(0.5 + r * np.cos(a), 0.5 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)])
    elif shape == "cross":
        polygon([(0.36, 0.0), (0.64, 0.0), (0.64, 1.0), (0.36, 1.0)])
        polygon([(0.0, 0.36), (1.0, 0.36), (1.0, 0.64), (0.0, 0.64)])
    elif shape == "heart":
        draw.ellipse((0.02 * big, 0.08 * big, 0.52 * big, 0.58 * big), fill=255)
        draw.ellipse((0.48 * big, 0.08 * big, 0.98 * big, 0.58 * big), fill=255)
        polygon([(0.05, 0.45), (0.95, 0.45), (0.5, 0.98)])
    elif shape == "diamond":
        polygon([(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)])
    elif shape == "moon":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
        draw.ellipse((big * 0.34, -big * 0.08, big * 1.18, big * 0.76), fill=0)
    elif shape == "bolt":
        polygon([(0.62, 0.0), (0.12, 0.58), (0.46, 0.58), (0.34, 1.0), (0.9, 0.38), (0.54, 0.38)])
    elif shape == "hourglass":
        polygon([(0.08, 0.0), (0.92, 0.0), (0.08, 1.0), (0.92, 1.0)])
    elif shape == "crown":
        polygon([(0.0, 0.95), (0.0, 0.1), (0.27, 0.5), (0.5, 0.05), (0.73, 0.5), (1.0, 0.1), (1.0, 0.95)])
    elif shape == "stairs":
        polygon([(0, 1), (0, 0.66), (0.33, 0.66), (0.33, 0.33), (0.66, 0.33), (0.66, 0), (1, 0), (1, 1)])
    elif shape == "fish":
        draw.ellipse((0.0, 0.2 * big, 0.7 * big, 0.8 * big), fill=255)
        polygon([(0.55, 0.5), (1.0, 0.1), (1.0, 0.9)])
    elif shape == "flag":
        polygon([(0.1, 0.0), (0.24, 0.0), (0.24, 1.0), (0.1, 1.0)])
        polygon([(0.24, 0.02), (1.0, 0.3), (0.24, 0.58)])
    else:
        polygon([(0.0, 0.36), (0.5, 0.36), (0.5, 0.06), (1.0, 0.5), (0.5, 0.94), (0.5, 0.64), (0.0, 0.64)])
    return mask.resize((size, size), Image.Resampling.BOX)
