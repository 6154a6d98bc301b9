"""The world of senses: videos about which each question needs one tool, and no other tool helps.

A video of about a minute shows six shapes in six colours, each for 2 to 3 seconds. Questions are of three kinds:

- *said* (`search_subtitles`): "What colour is the shape that is spoken of?" A line of the subtitle stream inside the
  file names it, and nothing that is seen does.
- *small* (`look_closer`): "Which shape is on the plate beside the star?" The plate is a twenty-fifth of the
  picture's side, so that on the 64 pixels of the frame cache the mark on it is less than two pixels wide.
- *brief* (`watch`): "What colour flashes after the star?" The flash lasts 0.3 seconds, between two instants of a cache
  of 2 frames a second.

That a question needs its tool is not claimed but tested, by `answer_by_reading`, which goes by the pixels and words
that the tools return and by nothing else (tests/test_senses.py).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from timesearch.base.errors import RequestError
from timesearch.data.messages import Block
from timesearch.data.samples import Sample
from timesearch.pocket.world import (
    COLOURS,
    PREVIEW_MARGIN,
    SHAPES,
    Event,
    Scene,
    draw_backgrounds,
    encode_pictures,
    preview_instants,
    read_colour,
    scene_generator,
    shape_mask,
)

if TYPE_CHECKING:
    from timesearch.search.search import Search

WORLD = "senses"
"""Name of the world in `pocket://senses/<split>/<seed>.mp4`."""
SIDE = 320
"""Width and height of a video in pixels: five times those of the frame cache."""
RATE = 10
"""Frames a second of a video: three of a flash."""
PLATE = 12
"""Side of the dark plate in the lower right corner, in pixels of `SIDE`."""
BORDER = 2
"""Pixels around the plate's inside, of a brightness that says nothing."""
PLATE_BOX: list[float] = [1 - PLATE / SIDE, 1 - PLATE / SIDE, 1.0, 1.0]
"""Where the plate is, as `look_closer` takes it."""
MARKS = ("circle", "square", "cross", "ring", "diamond", "hourglass")
"""Shapes that may be on a plate."""
FLASH = 0.3
"""Seconds of a flash, which begins a tenth after an instant of the frame cache."""

Sense = Literal["said", "small", "brief"]
TOOL_OF: dict[Sense, str] = {"said": "search_subtitles", "small": "look_closer", "brief": "watch"}
TEXTS: dict[Sense, str] = {
    "said": "What colour is the shape that is spoken of?",
    "small": "Which shape is on the plate beside the {shape}?",
    "brief": "What colour flashes after the {shape}?",
}
CLUE = "the shape to find is the {shape}"
CHATTER = ("let us begin", "this takes a while", "look at the walls", "the colours change", "we are nearly there")
_GAP = 4.5
"""Seconds without a shape after each event, at least; the flash is within the first two of them."""
_SIZE = (170, 200)
_DARK = 14
"""Brightness of a plate."""
_CELLS = 32
"""Along the side of a plate, when it is read."""


@dataclass(frozen=True)
class Marked(Event):
    """A shape with a small mark on a plate."""

    mark: str
    border: tuple[int, ...]
    """Brightness of the plate's border in each of its four quarters."""

    def draw(self, picture: Image.Image, seconds: float) -> None:
        """Paint the shape and, in the lower right corner, its mark."""
        super().draw(picture, seconds)
        corner = SIDE - PLATE
        half = PLATE // 2
        for grey, place in zip(self.border, ((0, 0), (half, 0), (0, half), (half, half)), strict=True):
            left, top = corner + place[0], corner + place[1]
            picture.paste((grey, grey, grey), (left, top, left + half, top + half))
        picture.paste(plate(self.mark), (corner + BORDER, corner + BORDER))


@dataclass(frozen=True)
class SensesScene(Scene):
    """What a video of this world shows and says.

    Attributes:
        flash: a colour that fills the picture for `FLASH` seconds, after one of the events.
        lines: (start, end, words), in order of time.
        spoken: the event that a line names.
        small: the event whose mark is asked for.
        before: the event before the flash.
    """

    events: Sequence[Marked]
    flash: Event
    lines: tuple[tuple[float, float, str], ...]
    spoken: Marked
    small: Marked
    before: Marked

    def frame(self, seconds: float) -> Image.Image:
        """The RGB picture at a time, SIDE x SIDE pixels."""
        picture = Scene.frame(Scene(self.world, self.split, self.seed, self.duration, self.backgrounds, []), seconds)
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        for event in (*self.events, self.flash):
            if event.start <= seconds < event.end:
                event.draw(picture, seconds)
        return picture

    @property
    def samples(self) -> list[Sample]:
        """A question of each kind."""
        asked: list[tuple[Sense, Event, str]] = [
            ("said", self.spoken, self.spoken.colour),
            ("small", self.small, self.small.mark),
            ("brief", self.flash, self.flash.colour),
        ]
        return [
            Sample(
                id=f"{self.world}-{self.split}-{self.seed}-{sense}",
                video=f"{self.world}/{self.split}/{self.seed}.mp4",
                source=self.url,
                question=TEXTS[sense].format(shape=self.before.shape if sense == "brief" else event.shape),
                answer=answer,
                type="open_ended",
                duration=self.duration,
                gt_seconds=[(event.start + event.end) / 2],
                gt_spans=[(event.start, event.end)],
                split=self.split,
                meta={"sense": sense, "tool": TOOL_OF[sense], "world": self.world},
            )
            for sense, event, answer in asked
        ]


