"""New or changed videos of the sample files: fetched and cached, and only those."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.pipeline import CHECKOUT, run_name, run_stages
from tasks.reproduce import turn
from timesearch.settings import load_settings


@flow(name="prepare", flow_run_name=run_name)
def prepare(retry_failed: bool = True) -> dict[str, Any]:
    """Fetch and cache the videos that the sample files name and the caches lack.

    Args:
        retry_failed: Try again what failed before (a source that was down). Otherwise only new or changed videos.
    """
    if retry_failed:
        logger = get_run_logger()
        paths = load_settings(CHECKOUT / "params.yaml").paths
        with turn(CHECKOUT, logger.info):
            for folder in (paths.videos, paths.frames, paths.features, paths.subtitles):
                listed = CHECKOUT / folder / "failures.jsonl"
                if listed.is_file():
                    logger.info("trying again what is listed in %s", listed)
                    listed.unlink()
    return run_stages(("download", "models", "frames", "features", "subtitles"))


if __name__ == "__main__":
    prepare()
