"""`pocket://<world>/<split>/<seed>.mp4`: an fsspec filesystem whose files are rendered when they are opened.

The bytes are a real H.264 MP4, the same each time for the same ffmpeg build, so whatever fetches videos from https or
s3 fetches these too.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem

from timesearch.base.errors import RequestError
from timesearch.pocket import hops, senses
from timesearch.pocket.world import FPS, SIZE, SPLITS, WORLDS, Scene, encode_pictures, make_scene

_PATH = re.compile(r"(?P<world>[a-z0-9-]+)/(?P<split>[a-z]+)/(?P<seed>\d{1,9})\.mp4")
_WORLDS = (*WORLDS, *hops.HOP_WORLDS, senses.WORLD)
_KEPT = 8
"""Rendered videos kept in memory (some hundred KB each), for readers that ask for the size first."""


class PocketFileSystem(AbstractFileSystem):
    """Read-only; folders exist as names, their files are without number and are not listed."""

    protocol = "pocket"
    cachable = True

    def __init__(self, *args: Any, **storage_options: Any) -> None:
        super().__init__(*args, **storage_options)
        self._videos: OrderedDict[str, bytes] = OrderedDict()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, type and size (bytes); the size of a video is known by rendering it."""
        name = self._strip_protocol(path)
        if name == "" or name in _WORLDS or name in {f"{world}/{split}" for world in _WORLDS for split in SPLITS}:
            return {"name": name, "size": 0, "type": "directory"}
        return {"name": name, "size": len(self._video(name)), "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The worlds, the splits of a world, or the one video that is named."""
        name = self._strip_protocol(path)
        if name == "" or name in _WORLDS:
            below = [f"{name}/{split}" for split in SPLITS] if name else list(_WORLDS)
            entries = [{"name": entry, "size": 0, "type": "directory"} for entry in below]
        else:
            entry = self.info(name)
            entries = [entry] if entry["type"] == "file" else []
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        if mode != "rb":
            raise RequestError(f"pocket://{path} can only be read")
        return io.BytesIO(self._video(self._strip_protocol(path)))

    def _video(self, name: str) -> bytes:
        if name not in self._videos:
            try:
                scene = parse_url(f"pocket://{name}")
            except RequestError as error:
                raise FileNotFoundError(str(error)) from error
            self._videos[name] = encode(scene)
            while len(self._videos) > _KEPT:
                self._videos.popitem(last=False)
        return self._videos[name]


def parse_url(url: str) -> Scene:
    """The scene behind a `pocket://` URL.

    Raises:
        RequestError: the URL names no pocket video.
    """
    match = _PATH.fullmatch(url.removeprefix("pocket://"))
    if match is None:
        raise RequestError(f"{url} is no pocket video: write pocket://<world>/<split>/<seed>.mp4")
    return scene_of(match["world"], match["split"], int(match["seed"]))


def scene_of(world: str, split: str, seed: int) -> Scene:
    """The scene of a video of any pocket world.

    Raises:
        RequestError: an unknown world or split.
    """
    if world == senses.WORLD:
        return senses.make_senses_scene(split, seed)
    if world in hops.HOP_WORLDS:
        return hops.make_hop_scene(split, seed, world)
    return make_scene(world, split, seed)


def encode(scene: Scene) -> bytes:
    """Render a scene and encode it as H.264 in MP4, FPS frames a second of SIZE x SIZE pixels."""
    import imageio_ffmpeg

    if isinstance(scene, senses.SensesScene):
        return senses.encode(scene)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "video.mp4"
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin"),
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", str(FPS), "-i", "pipe:0"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", "-g", str(10 * FPS)),
            # One thread and no build strings: the bytes depend on nothing but the pictures and the encoder's version.
            *("-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact", "-map_metadata", "-1"),
            *("-movflags", "+faststart", str(target)),
        ]
        encode_pictures(command, (scene.frame(index / FPS) for index in range(int(scene.duration * FPS))))
        return target.read_bytes()
