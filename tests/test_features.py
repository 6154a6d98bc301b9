"""The feature cache and the encoders: shapes, digests, refusal by name, the embeddings server."""

from __future__ import annotations

import base64
import copy
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from safetensors import safe_open
from synthetic import make_encoder, make_video

from timesearch import FeatureCache, FrameCache, models
from timesearch.base.errors import CacheMismatchError, ItemError, RequestError, TemporaryError
from timesearch.base.hub import fetch_error
from timesearch.data.samples import Sample
from timesearch.retrieval.encoder import Encoder, load_encoder
from timesearch.retrieval.features import cache_features, default_encoder, make_feature_cache, run
from timesearch.search.search import Search
from timesearch.settings import Features, Frames, Settings
from timesearch.video.frames import make_frame_cache

SMALL = Frames(max_pixels=16 * 28 * 28, min_pixels=28 * 28)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    folder = tmp_path_factory.mktemp("frames")
    make_frame_cache(make_video(folder / "a.mp4", seconds=5), folder / "a.mp4.frames", SMALL)
    return FrameCache.open(folder / "a.mp4.frames")


def test_features_are_the_encoders_unit_rows(frames: FrameCache, encoder: Encoder, tmp_path: Path) -> None:
    target = tmp_path / "a.mp4.safetensors"
    assert make_feature_cache(frames.path, target, encoder, batch_size=3) == 10
    cache = FeatureCache.open(target)
    assert cache.features.shape == (10, 32)
    assert cache.features.dtype == np.float16
    np.testing.assert_array_equal(cache.timestamps, frames.timestamps)
    np.testing.assert_allclose(cache.features, encoder.encode_images(frames.read(range(10))), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(cache.features.astype(np.float32), axis=1), 1, atol=2e-3)
    with safe_open(target, framework="numpy") as file:
        header = file.metadata()
    assert header["frames"] == frames.digest
    assert (header["model"], header["pretrained"]) == (encoder.name, encoder.pretrained)
    assert len(header["preprocessing"]) == 16


def test_queries_are_embedded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    embed = encoder._embed_texts  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder, "_embed_texts", lambda texts: asked.extend(texts) or embed(texts))
    rows = encoder.encode_text(["a red car", "a dog", "a red car"])
    assert rows.shape == (3, 32)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    encoder.encode_text(["a dog"])
    assert asked == ["a red car", "a dog"]


def test_another_encoders_features_are_refused_by_name(frames: FrameCache, encoder: Encoder, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    make_feature_cache(frames.path, target, encoder, batch_size=64)
    cache = FeatureCache.open(target)
    cache.require_encoder(encoder)
    cache.require_frames(frames)
    other = load_encoder(str(make_encoder(tmp_path / "other", seed=1)))
    with pytest.raises(CacheMismatchError) as caught:
        cache.require_encoder(other)
    assert all(name in str(caught.value) for name in (encoder.pretrained, other.pretrained, "tiny", "other"))
    video = make_video(tmp_path / "b.mp4", seconds=1)
    make_frame_cache(video, tmp_path / "b.frames", SMALL)
    with pytest.raises(CacheMismatchError, match=frames.digest[:12]):
        cache.require_frames(FrameCache.open(tmp_path / "b.frames"))


def test_an_encoder_goes_to_another_process(encoder: Encoder) -> None:
    rows = encoder.encode_text(["a dog"])
    arrived = copy.deepcopy(encoder)  # by what pickle would send
    assert arrived.digest == encoder.digest
    np.testing.assert_allclose(arrived.encode_text(["a dog"]), rows, rtol=1e-5)


def test_what_is_up_to_date_is_left_and_the_rest_redone(frames: FrameCache, encoder: Encoder, tmp_path: Path) -> None:
    settings, caches = Features(batch_size=4, workers=2), {"a.mp4": frames.path, "gone.mp4": tmp_path / "no.frames"}
    result = cache_features(caches, tmp_path / "out", encoder, settings)
    assert result.done == ["a.mp4"]
    assert [failure.reason for failure in result.failures] == ["missing_cache"]
    listed = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in listed] == ["gone.mp4"]
    caches.pop("gone.mp4")
    assert cache_features(caches, tmp_path / "out", encoder, settings).skipped == ["a.mp4"]
    assert not (tmp_path / "out/failures.jsonl").exists()
    other = load_encoder(str(make_encoder(tmp_path / "tiny", seed=1)))
    assert cache_features(caches, tmp_path / "out", other, settings).again == {"of another encoder": 1}
    make_frame_cache(make_video(tmp_path / "b.mp4", seconds=1), tmp_path / "b.frames", SMALL)
    elsewhere = {"a.mp4": tmp_path / "b.frames"}
    assert cache_features(elsewhere, tmp_path / "out", other, settings).again == {"of other frames": 1}
    assert cache_features(caches, tmp_path / "out", other, settings).done == ["a.mp4"]
    target = tmp_path / "out/a.mp4.safetensors"
    whole = target.read_bytes()
    for damaged in (whole[:-9], whole[:200] + b"?" + whole[201:], whole[:-200] + b"?" + whole[-199:], b""):
        target.write_bytes(damaged)
        assert cache_features(caches, tmp_path / "out", other, settings).again == {"damaged": 1}
        assert target.read_bytes() == whole