def make_senses_scene(split: str, seed: int) -> SensesScene:
    """The scene of a video, which follows from its name alone.

    Raises:
        RequestError: an unknown split.
    """
    rng = scene_generator(WORLD, split, seed)
    shapes = [str(shape) for shape in rng.permutation(SHAPES)[: len(COLOURS)]]
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    starts, lengths, duration = _draw_times(len(shapes), rng)
    events = [
        Marked(
            start=start,
            end=start + length,
            shape=shape,
            colour=colour,
            needle=True,
            size=int(rng.integers(*_SIZE)),
            centre=(int(rng.integers(130, 151)), int(rng.integers(130, 151))),
            drift=(int(rng.integers(-20, 21)), int(rng.integers(-20, 21))),
            mark=str(rng.choice(MARKS)),
            border=tuple(int(grey) for grey in rng.integers(0, 256, size=4)),
        )
        for shape, colour, start, length in zip(shapes, colours, starts, lengths, strict=True)
    ]
    spoken, small, before = (events[int(place)] for place in rng.permutation(len(events))[:3])
    begins = math.ceil(before.end * 2) / 2 + float(rng.integers(1, 4)) / 2 + 0.1
    flash = Event(
        begins,
        begins + FLASH,
        "square",
        str(rng.choice(list(COLOURS))),
        False,
        2 * SIDE,
        (SIDE // 2, SIDE // 2),
        (0, 0),
    )
    told = [*map(str, rng.permutation(CHATTER)), CLUE.format(shape=spoken.shape)]
    told = [told[int(place)] for place in rng.permutation(len(told))]
    step = duration / len(told)
    lines = tuple((step * place + 1.0, step * place + 3.0, words) for place, words in enumerate(told))
    return SensesScene(
        WORLD, split, seed, duration, draw_backgrounds(duration, rng), events, flash, lines, spoken, small, before
    )


def _draw_times(count: int, rng: np.random.Generator) -> tuple[list[float], list[float], float]:
    """Starts and lengths of events (s), in halves of a second, and a duration whose preview shows none of them."""
    while True:
        lengths = [float(length) for length in rng.choice((2.0, 2.5, 3.0), size=count)]
        gaps = _GAP + rng.integers(0, 9, size=count) / 2
        starts = [float(rng.integers(4, 13)) / 2]
        for length, gap in zip(lengths[:-1], gaps[:-1], strict=True):
            starts.append(starts[-1] + length + float(gap))
        duration = float(math.ceil(starts[-1] + lengths[-1] + gaps[-1]))
        if not any(
            start - PREVIEW_MARGIN < instant < start + length + PREVIEW_MARGIN
            for instant in preview_instants(duration)
            for start, length in zip(starts, lengths, strict=True)
        ):
            return starts, lengths, duration


def encode(scene: SensesScene) -> bytes:
    """Render a scene as H.264 in MP4 with a subtitle stream, `RATE` frames a second of SIDE x SIDE pixels."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        target, said = Path(folder) / "video.mp4", Path(folder) / "said.srt"
        said.write_text(_srt(scene.lines), encoding="utf-8")
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin"),
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", str(RATE), "-i", "pipe:0"),
            *("-i", str(said), "-map", "0:v", "-map", "1:s", "-c:s", "mov_text"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", "-g", str(10 * RATE)),
            # As in the other worlds, the bytes depend on nothing but pictures, words and the encoder's version.
            *("-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact", "-map_metadata", "-1"),
            *("-movflags", "+faststart", str(target)),
        ]
        encode_pictures(command, (scene.frame(index / RATE) for index in range(int(scene.duration * RATE))))
        return target.read_bytes()


def _srt(lines: Sequence[tuple[float, float, str]]) -> str:
    def clock(seconds: float) -> str:
        whole = round(seconds * 1000)
        return f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:{whole // 1000 % 60:02},{whole % 1000:03}"

    return "".join(
        f"{number}\n{clock(start)} --> {clock(end)}\n{words}\n\n" for number, (start, end, words) in enumerate(lines, 1)
    )


def answer_by_reading(search: Search, row: dict[str, Any]) -> str:
    """Answer a question of this world by the tools that are offered, reading words and pixels and nothing else.

    It takes the tool that the question needs first; without it, it does what the others allow, and guesses at last.

    Args:
        search: over the caches of the video; it is opened anew.
        row: the sample's fields.
    """
    search.open(row)
    sense, named = _asked(str(row["question"]))
    if sense == "said":
        shape = _shape_in(_words(search, "shape to find"))
        pictures = _seek(search, shape or "shape")
        return _first(read_colour(picture) for _, picture in pictures) or next(iter(COLOURS))
    pictures = _seek(search, named)
    coloured = [seconds for seconds, picture in pictures if read_colour(picture)]
    if sense == "small":
        for seconds in coloured[:1]:
            for _, closer in _look(search, "look_closer", time=seconds, box=PLATE_BOX):
                return read_mark(closer)
        marks = (read_mark(_corner(picture)) for seconds, picture in pictures if seconds in coloured)
        return next(marks, MARKS[0])
    for seconds in coloured[-1:]:
        end = search.video.frames.end
        for late in (0.0, 1.6, 3.2, 4.8):
            start = min(seconds + late, end)
            dense = _look(search, "watch", start_time=start, end_time=min(start + 1.5, end), fps=5)
            if flash := _first(_flash_colour(picture) for _, picture in dense):
                return flash
        sparse = _look(search, "seek_video_frames", query="flash", start_time=seconds, end_time=seconds + 5)
        return _first(_flash_colour(picture) for _, picture in sparse) or next(iter(COLOURS))
    return next(iter(COLOURS))


def _asked(question: str) -> tuple[Sense, str]:
    """The kind of a question, and the shape that it names; an empty text where it names none."""
    for sense, text in TEXTS.items():
        before, _, after = text.partition("{shape}")
        if question.startswith(before) and question.endswith(after):
            return sense, question.removeprefix(before).removesuffix(after)
    raise RequestError(f"{question!r} is no question of the world of senses")


def _seek(search: Search, shape: str) -> list[tuple[float, Image.Image]]:
    return _look(search, "seek_video_frames", query=shape, num_frames=2)


def _look(search: Search, tool: str, **arguments: Any) -> list[tuple[float, Image.Image]]:
    """Times and pictures that a tool returns, in order of time; none where it is not offered."""
    blocks = _called(search, tool, arguments)
    found = [(block["seconds"], block["image"]) for block in blocks if block["type"] == "image"]
    return sorted(((float(seconds or 0), picture) for seconds, picture in found), key=lambda pair: pair[0])


def _words(search: Search, query: str) -> str:
    blocks = _called(search, "search_subtitles", {"query": query, "num_lines": 1})
    return " ".join(block["text"] for block in blocks if block["type"] == "text" and "seconds" in block)


def _called(search: Search, tool: str, arguments: dict[str, Any]) -> list[Block]:
    return search.call(tool, arguments) if tool in search.tools else []


def _shape_in(words: str) -> str | None:
    return next((shape for shape in SHAPES if shape in words.split()), None)


def _first(values: Any) -> str | None:
    return next((value for value in values if value), None)


def _corner(picture: Image.Image) -> Image.Image:
    left, top, right, bottom = PLATE_BOX
    return picture.crop(
        (
            round(left * picture.width),
            round(top * picture.height),
            int(right * picture.width),
            int(bottom * picture.height),
        )
    )


def _flash_colour(picture: Image.Image) -> str | None:
    """The colour of a flash, which fills the upper left corner, where no shape reaches."""
    return read_colour(picture.crop((0, 0, max(1, picture.width // 20), max(1, picture.height // 20))))


def read_mark(picture: Image.Image) -> str:
    """The mark on a plate: the one whose drawing is nearest, pixel by pixel, at whatever size the plate is given."""
    share = BORDER / PLATE
    left, top = share * picture.width, share * picture.height
    inside = (left, top, picture.width - left, picture.height - top)
    size = (_CELLS, _CELLS)
    seen = np.asarray(picture.convert("L").resize(size, Image.Resampling.BICUBIC, box=inside), dtype=np.float32)
    return min(MARKS, key=lambda mark: float(np.abs(_drawn(mark) - seen).mean()))


@cache
def _drawn(mark: str) -> np.ndarray:
    return np.asarray(plate(mark).resize((_CELLS, _CELLS), Image.Resampling.BICUBIC), dtype=np.float32)


@cache
def plate(mark: str) -> Image.Image:
    """The inside of a plate, dark with a mark on it, in grey.

    The larger marks are darker, so that all are of one brightness together; with a border of any brightness around
    them, hardly anything tells one from another in pixels that are nearly as large as they.
    """
    side = PLATE - 2 * BORDER
    masks = {shape: shape_mask(shape, side) for shape in MARKS}
    weights = {shape: float(np.asarray(mask).sum()) for shape, mask in masks.items()}
    drawn = Image.new("L", (side, side), _DARK)
    drawn.paste(_DARK + round((255 - _DARK) * min(weights.values()) / weights[mark]), (0, 0), masks[mark])
    return drawn
