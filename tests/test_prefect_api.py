"""The Prefect server of the project and a real browser: its own page works, a foreign one neither reads nor starts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect_service import Prefect
from scratch_project import make_project, wait_for

from flows.guard import is_ours

POCKET = "pipeline/pocket"
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

FOREIGN = """
async ([api, deployment]) => {
  const seen = {}
  const attempt = async (name, path, options = {}) => {
    try {
      const answer = await fetch(api + path, options)
      seen[name] = answer.type == 'opaque' ? 'opaque' : answer.status + ' ' + (await answer.text()).slice(0, 100)
    } catch (error) { seen[name] = 'failed' }
  }
  const start = JSON.stringify({name: 'foreign'})
  const json = {'Content-Type': 'application/json'}
  const path = `/deployments/${deployment}/create_flow_run`
  await attempt('read', `/deployments/${deployment}`)
  await attempt('token', '/csrf-token?client=foreign')
  await attempt('list', '/flow_runs/filter', {method: 'POST', headers: json, body: '{}'})
  await attempt('list simply', '/flow_runs/filter', {method: 'POST', body: '{}'})
  await attempt('start', path, {method: 'POST', headers: json, body: start})
  await attempt('start simply', path, {method: 'POST', body: start})
  await attempt('start blindly', path, {method: 'POST', mode: 'no-cors', body: start})
  await attempt('start untyped', path, {method: 'POST', mode: 'no-cors', body: new Blob([start])})
  await attempt('start by a token', path, {method: 'POST', body: start,
    headers: {...json, 'Prefect-Csrf-Token': 'x', 'Prefect-Csrf-Client': 'foreign'}})
  const frame = Object.assign(document.createElement('iframe'), {name: 'frame'})
  document.body.append(frame)
  const form = Object.assign(document.createElement('form'), {
    action: api + path, method: 'POST', target: 'frame', enctype: 'text/plain'})
  form.append(Object.assign(document.createElement('input'), {name: '{"name": "foreign", "x": "', value: '"}'}))
  document.body.append(form)
  form.submit()
  for (const where of ['/events/out', '/logs/out', '/events/in', '/work_pools/timesearch/workers/connect'])
    for (const protocols of [[], ['prefect']])
      seen[`socket ${where} ${protocols}`] = await new Promise(done => {
        const socket = new WebSocket(api.replace('http', 'ws') + where, protocols)
        socket.onopen = () => done('open')
        socket.onerror = () => done('failed')
      })
  await new Promise(done => setTimeout(done, 500))
  return seen
}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """`prefect server start` in the project folder, and nothing else that would make it safe."""
    service = Prefect(make_project(tmp_path_factory.mktemp("prefect")))
    try:
        service.command("work-pool", "create", "timesearch", "--type", "process")
        service.command("deploy", "--name", POCKET)
        yield service
    finally:
        service.close()


def runs(service: Prefect) -> list[str]:
    """Names of the runs that were asked for."""
    wanted = {"deployment_id": {"any_": [service.deployment(POCKET)]}}
    return [flow_run["name"] for flow_run in service.api("flow_runs/filter", flow_runs=wanted)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        names = "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP *.example 127.0.0.1"
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*ARGUMENTS, names])
        yield launched
        launched.close()


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[str]:
    """Address of a page of somebody else's."""
    (tmp_path / "page.html").write_text("<!doctype html><title>foreign</title><p>foreign")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"evil.example:{server.server_address[1]}/page.html"
    server.shutdown()


def test_a_foreign_page_neither_starts_a_run_nor_reads_one(service: Prefect, browser: Any, foreign: str) -> None:
    service.command("deployment", "run", POCKET, "--flow-run-name", "ours")
    for address in (
        foreign,
        foreign.replace("evil.example", "127.0.0.1"),
        foreign.replace("evil.example", "localhost"),
    ):
        page = browser.new_page()
        page.goto(f"http://{address}")
        seen = page.evaluate(FOREIGN, [service.env["PREFECT_API_URL"], service.deployment(POCKET)])
        blind = {name: seen.pop(name) for name in ("start blindly", "start untyped")}
        assert set(blind.values()) <= {"opaque", "failed"}  # what came back, no page is shown
        assert set(seen.values()) == {"failed"}, seen
        page.close()
    assert runs(service) == ["ours"]


def test_a_name_of_a_foreign_page_s_own_does_not_lead_to_the_server(service: Prefect, browser: Any) -> None:
    page = browser.new_page()
    answer = page.goto(f"http://evil.example:{service.port}/api/deployments/name/{POCKET}")
    assert answer.status == 403
    assert "another origin" in page.inner_text("body")
    page.close()


def test_the_server_s_own_page_shows_and_starts_a_run(service: Prefect, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    refused: list[tuple[int, str]] = []
    page.on("response", lambda answer: refused.append((answer.status, answer.url)) if answer.status >= 400 else None)
    page.goto(f"http://127.0.0.1:{service.port}/deployments/deployment/{service.deployment(POCKET)}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Quick run").click()
    wait_for(lambda: len(runs(service)) >= 2, 60, "the run that the page started")
    assert refused == []
    page.close()


@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("127.0.0.1:4200", None, True),
        ("[::1]:4200", None, True),
        ("prefect-server:4200", None, True),
        ("host.docker.internal:4200", None, True),
        ("10.0.0.7", "http://10.0.0.7", True),
        ("localhost:4200", "http://localhost:4200", True),
        ("localhost:4300", "http://127.0.0.1:4200", True),
        ("prefect.team.example", "https://prefect.team.example", True),
        ("evil.example:4200", None, False),
        ("evil.example:4200", "http://evil.example:4200", False),
        ("127.0.0.1:4200", "http://127.0.0.1:8000", False),
        ("127.0.0.1:4200", "http://localhost:8000", False),
        ("127.0.0.1:4200", "null", False),
        ("127.0.0.1:4200", "", False),
        ("127.0.0.1:4200", "file://", False),
        ("127.0.0.1:4200.evil.example", None, False),
        ("127.0.0.1.evil.example", None, False),
        ("[127.0.0.1", None, False),
        ("a@evil.example", None, False),
    ],
)
def test_who_is_let_in(host: str, origin: str | None, ours: bool) -> None:
    origins = {"http://127.0.0.1:4200", "http://localhost:4200", "https://prefect.team.example"}
    assert is_ours(host, origin, origins) is ours


def test_scripts_that_fetch_a_token_first_start_runs(service: Prefect) -> None:
    before = len(runs(service))
    path = f"{service.env['PREFECT_API_URL']}/deployments/{service.deployment(POCKET)}/create_flow_run"
    assert httpx.post(path, json={}, timeout=60).status_code == 403
    service.start_run(POCKET, parameters={"overrides": {"seed": 3}})
    assert len(runs(service)) == before + 1
