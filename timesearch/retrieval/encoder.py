"""Embeds images and queries in one space: open_clip models by name or folder, or an embeddings server by URL."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from timesearch.base.errors import RequestError, TemporaryError
from timesearch.base.extras import require_modules
from timesearch.base.files import file_digest, json_digest, write_json
from timesearch.base.http import BadReplyError, M, RefusedError, check_address, may_pass, request_now, tries
from timesearch.base.hub import fetch_error
from timesearch.base.model_folders import PARTS, read_config, require_data_only
from timesearch.base.redaction import redact
from timesearch.base.replies import Embeddings, ModelList
from timesearch.base.servers import authorisation
from timesearch.base.threads import use_fitting_threads
from timesearch.base.untrusted import MAX_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image

_QUERIES_HELD = 8192
"""Embedded queries kept in memory: 8192 x 1152 x 4 bytes are 38 MB."""


class Encoder(Protocol):
    """What embeds images and queries.

    `name` and `pretrained` say which weights, `preprocessing` is the digest of what is done to an image before them,
    and `digest` stands for all three: features of encoders with equal digests may be mixed.
    """

    name: str
    pretrained: str
    preprocessing: str
    digest: str

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embed queries as (n, D) float32 unit rows; each is computed once."""
        ...

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """Embed RGB images as (n, D) float32 unit rows, in one batch."""
        ...

    def prepare(self, images: Sequence[Image]) -> Any:
        """The part of `encode_images` that needs no accelerator; may run in another thread."""
        ...

    def encode_prepared(self, batch: Any) -> np.ndarray:
        """The rest of `encode_images`."""
        ...


def load_encoder(model: str, pretrained: str | None = None, device: str | None = None) -> Encoder:
    """Load an encoder.

    Args:
        model: an open_clip model name, a folder in open_clip's layout (`open_clip_config.json` and
            `open_clip_model.safetensors`), or the http(s) URL of an OpenAI-compatible server (``.../v1``).
        pretrained: an open_clip tag or a .safetensors file for a model name; for a URL, the served model's name.
        device: a torch device; a GPU where there is one if None.

    Raises:
        RequestError: there is no such model, tag or folder, or the server refuses.
        TemporaryError: the model hub or the server does not answer.
    """
    if model.startswith(("http://", "https://")):
        return ServedEncoder(model, pretrained)
    return OpenClipEncoder(model, pretrained, device)


