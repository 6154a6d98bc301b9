"""The encoder behind a URL: the rows of the encoder itself, asked by our own client and the official one; refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import running
from synthetic import make_encoder, make_video

from timesearch.base.errors import RequestError
from timesearch.cli.opening import encoder_for
from timesearch.library.index import index_folders
from timesearch.retrieval.encoder import Encoder, load_encoder
from timesearch.serve.embeddings import Asked, Batches, make_embeddings_app, read_image
from timesearch.settings import Settings

KEY = "a-key-of-the-tests-0123456789"


class Levelled:
    """An encoder as SigLIP's are: with a level of its own."""

    even_odds = 0.125

    def __init__(self, inner: Encoder) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Levelled:
    return Levelled(load_encoder(str(make_encoder(tmp_path_factory.mktemp("encoder") / "tiny"))))


@pytest.fixture(scope="module")
def url(encoder: Levelled) -> Iterator[str]:
    with running(make_embeddings_app(encoder)) as address:  # type: ignore[arg-type]
        yield f"{address}/v1"


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(7)
    return [Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8)) for _ in range(count)]


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_served_encoder_gives_the_rows_of_the_encoder(url: str, encoder: Levelled) -> None:
    served, images = load_encoder(url), pictures(70)
    np.testing.assert_allclose(served.encode_images(images), encoder.encode_images(images), atol=1e-5)
    texts = ["a red car", "", "什么 🚗 " * 40]
    np.testing.assert_allclose(served.encode_text(texts), encoder.encode_text(texts), atol=1e-5)
    assert served.name == f"tiny-{encoder.digest[:12]}", "other weights at the same address are another encoder"
    assert served.even_odds == 0.125  # type: ignore[attr-defined]


def test_the_official_client_is_answered(url: str, encoder: Levelled) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    (model,) = client.models.list().data
    given = client.embeddings.create(model=model.id, input=["a red car", "a dog"])  # asks for base64
    np.testing.assert_allclose(
        [row.embedding for row in given.data], encoder.encode_text(["a red car", "a dog"]), atol=1e-5
    )
    with pytest.raises(openai.NotFoundError, match="only tiny-"):
        client.embeddings.create(model="other", input="a dog")
    with pytest.raises(openai.BadRequestError, match="send 1 to 2048"):
        client.embeddings.create(model=model.id, input=[])


def test_many_clients_share_batches_and_one_that_leaves_is_not_computed_for() -> None:
    seen: list[int] = []
    begin = threading.Event()

    def compute(items: list[int]) -> np.ndarray:
        begin.wait()
        seen.append(len(items))
        if 13 in items:
            raise ValueError("unlucky")
        return np.array(items)[:, None]

    async def ask() -> list[Any]:
        batches = Batches(compute)
        tasks = [asyncio.create_task(batches.rows([number])) for number in (*range(10), *range(20, 90))]
        await asyncio.sleep(0.05)
        tasks[-1].cancel()
        tasks.append(asyncio.create_task(batches.rows([100, 101])))
        await asyncio.sleep(0.05)
        begin.set()
        first = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(ValueError, match="unlucky"):
            await batches.rows([13])
        return [*first, await batches.rows([14])]

    given = asyncio.run(ask())
    assert [int(row[0, 0]) for row in given[:79]] == [*range(10), *range(20, 89)]
    assert isinstance(given[79], asyncio.CancelledError)
    assert given[80].tolist() == [[100], [101]]
    assert given[81].tolist() == [[14]]
    assert seen == [64, 17, 1, 1]


def test_what_is_no_request_is_refused_in_a_sentence(url: str) -> None:
    name = httpx.get(f"{url}/models").json()["data"][0]["id"]
    image = {"type": "image_url", "image_url": {"url": png(pictures(1)[0])}}
    for body, said in [
        ({}, "model cannot be read"),
        ({"model": name}, "send texts as `input`"),
        ({"model": name, "input": "a", "messages": [{"role": "user", "content": "a"}]}, "send texts as `input`"),
        ({"model": name, "input": [1, 2]}, "cannot be read"),
        ({"model": name, "messages": [{"role": "user", "content": [image, image]}]}, "2 parts"),
        ({"model": name, "messages": [{"role": "system", "content": "a"}]}, "cannot be read"),
        *(
            ({"model": name, "messages": [{"role": "user", "content": [{**image, "image_url": {"url": bad}}]}]}, why)
            for bad, why in [
                ("http://127.0.0.1/a.png", "no other address is fetched"),
                ("file:///etc/passwd", "no other address is fetched"),
                ("data:image/svg+xml;base64,AAAA", "no other address is fetched"),
                ("data:image/png;base64,AAAA", "that can be read"),
                ("data:image/png;base64,???", "that can be read"),
                (png(Image.new("RGB", (6000, 6000))), "6000 x 6000"),
            ]
        ),
    ]:
        reply = httpx.post(f"{url}/embeddings", json=body)
        assert reply.status_code == 400, body
        assert said in reply.json()["error"]["message"]
    assert httpx.post(f"{url}/embeddings", content=b"{").status_code == 400
    assert httpx.get(f"{url}/nothing").status_code == 404
    assert httpx.get(f"{url}/models", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{url}/models", headers={"Origin": "http://evil.example"}).status_code == 403


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(("png", "jpeg", "webp")))
def test_no_bytes_break_the_reader_of_images(data: bytes, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    for content in (data, buffer.getvalue()[:40] + data):
        try:
            image = read_image(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
            assert image.mode == "RGB"
        except RequestError:
            pass


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(("model", "input", "messages")), st.text() | st.lists(st.text(), max_size=3)))
def test_no_request_breaks_the_reader_of_requests(body: dict[str, Any]) -> None:
    try:
        items = Asked.model_validate(json.loads(json.dumps({"model": "m", **body}))).items()
    except (RequestError, ValueError):
        return
    assert all(isinstance(item, str) for item in items)


def test_a_key_is_asked_for(encoder: Levelled, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_embeddings_app(encoder, key=KEY)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)

    async def status(**headers: str) -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    assert asyncio.run(status()) == 401
    assert asyncio.run(status(Authorization=f"Bearer {KEY}")) == 200


def test_a_library_follows_its_server_to_another_address(url: str, encoder: Levelled, tmp_path: Path) -> None:
    make_video(tmp_path / "videos" / "a.mp4", seconds=2, size="64x64")
    parameters = Settings()
    parameters.features.url = url
    library = tmp_path / "library"
    served, record = encoder_for(library, parameters)
    assert index_folders(library, [tmp_path / "videos"], parameters, served, record).videos == 1
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(lambda _: encoder_for(library, parameters)[1].source == url, range(4)))
    other = url.replace("127.0.0.1", "localhost")
    parameters.features.url = other
    index_folders(library, [], parameters, *encoder_for(library, parameters))
    assert encoder_for(library, Settings())[1].source == other
