"""An encoder by OpenAI's API, for machines that load no model themselves: ``/v1/models`` and ``/v1/embeddings``.

Texts come as `input`; an image as `messages`, one that holds it as a data URL, which is the form of vLLM's pooling
servers: `timesearch.retrieval.encoder.ServedEncoder` speaks to either. The model's id ends with the encoder's digest,
so that who knows the address alone tells features of other weights apart; the list of models gives the score from which
the encoder takes a match for one (`even_odds`), where it has such.

What waits while a batch is computed is computed in the next: many clients that send an image each fill a GPU.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from timesearch.base.errors import RequestError, TimeSearchError
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.retrieval.encoder import Encoder
from timesearch.retrieval.noise import Sigmoid
from timesearch.serve.guard import Guard, body_of
from timesearch.serve.keys import Keyed
from timesearch.serve.refusals import described, refusal, unforeseen

_LARGEST = 64 * 2**20
"""Bytes of a request at most: a picture of 4K as PNG is under 40 MiB."""
_MOST_PIXELS = 2**25
_MOST_TEXTS = 2048
_BATCH = 64
"""Images, or texts, that are computed at once."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_KINDS = tuple(f"data:image/{kind.lower()};base64" for kind in _FORMATS)


class _Url(BaseModel):
    url: str


class _Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: _Url | None = None


class _Message(BaseModel):
    role: Literal["user"]
    content: str | list[_Part]


class Asked(BaseModel):
    """A request for embeddings: texts, or one message with one image or text."""

    model: str
    input: str | list[str] | None = None
    messages: list[_Message] = Field(default_factory=list, max_length=1)
    encoding_format: Literal["float", "base64"] = "float"

    def items(self) -> list[str] | list[Image.Image]:
        """What to embed, all texts or all images.

        Raises:
            RequestError: there is nothing, or too much, or what is no image.
        """
        if (self.input is None) == (not self.messages):
            raise RequestError("send texts as `input`, or an image as `messages`")
        if self.input is not None:
            texts = [self.input] if isinstance(self.input, str) else self.input
            if not 0 < len(texts) <= _MOST_TEXTS:
                raise RequestError(f"`input` holds {len(texts)} texts: send 1 to {_MOST_TEXTS}")
            return texts
        content = self.messages[0].content
        if isinstance(content, str):
            return [content]
        if len(content) != 1:
            raise RequestError(f"the message holds {len(content)} parts: send one image, or one text")
        (part,) = content
        return [part.text] if part.image_url is None else [read_image(part.image_url.url)]


def read_image(url: str) -> Image.Image:
    """The RGB image of a data URL.

    Raises:
        RequestError: it is another address, which is not fetched, or no PNG, JPEG or WebP of a sensible size.
    """
    head, _, data = url.partition(",")
    if head.lower() not in _KINDS:
        raise RequestError("an image must be a data URL: data:image/png;base64,...; no other address is fetched")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=_FORMATS)
        if image.width * image.height > _MOST_PIXELS:
            raise RequestError(f"the image has {image.width} x {image.height} pixels: send one of {_MOST_PIXELS}")
        return image.convert("RGB")
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError("the data URL holds no PNG, JPEG or WebP that can be read") from error


class Batches:
    """Computes rows in batches: what waits while one is computed goes into the next.

    Args:
        compute: rows of items, in a thread; never two at once.
    """

    def __init__(self, compute: Callable[[list[Any]], np.ndarray]) -> None:
        self._compute = compute
        self._waiting: list[tuple[Any, asyncio.Future[np.ndarray]]] = []
        self._work: asyncio.Task[None] | None = None

    async def rows(self, items: Sequence[Any]) -> np.ndarray:
        """(n, D) rows of some items; what `compute` raises, if it does for one of their batches."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._compute_all())
        return np.stack(await asyncio.gather(*futures))

    async def _compute_all(self) -> None:
        while self._waiting:
            wanted = [(item, future) for item, future in self._waiting if not future.done()]  # a client may have left
            taken, self._waiting = wanted[:_BATCH], wanted[_BATCH:]
            if not taken:
                continue
            try:
                rows = await run_in_threadpool(self._compute, [item for item, _ in taken])
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), row in zip(taken, rows, strict=True):
                if not future.done():
                    future.set_result(row)


def model_id(encoder: Encoder) -> str:
    """The name under which an encoder is served: its own, and the digest of weights and preprocessing."""
    return f"{encoder.name}-{encoder.digest[:12]}"


def make_embeddings_app(encoder: Encoder, host: str = "127.0.0.1", key: str | None = None) -> FastAPI:
    """The application; `host` and `key` as of `timesearch.serve.api.make_app`."""
    name = model_id(encoder)
    level = encoder.even_odds if isinstance(encoder, Sigmoid) else None
    images, texts = Batches(encoder.encode_images), Batches(encoder.encode_text)
    app = FastAPI(
        title="timesearch encoder",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={StarletteHTTPException: _refuse, TimeSearchError: _refuse_request, Exception: _fail},
    )
    if key is not None:
        app.add_middleware(Keyed, key=key)
    app.add_middleware(Guard, host=host)

    @app.get("/health")
    def health() -> Response:
        return Response()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        listed = {"id": name, "object": "model", "created": 0, "owned_by": "timesearch", "even_odds": level}
        return {"object": "list", "data": [listed]}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        body = b"".join([piece async for piece in body_of(request, "the request", _LARGEST)])
        asked, items = await run_in_threadpool(_read, body)
        if asked.model != name:
            raise HTTPException(404, f"there is no model {asked.model[:100]!r} here, only {name}")
        rows = await (texts if isinstance(items[0], str) else images).rows(items)
        spelt = [_as_base64(row) for row in rows] if asked.encoding_format == "base64" else rows.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(spelt)]
        return {"object": "list", "model": name, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    return app


def _read(body: bytes) -> tuple[Asked, list[str] | list[Image.Image]]:
    try:
        asked = Asked.model_validate(parse_json(body, _LARGEST))
    except UntrustedError as error:
        raise RequestError(f"the request is no JSON that can be read ({error})") from error
    except ValidationError as error:
        told = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestError(described(told, "the request")) from None
    return asked, asked.items()


def _as_base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    default = error.detail == HTTPStatus(error.status_code).phrase
    said = "here are /v1/models and /v1/embeddings" if default else error.detail
    return refusal(request.url.path, error.status_code, said, error.headers)


async def _refuse_request(request: Request, error: Exception) -> Response:
    return refusal(request.url.path, 400, str(error))


async def _fail(request: Request, error: Exception) -> Response:
    return refusal(request.url.path, 500, unforeseen(error))
