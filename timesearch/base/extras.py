"""What the core does not bring: which extra of the package holds which library, and the sentence where one is missing.

The core indexes, searches, asks and serves with models behind URLs. What loads a model, trains one or runs the stages
of a pipeline imports its libraries when it needs them, and asks for them first (`require_modules`).

vLLM wants an older FastAPI than Prefect does, so that the two are current only in environments apart. What needs vLLM
runs with the Python that has it (`python_with_vllm`).
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from timesearch.base.errors import RequestError

EXTRAS: dict[str, tuple[str, ...]] = {
    "local": ("torch", "torchvision", "transformers", "open_clip", "peft", "huggingface_hub", "tokenizers"),
    "train": ("trl", "accelerate", "datasets"),
    "workflow": ("prefect", "dvc", "mlflow", "sqlalchemy", "aiohttp", "fsspec", "scipy"),
    "ray": ("ray",),
    "vllm": ("vllm",),
    "deepspeed": ("deepspeed",),
    "asr": ("faster_whisper",),
}
"""Extra -> the modules that come with it, as `pyproject.toml` has it; one that several bring is under the smallest."""
VLLM_ENVIRONMENT = Path(sys.prefix).parent / ".venv-vllm"
"""Where `make vllm` puts vLLM: beside this environment."""
_EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


class MissingExtraError(RequestError):
    """Something needs an extra that is not installed.

    Args:
        what: needs it, as the beginning of the sentence.
        module: that is missing.
        extra: which brings it.
        instead: what else can be done.
    """

    def __init__(self, what: str, module: str, extra: str, instead: str = "") -> None:
        in_checkout = "make vllm" if extra == "vllm" else f"uv sync --inexact --extra {extra}"
        super().__init__(
            f"{what} needs {module}, which is not installed: pip install 'timesearch[{extra}]' "
            f"(in a checkout: {in_checkout}){instead and f', or {instead}'}"
        )


def require_modules(what: str, *modules: str, instead: str = "") -> None:
    """See that modules of extras are there, before anything is loaded or done.

    Args:
        what: needs them, as the beginning of a sentence.
        modules: of `EXTRAS`.
        instead: what else can be done.

    Raises:
        MissingExtraError: one is not.
    """
    for module in modules:
        if not _is_there(module):
            raise MissingExtraError(what, module, _EXTRA_OF[module], instead)


def python_with_vllm() -> str:
    """The Python that has vLLM: this one, or that of `VLLM_ENVIRONMENT`; this one, too, where there is neither."""
    other = VLLM_ENVIRONMENT / "bin" / "python"
    return sys.executable if _is_there("vllm") or not other.exists() else str(other)


def path_for(program: str) -> str:
    """`PATH` for a program: that of `VLLM_ENVIRONMENT` finds the others there first, for vLLM calls some by name."""
    folder, path = VLLM_ENVIRONMENT / "bin", os.environ.get("PATH", os.defpath)
    return f"{folder}{os.pathsep}{path}" if Path(program).parent == folder else path


def missing_extra(error: ImportError, what: str = "this") -> MissingExtraError | None:
    """The sentence for an import that failed; None where the module is of no extra, or is there but broken."""
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(module)
    return None if extra is None or _is_there(module) else MissingExtraError(what, module, extra)


def _is_there(module: str) -> bool:
    return sys.modules[module] is not None if module in sys.modules else find_spec(module) is not None
