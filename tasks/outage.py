"""Runs go on while Prefect's API is away: what its calls raise then, and how long it is waited for."""

from __future__ import annotations

import time

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

AWAY = (httpx.TransportError, ConcurrencySlotAcquisitionError)
"""What a task raises where the API stayed away: it could not take or give back its slot of a limit."""


def is_back() -> bool:
    """Wait for the API as long as Prefect's client does (`client.max_retries` of `prefect.toml`)."""
    deadline = time.monotonic() + 2 ** (PREFECT_CLIENT_MAX_RETRIES.value() + 1)
    while get_client(sync_client=True).api_healthcheck() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(2)
    return True
