"""The report in a real browser: it opens, filters, shows an episode and its frames, and runs nothing that data says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluated import HOSTILE, SECONDS, make_project, searching

from timesearch.base.errors import RequestError
from timesearch.base.files import write_jsonl
from timesearch.cli import main
from timesearch.evaluation.results import load_metrics, prediction_files, write_evaluation
from timesearch.evaluation.scoring import evaluate_files
from timesearch.report import build
from timesearch.settings import Evaluate, Settings

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An evaluated project with its report."""
    settings = make_project(tmp_path_factory.mktemp("project"))
    results = settings.paths.results
    files = prediction_files(settings)
    methods = evaluate_files(files, settings.evaluate, settings.paths.videos)
    write_evaluation(methods, results, settings.evaluate, settings.seed)
    build.write_results_report(settings)
    return settings


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if not CHROMIUM.is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def open_report(browser) -> Iterator:
    """Opens a report and fails if the page says anything on its console or asks for anything but itself."""
    contexts = []

    def opened(path: Path, width: int = 1280, scheme: str = "light", address: str = ""):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not _own(request.url, path) else None)
        page.goto(f"{path.as_uri()}{address}")
        page.wait_for_selector("html[data-ready]")
        contexts.append((context, said))
        return page

    yield opened
    for context, said in contexts:
        context.close()
        assert said == []


def _own(url: str, path: Path) -> bool:
    return url.startswith((path.as_uri(), "data:"))


