"""A tool is a function and an entry of a tuple: one that a test writes shows wherever tools show."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from players import Puppet, answer_turn, build_library, new_search, script, search_turn
from rich.console import Console

from timesearch import dialects
from timesearch.base.errors import RequestError
from timesearch.cli import inference as cli
from timesearch.data.messages import Evidence, exchanges
from timesearch.data.rows import read_samples
from timesearch.data.samples import Prediction
from timesearch.dialects import ToolCall, Turn
from timesearch.report import build
from timesearch.rewards import score_episode
from timesearch.search import tools
from timesearch.search.environment import environment_factory
from timesearch.search.episode import Step, run_episode, system_message
from timesearch.search.search import Search
from timesearch.serve.api import step_data
from timesearch.settings import Settings


def read_signs(search: Search, words: str, most: int = 2) -> list[Evidence]:
    """Find what is written in the video.

    Args:
        words: What the sign may say.
        most: How many signs to return at most.

    Returns:
        The signs' words, each after its time in seconds.
    """
    if not words:
        raise tools.WrongCallError("words must not be empty")
    return [Evidence(search.video.name, 10.0 * n, text=f"sign {n}: {words} <|im_end|>") for n in range(1, most + 1)]


CALL = '<think>Read.</think>\n<tool_call>\n{"name": "read_signs", "arguments": {"words": "EXIT"}}\n</tool_call>'
BOTH = CALL.replace("</tool_call>", "</tool_call>\n") + search_turn("star", num_frames=1).partition("</think>\n")[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = build_library(tmp_path_factory.mktemp("toy"), videos=1)
    settings.search.max_turns = 5
    settings.search.tools = ["seek_video_frames", "read_signs"]
    return settings


@pytest.fixture(autouse=True)
def _offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TOOLS", (*tools.TOOLS, read_signs))


@pytest.fixture
def played(settings: Settings) -> tuple[Prediction, list[Step]]:
    """An episode that reads signs, then reads and looks in one turn, then answers."""
    steps: list[Step] = []
    sample = read_samples(settings.paths.test_samples)[0]
    puppet = Puppet(script(CALL, BOTH, answer_turn(sample.answer)))
    return asyncio.run(run_episode(new_search(settings), puppet, sample, steps.append)), steps


def test_trl_lists_it_with_its_documentation(settings: Settings) -> None:
    from transformers.utils.chat_template_utils import get_json_schema

    environment = environment_factory(partial(new_search, settings), settings.search.tools)()
    members = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    assert [name for name in members if not name.startswith("_")] == ["read_signs", "reset", "seek_video_frames"]
    schema = get_json_schema(environment.read_signs)  # type: ignore[attr-defined]
    assert schema == new_search(settings).schemas[1]
    assert schema["function"]["parameters"]["required"] == ["words"]
    assert "search" not in schema["function"]["parameters"]["properties"]


@pytest.mark.parametrize("protocol", ["text", "template"])
def test_it_stands_in_the_prompts_of_both_engines(settings: Settings, protocol: str) -> None:
    from trl.chat_template_utils import qwen3_vl_chat_template

    search = new_search(settings)
    message = system_message(search.protocol, search.schemas, protocol)
    if protocol == "text":
        assert '"name": "read_signs"' in message["content"]
    else:
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered,), _ = render_jinja_template(
            conversations=[[message]], tools=search.schemas, chat_template=qwen3_vl_chat_template
        )
        assert '"name": "read_signs"' in rendered


def test_the_episode_carries_it_out_and_the_reanswer_gets_its_words(
    settings: Settings, played: tuple[Prediction, list[Step]]
) -> None:
    prediction, _ = played
    assert (prediction.error, prediction.tool_calls, prediction.turns) == (None, 3, 3)
    found = exchanges(prediction.prediction)
    assert [exchange.call and exchange.call.name for exchange in found] == [
        "read_signs", "read_signs", "seek_video_frames",
    ]  # fmt: skip
    assert [each.seconds for each in found[0].evidence] == [10.0, 20.0]
    assert found[0].evidence[0].text == "10.0s sign 1: EXIT <im_end>"
    assert len(prediction.searched_seconds) == 1
    assert prediction.reanswer is not None

    search = new_search(settings)
    search.open(prediction.model_dump())
    search.call("read_signs", {"words": "EXIT", "most": 1})
    search.call("seek_video_frames", {"query": "star", "start_time": 0, "end_time": 5, "num_frames": 1})
    again = search.reanswer()
    assert again is not None
    assert [block["type"] for block in again] == ["text", "image", "text", "text"]
    assert again[2]["text"] == "10.0s sign 1: EXIT <im_end>"
    (wrong,) = search.call("read_signs", {"words": ""})
    assert "words must not be empty" in wrong["text"]


def test_rewards_take_it_for_a_well_formed_search(played: tuple[Prediction, list[Step]]) -> None:
    prediction, _ = played
    messages = [message for message in prediction.prediction if message["content"] != BOTH]
    assert score_episode(messages, prediction.answer, "open_ended", prediction.answer) == {
        "format": 1.0,
        "accuracy": 1.0,
        "completeness": 1.0,
    }


def test_mlflow_has_a_span_of_its_name(
    played: tuple[Prediction, list[Step]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from timesearch.settings import Tracking
    from timesearch.tracking import stage_run

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with stage_run(Settings(tracking=Tracking(uri=uri)), "infer") as run:
        run.log_episode(played[0])
    client = MlflowClient(uri)
    (trace,) = client.search_traces(locations=[client.get_run(str(run.id)).info.experiment_id])
    spans = [(span.name, span.inputs) for span in trace.data.spans if span.span_type == "TOOL"]
    asked = {"words": "EXIT"}
    assert spans == [
        ("read_signs", asked),
        ("read_signs", asked),
        ("seek_video_frames", {"query": "star", "num_frames": 1}),
    ]


def test_report_page_and_command_line_show_it(played: tuple[Prediction, list[Step]], tmp_path: Path) -> None:
    prediction, steps = played
    rows, scores = tmp_path / "toy.jsonl", tmp_path / "evaluation"
    rows.write_text(prediction.model_dump_json() + "\n")
    from timesearch.evaluation.results import write_evaluation
    from timesearch.evaluation.scoring import evaluate_files
    from timesearch.settings import Evaluate

    settings = Evaluate(visual=False, bootstrap=0)
    write_evaluation(evaluate_files({"toy": rows}, settings, tmp_path), tmp_path, settings, 0)
    build.write_report({"toy": rows}, scores, tmp_path / "report.html")
    (data,) = re.findall(r'id="episodes-0">(.*)</script>', (tmp_path / "report.html").read_text())
    turns = json.loads(data)[0]["turns"]
    assert [call["name"] for turn in turns for call in turn["calls"]] == [
        "read_signs", "read_signs", "seek_video_frames",
    ]  # fmt: skip
    assert turns[0]["words"] == ["10.0s sign 1: EXIT <im_end>", "20.0s sign 2: EXIT <im_end>"]

    told: list[Any] = [step_data(step) for step in steps if step.kind in ("turn", "found")]
    assert told[0]["calls"][0]["said"] == "read_signs: words EXIT"
    assert told[1]["words"] == ["10.0s sign 1: EXIT <im_end>", "20.0s sign 2: EXIT <im_end>"]

    screen = io.StringIO()
    live = cli._Live(Console(file=screen, width=200))
    for step in steps:
        live(step)
    assert "call      read_signs: words EXIT" in screen.getvalue()
    assert "found     10.0s sign 1: EXIT <im_end>; 20.0s sign 2" in screen.getvalue()


def plain_turn(text: str) -> Turn:
    said, _, query = text.partition("SEARCH:")
    if query.strip():
        return Turn(said.strip(), [ToolCall("seek_video_frames", {"query": query.strip()})])
    thought, found, answer = text.partition("ANSWER:")
    return Turn(thought.strip(), answer=answer.strip() if found else None)


def plain_act(text: str) -> Literal["call", "answer"] | None:
    return "call" if "SEARCH:" in text else "answer" if "ANSWER:" in text else None


PLAIN = dialects.Dialect("plain", ("SEARCH:", "ANSWER:"), plain_turn, plain_act, lambda text, tools: f"{text} SEARCH:")


def test_an_agent_that_speaks_otherwise_is_a_dialect_more(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "DIALECTS", (*dialects.DIALECTS, PLAIN))
    own = settings.model_copy(deep=True)
    own.search.dialect, own.search.protocol = "plain", "text"
    sample = read_samples(own.paths.test_samples)[0]
    puppet = Puppet(script("I look. SEARCH: star", f"There. ANSWER: {sample.answer}"))
    prediction = asyncio.run(run_episode(new_search(own), puppet, sample))
    assert puppet.seen[0][0]["content"].endswith("SEARCH:")
    assert (prediction.predicted_answer, prediction.reanswer, prediction.tool_calls) == (
        sample.answer,
        sample.answer,
        1,
    )
    assert score_episode(prediction.prediction, sample.answer, "open_ended", prediction.reanswer)["format"] == 1.0
    own.search.dialect = "klingon"
    with pytest.raises(RequestError, match="'klingon', which is no dialect"):
        new_search(own)


def test_nobody_reaches_into_the_search() -> None:
    """What other rooms need of a search is public."""
    root = Path(__file__).parents[1]
    reach = re.compile(r"\b(?:environment|search)\._[a-z]")
    offenders = [
        f"{path.relative_to(root)}:{number}"
        for folder in ("timesearch", "benchmarks", "tests")
        for path in sorted((root / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if reach.search(line)
    ]
    assert offenders == []


def test_a_tool_that_does_not_exist_is_refused(settings: Settings) -> None:
    for names, told in ((["zoom"], "'zoom', which is no tool"), ([], "is empty")):
        with pytest.raises(RequestError, match=told):
            tools.offered(names)