def test_wrong_encoders_are_named(tmp_path: Path) -> None:
    for name, tag, message in [
        ("ViT-B-32", None, "pretrained tag"),
        (str(tmp_path), None, "open_clip_config.json is missing"),
    ]:
        with pytest.raises(RequestError, match=message):
            load_encoder(name, tag)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"x")
    with pytest.raises(RequestError, match=r"\.safetensors"):
        load_encoder("ViT-B-32", str(weights))


def test_an_embeddings_server_that_is_away_may_come_back() -> None:
    with pytest.raises(TemporaryError, match="no embeddings server answers"):
        load_encoder("http://127.0.0.1:9/v1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A model hub that answers every request with the status in the list; 0 closes the connection."""
    status = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

        def do_GET(self) -> None:
            if status[0]:
                self.send_response(status[0])
                self.send_header("Content-Length", "0")
                self.send_header("X-Error-Code", "GatedRepo" if status[0] == 403 else "RepoNotFound")
                self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield status
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "error"),
    [(0, TemporaryError), (503, TemporaryError), (429, TemporaryError), (403, RequestError), (404, RequestError)],
)
def test_a_hub_that_is_away_may_come_back_and_one_that_refuses_does_not(
    hub: list[int], tmp_path: Path, status: int, error: type[Exception]
) -> None:
    hub[0] = status
    settings = Settings()
    settings.paths.models = tmp_path / "models"
    settings.models.encoder = str(make_encoder(tmp_path / "tiny"))
    settings.models.policy = "nobody/nothing"
    with pytest.raises(error, match="nobody/nothing cannot be fetched from the model hub"):
        models.run(settings)
    assert not (tmp_path / "models" / "policy").exists()


def test_why_a_fetch_failed_is_found_under_what_libraries_say_of_it() -> None:
    """open_clip reports every failure as a RuntimeError."""
    for cause, kind in [
        (ConnectionRefusedError(111, "refused"), TemporaryError),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), RequestError),
        (ValueError("no such tag"), RequestError),
    ]:
        error = RuntimeError("Failed to download weights")
        error.__cause__ = cause
        found = fetch_error("it cannot be loaded", error)
        assert type(found) is kind
        assert str(found) == "it cannot be loaded: Failed to download weights"


def test_a_missing_or_damaged_file_is_an_item_error(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="run the stage 'features'"):
        FeatureCache.open(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ItemError) as caught:
        FeatureCache.open(tmp_path / "bad.safetensors")
    assert caught.value.reason == "damaged_cache"


@pytest.fixture
def embeddings_server() -> Iterator[str]:
    """Speaks the embeddings part of the OpenAI protocol; fails the first request of each kind with 503."""
    failed: set[str] = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

        def answer(self, code: int, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "siglip"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kind = "messages" if "messages" in body else "input"
            if kind not in failed:
                failed.add(kind)
                return self.answer(503, {})
            if kind == "input":
                rows = [[float(len(text)), 1.0, 0.0] for text in body["input"]]
            else:
                url = body["messages"][0]["content"][0]["image_url"]["url"]
                image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
                rows = [list(np.asarray(image).mean(axis=(0, 1)) + 1)]
            data = [{"index": index, "embedding": row} for index, row in enumerate(rows)]
            self.answer(200, {"data": data[::-1]})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_served_encoder_makes_features_and_searches_them(embeddings_server: str, tmp_path: Path) -> None:
    settings = Settings()
    settings.features.url = embeddings_server
    settings.paths.frames, settings.paths.features = tmp_path / "frames", tmp_path / "features"
    settings.paths.train_samples = settings.paths.test_samples = tmp_path / "samples.jsonl"
    sample = Sample(id="1", video="a.mp4", question="What is there?", answer="it", type="open_ended")
    settings.paths.test_samples.write_text(sample.model_dump_json() + "\n")
    make_frame_cache(make_video(tmp_path / "a.mp4", seconds=5), tmp_path / "frames" / "a.mp4.frames", SMALL)
    assert run(settings).done == ["a.mp4"]
    search = Search(settings.search, default_encoder(settings), settings.paths.frames, settings.paths.features)
    search.open(sample.model_dump())
    blocks = search.call("seek_video_frames", {"query": "a thing", "num_frames": 3})
    assert sum(block["type"] == "image" for block in blocks) == 3


def test_an_embeddings_server_serves(embeddings_server: str, frames: FrameCache, tmp_path: Path) -> None:
    encoder = load_encoder(embeddings_server)
    assert encoder.name == "siglip"
    texts = encoder.encode_text(["four", "seventeen letters"])
    np.testing.assert_allclose(texts[0], np.array([4, 1, 0]) / np.sqrt(17), rtol=1e-6)
    make_feature_cache(frames.path, tmp_path / "a.safetensors", encoder, batch_size=4)
    cache = FeatureCache.open(tmp_path / "a.safetensors")
    expected = np.asarray(frames[7]).mean(axis=(0, 1)) + 1
    np.testing.assert_allclose(cache.features[7], expected / np.linalg.norm(expected), atol=1e-3)
    cache.require_encoder(encoder)