def test_the_table_the_plots_and_the_groups_show(project: Settings, open_report) -> None:
    page = open_report(project.paths.results / "report.html")
    rows = page.locator("#table tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["uniform sampling", "GRPO-CSV"]
    expected = json.loads((project.paths.results / "metrics.json").read_text())["grpo_csv"]["temporal_f1"]
    assert f"{expected * 100:.1f}" in rows[1]
    assert re.search(r"\d+\.\d – \d+\.\d", rows[1])
    titles = page.locator("#charts h3").all_inner_texts()
    assert {"Temporal F1 against frames used", "Accuracy against video length", "Tool calls by turn"} <= set(titles)
    assert "Training: reward" in titles
    assert page.locator("#charts svg.chart path").count() >= 4
    assert page.locator("#by").get_by_text("duration group").is_visible()
    assert "1 of them" not in page.locator("#problems").inner_text()
    assert "Rows with a problem: 1" in page.locator("#problems").inner_text()


def test_filters_narrow_the_list(project: Settings, open_report) -> None:
    page = open_report(project.paths.results / "report.html")
    count = page.locator("#count")
    assert count.inner_text() == "12 episodes"
    page.get_by_label("Method").select_option(label="GRPO-CSV")
    assert count.inner_text() == "6 of 12 episodes"
    page.get_by_label("Search", exact=True).select_option("no")
    assert count.inner_text() == "1 of 12 episodes"
    page.get_by_label("Search", exact=True).select_option("")
    page.get_by_label("Answer").select_option("unparsed")
    assert page.locator(".row").count() == 1
    page.get_by_label("Answer").select_option("wrong")
    assert page.locator(".row .verdict").all_inner_texts() == ["wrong", "wrong"]
    page.get_by_label("Answer").select_option("")
    page.get_by_label("Group", exact=True).select_option(label="duration group: 15")
    assert count.inner_text() == "3 of 12 episodes"
    page.get_by_label("Question or id contains").fill("q5")
    assert count.inner_text() == "1 of 12 episodes"


def test_an_episode_shows_its_search(project: Settings, open_report, tmp_path: Path) -> None:
    page = open_report(project.paths.results / "report.html")
    page.get_by_label("Method").select_option(label="GRPO-CSV")
    page.locator(".row", has_text="Question 4").click()
    detail = page.locator(".detail")
    assert "A. a red square right answer, its answer" in detail.inner_text()
    assert "A (from what was found alone)" in detail.inner_text()
    assert detail.locator(".lane .name").all_inner_texts() == ["ground truth", "preview", "turn 1", "turn 2"]
    call = detail.locator(".call").first.inner_text()
    assert "seek_video_frames query “a red square”, start_time 4, end_time 16, num_frames 2" in call
    pictures = detail.locator(".strip img")
    assert pictures.count() == 4
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    found = detail.locator(".dot.searched").nth(1)
    found.hover()
    peek = detail.locator(".peek")
    assert peek.inner_text().strip() == "turn 1, 9.0 s"
    assert peek.locator("img").evaluate("(image) => image.naturalWidth") > 0
    band = detail.locator(".behind span").first.bounding_box()
    track = detail.locator(".track").first.bounding_box()
    assert (band["x"] - track["x"]) / track["width"] == pytest.approx(8 / SECONDS, abs=0.01)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000
    page.locator(".row[aria-expanded=true]").click()
    assert page.locator(".detail").count() == 0


def test_the_keyboard_is_enough(project: Settings, open_report) -> None:
    page = open_report(project.paths.results / "report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("Method").select_option(label="GRPO-CSV")
    page.locator(".row", has_text="Question 4").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "dot truth"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.locator(".peek").inner_text().strip() == "turn 1, 4.5 s"
    page.keyboard.press("Escape")
    assert page.locator(".peek").is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "row"


def test_text_is_shown_as_text(project: Settings, open_report) -> None:
    page = open_report(project.paths.results / "report.html")
    page.get_by_label("Answer").select_option("unparsed")
    page.locator(".row").click()
    assert page.locator(".detail").get_by_text(HOSTILE, exact=True).count() >= 2
    assert page.title() == "timesearch report"
    assert page.locator(".detail script, .detail img[src=x]").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_nothing_is_cut_off(project: Settings, open_report, width: int, scheme: str) -> None:
    page = open_report(project.paths.results / "report.html", width, scheme, address="#episode=grpo_csv%2Fq4")
    assert page.locator(".row[aria-expanded=true]").inner_text().startswith("right")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.locator("button, select, input").evaluate_all(
        "(nodes) => nodes.filter((node) => node.offsetParent && node.getBoundingClientRect().height < 24).length"
    )
    assert small == 0


def test_two_thousand_episodes_open_at_once(tmp_path: Path, open_report) -> None:
    rows = [searching(i, "a.mp4", [[4.5, 9.0], [9.5, 11.0]], "ABC"[i % 3], thought="why " * 40) for i in range(2000)]
    path = tmp_path / "grpo_csv.jsonl"
    write_jsonl(path, rows)
    options = Evaluate(bootstrap=0)
    write_evaluation(evaluate_files({"grpo_csv": path}, options, None), tmp_path, options, seed=0)
    build.write_report({"grpo_csv": path}, tmp_path / "evaluation", tmp_path / "report.html")
    page = open_report(tmp_path / "report.html")
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    metrics = {metric["name"]: metric["value"] for metric in client.send("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < 2.0, "seconds of work until the page is ready"
    assert page.locator("#count").inner_text() == "2000 episodes"
    assert page.locator(".row").count() == 100
    page.get_by_role("button", name="Show more").click()
    assert page.locator(".row").count() == 200
    page.get_by_label("Question or id contains").fill("q1999")
    page.locator(".row").click()
    assert "Look" not in page.locator(".detail .turn").first.inner_text()
    assert page.locator(".detail .turn").count() == 3


def test_pictures_and_transcripts_keep_to_their_budgets(
    project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = prediction_files(project)
    monkeypatch.setattr(build, "THUMBNAIL_BUDGET", 3000)
    monkeypatch.setattr(build, "TRANSCRIPT_BUDGET", 0)
    out = tmp_path / "small.html"
    build.write_report(files, project.paths.results / "evaluation", out, project.paths.frames)
    text = out.read_text()
    assert "This page carries 0 of 12 transcripts and 0 pictures" in text
    monkeypatch.setattr(build, "TRANSCRIPT_BUDGET", 10_000_000)
    build.write_report(files, project.paths.results / "evaluation", out, project.paths.frames)
    carried = re.search(r"12 of 12 transcripts and (\d+) pictures; (\d+) further", out.read_text())
    assert carried
    assert 0 < int(carried[1]) < int(carried[2]) + int(carried[1])


def test_hostile_episodes_and_runs_make_a_report_of_bounded_size(tmp_path: Path, open_report) -> None:
    said = '<think>\ud83d</think><tool_call>{"name": "f", "arguments": {"q": "\\ud83d", "n": 1e999}}</tool_call>'
    babble = [{"role": "assistant", "content": f"again {number}"} for number in range(50_000)]
    shown = [{"type": "image", "seconds": time} for time in (1.0, None, "x", float("nan"), [1], 10**400)]
    rows = [
        searching(0, "a.mp4", [[9.0]], "A") | {"prediction": babble},
        searching(1, "a.mp4", [[9.0]], "A")
        | {"prediction": [{"role": "assistant", "content": said}, {"role": "tool", "content": shown * 5000}]},
        searching(2, "a.mp4", [[9.0]], "A")
        | {"question": "\ud83d" * 9, "answer": "x" * 300_000, "reanswer": "y" * 300_000, "options": ["z" * 300_000]},
        searching(3, "a.mp4", [[9.0]], "A") | {"searched_seconds": [number / 9 for number in range(99_999)]},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = [{"step": 1, "reward": 0.5}, {"reward": 1.0}, {"step": "x", "reward": 1}, {"step": 2, "reward": None}, {}]
    for name, text in (
        ("ok", "\n".join(map(json.dumps, curve)) + '\n{"step": 3, "rew'),
        ("\udcff", "[]\n\xff"),
        ("no", ""),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    options = Evaluate(bootstrap=0)
    write_evaluation(evaluate_files({"mine": path}, options, None), tmp_path, options, seed=0)
    build.write_report({"mine": path}, tmp_path / "evaluation", tmp_path / "report.html", runs=tmp_path / "runs")
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    page = open_report(tmp_path / "report.html")
    page.locator(".row").first.click()
    assert re.search(r"\d+ further turns are not shown", page.locator(".detail").inner_text())
    assert "Training: reward" in page.locator("#charts h3").all_inner_texts()


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"by": {}, "failures": {}}', "[" * 100_000])
def test_metrics_that_no_evaluation_wrote_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(RequestError, match="is not what an evaluation writes"):
        load_metrics(tmp_path / "mine.json")


def test_the_command_writes_the_report_of_any_prediction_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [searching(0, "a.mp4", [[9.0]], HOSTILE, thought=HOSTILE)])
    for command in (
        ["evaluate", "--predictions", str(path), "--out", str(tmp_path / "out"), "--params", "none.yaml"],
        ["report", "--predictions", str(path), "--results", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("</script>") == text.count("<script")
    assert "report.html" in capsys.readouterr().out


def test_a_report_needs_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [searching(0, "a.mp4", [[9.0]], "A")])
    with pytest.raises(RequestError, match="timesearch evaluate"):
        build.write_report({"mine": path}, tmp_path, tmp_path / "report.html")