class _Queries:
    """Embedded queries that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Queries, ()

    def embed(self, texts: Sequence[str], compute: Any) -> np.ndarray:
        with self._lock:
            missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
            known = {text: self._rows[text] for text in texts if text in self._rows}
        if missing:
            known |= dict(zip(missing, compute(missing), strict=True))
        with self._lock:
            for text in texts:
                self._rows[text] = known[text]
                self._rows.move_to_end(text)
            while len(self._rows) > _QUERIES_HELD:
                self._rows.popitem(last=False)
        return np.stack([known[text] for text in texts])


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class OpenClipEncoder:
    """An open_clip model in this process: bfloat16 on a GPU, float32 on all cores of a CPU.

    A local folder is checked at once and loaded when first used, so that a run that finds everything up to date does
    not wait for it. Nothing in it is run: see `timesearch.base.model_folders`.
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str | None = None) -> None:
        require_modules("an encoder in this process", "torch", "open_clip", instead="name its server by --encoder-url")
        self._device = device
        self._folder: Path | None = None
        self._queries = _Queries()
        self._loading = threading.Lock()
        folder = Path(model)
        if folder.is_dir():
            config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
            for needed in (config, weights):
                if not needed.is_file():
                    raise RequestError(f"{needed} is missing: {folder} is no folder in open_clip's layout")
            require_data_only(folder)
            settings = read_config(config)
            require_own_towers(config, settings.get("model_cfg"))
            self._folder, self._tag = folder, None
            self.name, self.pretrained = folder.name, f"sha256:{file_digest(weights)[:16]}"
            shaping = [settings.get("preprocess_cfg"), settings["model_cfg"]["vision_cfg"]]
        else:
            if ":" in model:
                raise RequestError(f"the encoder {model!r} is no open_clip model's name: fetch it, and name its folder")
            if not pretrained:
                raise RequestError(f"the encoder {model!r} is no folder here: name its pretrained tag, too")
            self._tag = pretrained
            self.name, self.pretrained = model, pretrained
            if Path(pretrained).is_file():
                if Path(pretrained).suffix != ".safetensors":
                    raise RequestError(f"{pretrained}: weights are read from .safetensors files alone")
                self.pretrained = f"sha256:{file_digest(pretrained)[:16]}"
            shaping = [str(self._parts.preprocess)]
        self.preprocessing = json_digest(shaping)[:16]
        self.digest = json_digest([self.name, self.pretrained, self.preprocessing])[:16]

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it loads the model itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_parts", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._loading = threading.Lock()

    @functools.cached_property
    def _parts(self) -> _Parts:
        import open_clip
        import torch

        device = torch.device(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            with _as_open_clip_sees_it(self._folder) if self._folder else nullcontext(self.name) as identifier:
                model, _, preprocess = open_clip.create_model_and_transforms(
                    identifier,
                    pretrained=self._tag,
                    precision="bf16" if dtype == torch.bfloat16 else "fp32",
                    device=device,
                )
                tokenizer = open_clip.get_tokenizer(identifier)
        except RequestError:
            raise
        except Exception as error:  # what the libraries raise about a folder that others made is anything
            raise fetch_error(f"the encoder {self.name!r} ({self.pretrained}) cannot be loaded", error) from error
        use_fitting_threads(model)
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        return _Parts(model.eval(), preprocess, tokenizer, device, dtype, pool)

    def _load(self) -> _Parts:
        with self._loading:
            return self._parts

    @property
    def even_odds(self) -> float | None:
        """The cosine at which a model with SigLIP's bias takes a pair for a match with even odds; None without one."""
        model = self._load().model
        bias = getattr(model, "logit_bias", None)
        return None if bias is None else float(-bias.detach() / model.logit_scale.detach().exp())

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embed queries as (n, D) float32 unit rows; each is computed once."""
        return self._queries.embed(texts, self._embed_texts)

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        import torch

        parts = self._load()
        with torch.inference_mode():
            rows = parts.model.encode_text(parts.tokenizer(texts).to(parts.device))
        return _unit_rows(rows.float().cpu().numpy())

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """Embed RGB images as (n, D) float32 unit rows, in one batch."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Sequence[Image]) -> Any:
        """Resize and normalise images into a (n, 3, H, W) tensor, in threads."""
        import torch

        parts = self._load()
        return torch.stack(list(parts.pool.map(parts.preprocess, images)))

    def encode_prepared(self, batch: Any) -> np.ndarray:
        """Embed a prepared batch."""
        import torch

        parts = self._load()
        with torch.inference_mode():
            rows = parts.model.encode_image(batch.to(parts.device, parts.dtype, non_blocking=True))
        return _unit_rows(rows.float().cpu().numpy())


def require_own_towers(source: Path | str, model: Any) -> None:
    """Refuse what is not an open_clip configuration, or one whose towers are other models, loaded from elsewhere.

    Args:
        source: where the configuration comes from, for the message.
        model: its `model_cfg`.

    Raises:
        RequestError: naming what is wrong.
    """
    towers = [model.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if not towers or not all(isinstance(tower, dict) for tower in towers):
        raise RequestError(f"{source} describes no model: model_cfg.vision_cfg and model_cfg.text_cfg are needed")
    for tower in (*towers, model.get("multimodal_cfg")):
        parts = tower if isinstance(tower, dict) else {}
        timm = parts.get("timm_model_name")
        if parts.get("hf_model_name") or (timm and not str(timm).replace(".", "_").isidentifier()):
            other = parts.get("hf_model_name") or timm
            raise RequestError(f"{source} loads another model, {other!r}: take an encoder that is whole in itself")


@contextmanager
def _as_open_clip_sees_it(folder: Path) -> Iterator[str]:
    """open_clip's name of a copy of `folder`: its configuration with the keys that are known and load nothing, its
    weights, and the files of its tokenizer."""
    import open_clip
    from open_clip.coca_model import MultimodalCfg
    from open_clip.transform import PreprocessCfg

    config = read_config(folder / "open_clip_config.json")
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg")
    clean = {key: model[key] for key in _MODEL_KEYS if key in model}
    for name, kind in (
        ("vision_cfg", open_clip.CLIPVisionCfg),
        ("text_cfg", open_clip.CLIPTextCfg),
        ("multimodal_cfg", MultimodalCfg),
    ):
        if isinstance(model.get(name), dict):
            clean[name] = _known(model[name], kind)
    text, tokenizer = clean["text_cfg"], model["text_cfg"].get("tokenizer_kwargs")
    text["tokenizer_kwargs"] = {key: value for key, value in (tokenizer or {}).items() if key in _TOKENIZER_KEYS}
    if model["text_cfg"].get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = "in this folder"
        text["tokenizer_kwargs"]["trust_remote_code"] = False
    shaping = _known(preprocess, PreprocessCfg) if isinstance(preprocess, dict) else {}
    with tempfile.TemporaryDirectory() as made:
        for path in {path for part in PARTS for path in folder.glob(part)}:
            (Path(made) / path.name).symlink_to(path.absolute())
        write_json(Path(made) / "open_clip_config.json", {"model_cfg": clean, "preprocess_cfg": shaping})
        yield f"local-dir:{made}"


_MODEL_KEYS = ("embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
_TOKENIZER_KEYS = ("clean", "strip_sep_token", "language", "reduction_mask")


def _known(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """The values that a dataclass of open_clip has fields for, those left out that name other models."""
    names = {field.name for field in fields(kind) if not field.name.startswith(("hf_", "tokenizer_kwargs"))}
    return {name: value for name, value in values.items() if name in names}


@dataclass(frozen=True)
class _Parts:
    """A loaded open_clip model with what stands before it."""

    model: Any
    preprocess: Any
    tokenizer: Any
    device: Any
    dtype: Any
    pool: ThreadPoolExecutor


class ServedEncoder:
    """An OpenAI-compatible embeddings server: `timesearch encoder serve`, or vLLM's pooling runner with such a model.

    Texts go as `input`; an image goes as one chat message that holds it, which is vLLM's form for images.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        import httpx

        check_address(url)
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers=authorisation())
        self.name = model or self._only_model()
        self.pretrained = "served"
        self.preprocessing = "server"
        self.digest = json_digest([self.name, self.pretrained, self.preprocessing])[:16]
        self._pool = ThreadPoolExecutor(16)
        self._queries = _Queries()

    def __reduce__(self) -> tuple[Any, ...]:
        return ServedEncoder, (self._url, self.name)

    def _only_model(self) -> str:
        listed = self._send("GET", "/models", ModelList).data
        if not listed:
            raise RequestError(f"the embeddings server at {redact(self._url)} lists no model: name one")
        return listed[0].id

    @functools.cached_property
    def even_odds(self) -> float | None:
        """As of `OpenClipEncoder`, where the server gives it."""
        served = self._send("GET", "/models", ModelList).data
        return next((model.even_odds for model in served if model.id == self.name), None)

    def _send(self, method: str, path: str, kind: type[M], body: dict[str, Any] | None = None) -> M:
        import httpx
        from tenacity import Retrying

        content = None if body is None else json.dumps({"model": self.name, **body}).encode()
        retrying = Retrying(**tries(count=4 if body else 1), reraise=True)
        try:
            return retrying(
                request_now,
                self._client,
                method,
                self._url + path,
                kind,
                content=content,
                timeout=120.0,
                limit=MAX_BYTES,
            )
        except BadReplyError as error:
            raise RequestError(f"{redact(self._url)} is no embeddings server: it gave {error}") from error
        except RefusedError as error:
            failure = TemporaryError if may_pass(error) else RequestError
            raise failure(f"the embeddings server at {redact(self._url)} refuses ({error.status}): {error}") from error
        except httpx.TransportError as error:
            raise TemporaryError(
                f"no embeddings server answers at {redact(self._url)} ({redact(str(error))})"
            ) from error

    def _embed(self, body: dict[str, Any], count: int) -> list[list[float]]:
        """The embeddings of `count` inputs, all of one length."""
        rows = self._send("POST", "/embeddings", Embeddings, body).rows()
        if len(rows) != count or len({len(row) for row in rows}) != 1:
            raise RequestError(
                f"the embeddings server at {redact(self._url)} gave {len(rows)} embeddings of "
                f"{' and '.join(map(str, sorted({len(row) for row in rows})))} numbers for {count} inputs"
            )
        return rows

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embed queries as (n, D) float32 unit rows; each is asked for once."""
        return self._queries.embed(texts, self._embed_texts)

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        return _unit_rows(np.array(self._embed({"input": texts}, len(texts))))

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """Embed RGB images as (n, D) float32 unit rows, several requests at once."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Sequence[Image]) -> Any:
        """Encode images as PNG data URLs, without loss."""
        return list(self._pool.map(_data_url, images))

    def encode_prepared(self, batch: Any) -> np.ndarray:
        """Ask the server for each image of the batch."""
        rows = self._pool.map(self._embed_image, batch)
        return _unit_rows(np.array(list(rows)))

    def _embed_image(self, url: str) -> list[float]:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return self._embed({"messages": [{"role": "user", "content": content}]}, 1)[0]


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
