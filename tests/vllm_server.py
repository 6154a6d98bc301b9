"""vLLM's API server, its engine and worker forked from it: ``python tests/vllm_server.py`` takes vLLM's own options.

On CPUs vLLM starts each of the three as a new Python, which imports vLLM and PyTorch once more.
"""

from __future__ import annotations

import multiprocessing
import runpy

import vllm.utils.system_utils as processes

processes.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
