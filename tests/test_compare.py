"""What a number is made of: fingerprints of predictions, and the comparison that names what differs."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from evaluated import searching
from mlflow.utils.validation import _validate_param
from players import Puppet, answer_turn, build_library, script, search_turn
from policy_server import Handler, Server
from scratch_project import free_port
from scripted import OracleEncoder

from timesearch.base.errors import RequestError
from timesearch.base.files import write_jsonl
from timesearch.cli import main
from timesearch.data.rows import read_samples
from timesearch.evaluation.compare import Comparison, Side, compare_sides, describe, load_sides
from timesearch.evaluation.results import tracked_fingerprint, write_evaluation
from timesearch.evaluation.scoring import evaluate_files
from timesearch.evaluation.statistics import holm
from timesearch.inference.fingerprint import fingerprint_of, words_for
from timesearch.inference.journal import Journal
from timesearch.inference.playing import Job, play, search_maker
from timesearch.judge.client import JudgeClient, RuleJudge
from timesearch.judge.server import judge_server
from timesearch.search.engine_openai import OpenAIPolicy
from timesearch.search.policy import EngineError, Policy
from timesearch.search.videos import _opened
from timesearch.settings import Evaluate, Judge, Settings

SEARCHING = script(search_turn(num_frames=1), answer_turn())
QUICK = Evaluate(bootstrap=50, visual=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = build_library(tmp_path_factory.mktemp("compare"), videos=4, questions=2)
    settings.paths.train.mkdir(parents=True)
    (settings.paths.train / "config.json").write_text("{}")
    return settings


def played(settings: Settings, folder: Path, policy: Policy | None = None) -> Path:
    """Predictions of all test questions, written as the stage `infer` writes them."""
    samples = read_samples(settings.paths.test_samples)
    made_of = fingerprint_of(settings, settings.paths.train, "grpo_csv", None, settings.search)
    folder.mkdir()
    with Journal(folder, "grpo_csv", samples, made_of, settings.paths.subtitles) as journal:
        make_search = search_maker(settings, OracleEncoder())
        jobs = [Job(sample) for sample in samples]
        asyncio.run(play(jobs, policy or Puppet(SEARCHING), make_search, lambda _, row: journal.add(row), 2))
        journal.finish()
    return folder / "grpo_csv.jsonl"


def compared(a: Path, b: Path, make: Callable[[], Any] = RuleJudge, settings: Evaluate = QUICK) -> Comparison:
    ((_, one),) = load_sides(a, QUICK, RuleJudge).items()
    ((_, other),) = load_sides(b, settings, make).items()
    return compare_sides(one, other, QUICK)


def named(found: Comparison) -> list[str]:
    return [each.what for each in found.differences]


@contextmanager
def served(drops: int, **kind: Any) -> Iterator[OpenAIPolicy]:
    """A policy behind a real server, which breaks the connection of every `drops`-th request."""
    numbers = count(1)

    class Dropping(Handler):
        def do_POST(self) -> None:
            if next(numbers) % drops == 0:
                self.close_connection = True
            else:
                super().do_POST()

    server = Server(("127.0.0.1", 0), type("Kind", (Dropping,), kind))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield OpenAIPolicy([f"http://127.0.0.1:{server.server_port}/v1"], "tiny", retry_for=30)
    finally:
        server.shutdown()
        server.server_close()


def test_where_nothing_changed_nothing_is_named(library: Settings, tmp_path: Path) -> None:
    found = compared(played(library, tmp_path / "a"), played(library, tmp_path / "b"))
    assert (named(found), found.unknown, found.questions) == ([], [], [])
    assert found.measures["qa_accuracy"]["difference"] == 0.0
    # Another policy plays otherwise, and was shown other frames: that is its result, and no ingredient.
    silent = compared(tmp_path / "a" / "grpo_csv.jsonl", played(library, tmp_path / "c", Puppet(script(answer_turn()))))
    assert named(silent) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"max_tokens": 1, "min_tokens": 1},
            ["search.max_tokens", "pixels of a preview frame", "pixels of a searched"],
        ),
        ({"max_frames": 2}, ["search.max_frames", "frames of the preview"]),
        ({"prompts": "default"}, ["prompts.user"]),
    ],
)
def test_a_changed_setting_is_named_and_so_is_what_was_seen(
    library: Settings, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    other = library.model_copy(update={"search": library.search.model_copy(update=change)})
    differing = named(compared(played(library, tmp_path / "a"), played(other, tmp_path / "b")))
    for word in words:
        assert any(what.startswith(word) for what in differing), differing


def test_times_that_are_stripped_are_named(library: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = played(library, tmp_path / "a")
    _opened.cache_clear()  # opened videos hold the previews that they have shown
    monkeypatch.setattr("timesearch.search.videos.format_seconds", lambda seconds: "")
    try:
        (what,) = named(compared(whole, played(library, tmp_path / "b")))
    finally:
        _opened.cache_clear()
    assert what.startswith("times told beside frames, in 8 of 8 episodes")


def test_an_engine_that_drops_one_request_in_ten_is_named(library: Settings, tmp_path: Path) -> None:
    with served(10_000) as steady, served(10) as dropping:
        found = compared(played(library, tmp_path / "a", steady), played(library, tmp_path / "b", dropping))
    assert [str(each) for each in found.differences] == ["requests that were sent again: A 0 of 24, B 2 of 24"]
    assert [line[:36] for line in found.unknown] == [
        "the chat template of A's server is u",
        "the chat template of B's server is u",
    ]

    numbers = count(1)

    def failing(messages: Any) -> str:
        if next(numbers) % 10 == 0:
            raise EngineError("gone")
        return SEARCHING(messages)

    def wordless(messages: Any) -> str:
        return "" if next(numbers) % 10 == 0 else SEARCHING(messages)

    local = played(library, tmp_path / "c")
    lost = named(compared(local, played(library, tmp_path / "d", Puppet(failing))))
    assert lost == ["requests without an answer", "episodes that ended in an error"]
    assert named(compared(local, played(library, tmp_path / "e", Puppet(wordless)))) == ["replies without a word"]


def test_another_judge_is_named_with_its_agreement(library: Settings, tmp_path: Path) -> None:
    class Kind(RuleJudge):
        identity: ClassVar[dict[str, Any]] = {"kind": "kind"}

        def score(self, question: str, reference: str, candidate: str) -> float:
            return 1.0

    path = played(library, tmp_path / "a")
    differing = {each.what: (each.a, each.b) for each in compared(path, path, Kind).differences}
    assert differing["judge, kind"] == ("rule", "kind")
    assert differing["judge, agreement"][0] > differing["judge, agreement"][1]


def test_requests_to_a_judge_that_were_sent_again_are_named(library: Settings, tmp_path: Path) -> None:
    path = played(library, tmp_path / "a")

    def side(name: str, *flags: str) -> Side:
        judge = Judge(
            kind="server",
            url=f"http://127.0.0.1:{free_port()}/v1",
            model="stub",
            command=[sys.executable, str(Path(__file__).with_name("judge_stub.py")), "{port}", "{model}", *flags],
            cache=tmp_path / f"{name}.sqlite",
            log=tmp_path / f"{name}.log",
        )
        with judge_server(judge):
            first = load_sides(path, QUICK, lambda: JudgeClient(judge))["grpo_csv"]
        # A second time verdicts come from the disk, and with them what they took.
        again = load_sides(path, QUICK, lambda: JudgeClient(judge))["grpo_csv"]
        assert first.made == again.made
        return first

    steady, busy = side("steady"), side("busy", "--refuse-first", "2")
    named = [str(each) for each in compare_sides(steady, busy, QUICK).differences]
    assert named == ["requests to the judge that were sent again: A 0 of 8, B 2 of 8"]


def test_another_parser_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [searching(number, "a.mp4", [[9.0]], "A or B") for number in range(4)])
    published = QUICK.model_copy(update={"qa": "published"})
    found = compared(tmp_path / "a.jsonl", tmp_path / "a.jsonl", settings=published)
    assert [str(each) for each in found.differences] == ["answers read: A strict, B published"]
    assert (found.only_a_right, found.only_b_right) == ([], ["q0", "q1", "q2", "q3"])


def test_a_copied_file_keeps_its_fingerprint_and_metrics_keep_all_of_it(library: Settings, tmp_path: Path) -> None:
    path = played(library, tmp_path / "a")
    write_evaluation(evaluate_files({"grpo_csv": path}, QUICK, None), tmp_path / "results", QUICK, 0)
    (tmp_path / "elsewhere").mkdir()
    alone = Path(shutil.copy(path, tmp_path / "elsewhere" / "mine.jsonl"))
    found = compared(tmp_path / "results", alone)
    assert named(found) == []
    assert len(found.unknown) == 1
    assert "copy their .json file" in found.unknown[0]
    assert found.a.made["digest"] == found.b.made["digest"] != ""
    block = json.loads((tmp_path / "results" / "metrics.json").read_text())["grpo_csv"]
    assert block["fingerprint"] == found.a.made["digest"]
    for each in ("results/metrics.json", "results/evaluation/grpo_csv.json"):
        assert named(compared(tmp_path / each, path)) == []


def test_a_file_without_fingerprint_is_read_and_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [searching(number, "a.mp4", [[9.0]], "A") for number in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [*rows[:3], searching(3, "a.mp4", [[9.0]], "B")])
    write_jsonl(tmp_path / "c.jsonl", rows[1:])
    other = [{**row, "question": "Else?"} for row in rows]
    write_jsonl(tmp_path / "d.jsonl", other)

    def said(*arguments: str) -> tuple[str, int]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *(str(tmp_path / each) for each in arguments[:2]), *arguments[2:], "--params", "none"])
        captured = capsys.readouterr()
        return captured.out + captured.err, ended.value.code or 0

    text, code = said("a.jsonl", "b.jsonl")
    assert code == 0
    assert "A has no fingerprint: how it was played is not known" in text
    assert "only A right (1): q3" in text
    text, code = said("a.jsonl", "c.jsonl")
    assert (code, "1 of A's 4 questions are not in B" in text, "QA accuracy" in text) == (2, True, False)
    assert "QA accuracy" in said("a.jsonl", "c.jsonl", "--common")[0]
    assert "another question, options or right answer (q0, q1, q2, q3)" in said("a.jsonl", "d.jsonl")[0]
    assert said("a.jsonl", "d.jsonl", "--common")[1] == 2


def test_each_ingredient_changes_the_digest_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = {"search": {"prompts": "default"}}
    base = fingerprint_of(Settings.model_validate(told), tmp_path, "grpo_csv", None, Settings().search)
    changes = {
        "temperature": {"infer": {"temperature": 0.7}},
        "seed": {"seed": 3},
        "preview": {"infer": {"preview": "video"}},
        "frames.qscale": {"frames": {"qscale": 5}},
        "engine": {"infer": {"engine": "transformers"}},
        "search.max_tokens": {"search": {"max_tokens": 64}},
        "subtitles": {"search": {"tools": ["seek_video_frames", "search_subtitles"]}},
        "prompts.user": {"search": {"prompts": "pocket"}},
    }
    for words, change in changes.items():
        settings = Settings.model_validate(told | change)
        other = fingerprint_of(settings, tmp_path, "grpo_csv", None, settings.search)
        ours, theirs = base.ingredients(), other.ingredients()
        assert words in [name for name in ours if ours[name] != theirs[name]]
        assert words_for(words).startswith(words)
        assert base.digest != other.digest
    (tmp_path / "config.json").write_text("{ }")
    reread = fingerprint_of(Settings.model_validate(told), tmp_path, "grpo_csv", None, Settings().search)
    assert reread.checkpoint != base.checkpoint


@pytest.mark.parametrize("section", ["search", "frames", "features"])
def test_no_setting_that_shapes_predictions_is_left_out(tmp_path: Path, section: str) -> None:
    settings = Settings()
    made = fingerprint_of(settings, tmp_path, "grpo_csv", None, settings.search)
    held = {*made.search, *made.frames, *made.encoder, "prompts", "tools"}
    assert set(getattr(settings, section).shaping_names()) <= held


def test_metrics_of_any_form_are_compared_or_refused(tmp_path: Path) -> None:
    rows = [searching(number, "a.mp4", [[9.0]], "A") for number in range(3)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    (method,) = evaluate_files({"mine": tmp_path / "mine.jsonl"}, QUICK, None)
    write_evaluation([method], tmp_path / "a", QUICK, 0)
    target = tmp_path / "a" / "evaluation" / "mine.json"
    whole = json.loads(target.read_text())
    for name in (*whole["fingerprint"], None):
        for value in (None, 1, "x", [], ["x"], {}, {"x": {"y": [1]}}, True):
            odd = {**whole["fingerprint"], name: value} if name else value
            target.write_text(json.dumps(whole | {"fingerprint": odd}))
            found = compared(target, tmp_path / "mine.jsonl")
            assert describe(found, common=True)
    target.write_text("{}")
    with pytest.raises(RequestError, match="holds no prediction that can be read"):
        load_sides(tmp_path / "a" / "evaluation", QUICK, RuleJudge)


def measured(folder: Path, answers: Sequence[str], row: Mapping[str, Any] | None = None, **how: Any) -> Path:
    """Predictions of one search each that answer so, with the fingerprint of the default settings changed by `how`."""
    fingerprint = fingerprint_of(Settings(), folder, "grpo_csv", None, Settings().search).model_copy(update=how)
    folder.mkdir()
    rows = [
        searching(number, "a.mp4", [[9.0]], answer) | {"fingerprint": fingerprint.digest[:12], **(row or {})}
        for number, answer in enumerate(answers)
    ]
    write_jsonl(folder / "m.jsonl", rows)
    mark = {"fingerprint": fingerprint.digest, "made_of": fingerprint.model_dump(mode="json")}
    (folder / "m.json").write_text(json.dumps(mark))
    return folder / "m.jsonl"


SEEN = {
    **{"engine": "vllm 0.32", "template": "aa", "encoder": "cc", "requests": 10},
    **{"preview_sizes": [[448, 252]], "searched_sizes": [[448, 252]]},
}
"""What an engine was given in an episode, and what became of the requests."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"temperature": 0.7}, ["temperature (of sampling; 0 is greedy): A 0, B 0.7"]),
        ({"seed": 1}, ["seed (of sampling): A 0, B 1"]),
        ({"engine": "transformers"}, ["engine: A openai, B transformers"]),
        ({"checkpoint": "ff"}, ["checkpoint (weights and configuration of the checkpoint): A none, B ff"]),
        ({"preview": "video"}, ["preview (form in which the preview is shown): A images, B video"]),
        ({"subtitles": True}, ["subtitles (whether they can be searched): A no, B yes"]),
        ({"prompts": {"user": "ff"}}, ["prompts.system", "prompts.user", "prompts.next", "prompts.correction"]),
        ({"tools": {"seek_video_frames": "ff"}}, ["tools.seek_video_frames: A"]),
        ({"seen": {"engine": "vllm 0.31"}}, ["engine as it ran: A vllm 0.32, B vllm 0.31"]),
        ({"seen": {"template": "bb"}}, ["chat template, by what the engine made of a short conversation: A aa, B bb"]),
        ({"seen": {"encoder": "dd"}}, ["encoder as it ran: A cc, B dd"]),
        ({"seen": {"retried": 1}}, ["requests that were sent again: A 0 of 60, B 6 of 60"]),
        ({"seen": {"failed": 1}}, ["requests without an answer: A 0 of 60, B 6 of 60"]),
        ({"seen": {"empty": 1}}, ["replies without a word: A 0 of 60, B 6 of 60"]),
        (
            {"seen": {"preview_sizes": [[224, 140]]}},
            ["pixels of a preview frame, in 6 of 6 episodes; the first: A 448"],
        ),
        (
            {"seen": {"searched_sizes": [[224, 140]]}},
            ["pixels of a searched frame, in 6 of 6 episodes; the first: A 448"],
        ),
        ({"row": {"preview_seconds": [1.0]}}, ["frames of the preview, in 6 of 6 episodes; the first: A 4, B 1"]),
        (
            {"row": {"error": {"type": "missing_cache", "message": "gone"}}},
            ["episodes that ended in an error: A none, B missing_cache 6", "missing videos: A none, B a.mp4"],
        ),
    ],
    ids=str,
)
def test_a_planted_change_is_named_in_words_and_nothing_else_is(
    tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    """Those that need a search, a server or a judge have tests of their own: stripped times, drops, other readings."""
    how = {name: value for name, value in change.items() if name not in ("seen", "row")}
    row = {"seen": SEEN | change.get("seen", {}), **change.get("row", {})}
    first = measured(tmp_path / "a", RIGHT[:6], {"seen": SEEN})
    found = compared(first, measured(tmp_path / "b", RIGHT[:6], row, **how))
    named = [str(each) for each in found.differences]
    assert len(named) >= len(said)
    assert all(any(each.startswith(words) for each in named) for words in said)
    assert len(named) == len(said) or said[0].startswith("prompts.")
    text = "\n".join(describe(found, common=False))
    assert all(each in text for each in named)
    assert ("Nothing differs in how they were made." in text) == (not said)


RIGHT, WORSE, WORST = ["A"] * 60, ["A"] * 54 + ["B"] * 6, ["A"] * 40 + ["B"] * 20
"""Of McNemar's test against `RIGHT`: p is 0.031 and below 0.001."""


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {}, "Neither is better: they differ in nothing but the draw of the sampling (temperature 0.7)"),
        ({}, {"seed": 7}, "Neither is better: they differ in nothing but the draw of the sampling (temperature 0.7)"),
        ({"temperature": 0.0}, {"temperature": 0.0}, "Neither is better: they differ in nothing but how the engine"),
        ({}, {"seed": 7, "preview": "video"}, "A is better in QA accuracy"),
        ({}, {"temperature": 1.0}, "A is better in QA accuracy"),
    ],
)
def test_of_two_draws_of_the_same_neither_is_better(
    tmp_path: Path, a: dict[str, Any], b: dict[str, Any], said: str
) -> None:
    first = measured(tmp_path / "a", RIGHT, **{"temperature": 0.7, **a})
    found = compared(first, measured(tmp_path / "b", WORST, **{"temperature": 0.7, **b}))
    assert found.measures["qa_accuracy"]["p_corrected"] < 0.001
    lines = describe(found, common=False)
    assert lines[-1].startswith(said)
    assert ("one in twenty" in lines[-1]) == said.startswith("Neither") == (found.as_json()["better"]["a"] == [])
    assert len(named(found)) == sum(a.get(name, b[name]) != b[name] or name not in a for name in b)


def test_of_many_tests_a_low_p_is_no_sign(tmp_path: Path) -> None:
    first = measured(tmp_path / "a", RIGHT, temperature=0.7)
    found = compared(first, measured(tmp_path / "b", WORSE, temperature=1.0))
    accuracy = found.measures["qa_accuracy"]
    tests = sum("p_value" in measure for measure in found.measures.values())
    assert accuracy["p_value"] < 0.05 < accuracy["p_corrected"] <= tests * accuracy["p_value"]
    assert describe(found, common=False)[-1] == (
        f"Neither is better: no difference is larger than chance gives (p < 0.05, corrected for {tests} tests by Holm)."
    )


def test_holms_correction() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.9, 1.0, 0.6]) == [1.0, 1.0, 1.0]
    draws = np.random.default_rng(0).random((4000, 6))
    assert 0.04 < np.mean([min(holm(row)) < 0.05 for row in draws.tolist()]) < 0.06


def test_mlflow_takes_the_names_of_all_ingredients(library: Settings, tmp_path: Path) -> None:
    path = played(library, tmp_path / "a")
    (method,) = evaluate_files({"odd: name": path}, QUICK, None)
    named = tracked_fingerprint(method)
    assert len(named) > 30
    for name, value in named.items():
        _validate_param(name, value)
