"""Stage `coldstart`: supervised fine-tuning on search episodes, so that RL starts from a policy that can search.

Traces come from the pocket generator, from a file of episodes, from a teacher behind an OpenAI-compatible server, or
from the base policy itself. All but the generated ones are kept if they are well-formed and right; the others are
listed with their reason. Beside whole episodes the policy sees re-answer examples: the searched frames alone and the
answer, or frames far from the event and "I don't know", so that it knows the completeness task before it is rewarded
for it (paper, Section 3.2).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.exclusive import exclusive
from timesearch.base.extras import require_modules
from timesearch.base.files import json_digest, write_jsonl
from timesearch.base.progress import console, progress_bar
from timesearch.data.messages import (
    Block,
    Message,
    blocks_of,
    describe_call,
    evidence_in,
    exchanges,
    final_answer,
    parse_turn,
    searched_seconds,
    text_of,
)
from timesearch.data.rows import read_rows
from timesearch.data.samples import Prediction, Sample
from timesearch.inference.playing import Job, play, search_maker
from timesearch.inference.policies import Served, open_policy
from timesearch.rewards import accuracy, format_reward
from timesearch.search.checkpoint import load_model, load_processor
from timesearch.search.episode import without_pixels
from timesearch.search.policy import Policy
from timesearch.search.protocol import SearchProtocol
from timesearch.search.search import Search
from timesearch.settings import ColdStart, Settings
from timesearch.training import on_ray
from timesearch.training.data import load_training_samples, require_trainable
from timesearch.training.folder import prepare_run_folder, weights_of
from timesearch.training.supervised import UNKNOWN, Example, Plan, fine_tune

if TYPE_CHECKING:
    from timesearch.base.batch import Failure
    from timesearch.retrieval.encoder import Encoder

FAR = 10.0
"""Seconds between an event and the frames that are taken to say nothing about it."""


def run(settings: Settings) -> Path:
    """Fine-tune `models/policy` into `runs/coldstart`.

    The folder gets a whole checkpoint (safetensors and processor), `metrics.jsonl` and `failures.jsonl`; while the run
    lasts, `checkpoints/` is there too, and the same call goes on from it.

    Raises:
        RequestError: no policy or one that does not fit, no usable sample, no teacher where one is asked for, or no
            usable trace.
        TemporaryError: another process works in the folder.
    """
    require_modules("the cold start", "torch", "transformers", "accelerate", "mlflow")
    paths, folder = settings.paths, settings.paths.coldstart
    with exclusive(folder):
        if settings.cluster.kind != "ray":
            return coldstart_here(settings)
        on_ray.fit(
            settings,
            "coldstart",
            folder,
            coldstart_here,
            processes=1,
            gpus=1,
            shared=[paths.train_samples, paths.frames, paths.features, paths.models],
            environment={},
        )
        return folder


def coldstart_here(settings: Settings) -> Path:
    """What the one process of a cold start does, whose folder is held."""
    import torch

    from timesearch.retrieval.features import default_encoder
    from timesearch.tracking import stage_run

    folder, options = settings.paths.coldstart, settings.coldstart
    policy = settings.paths.models / "policy"
    if options.traces == "teacher":
        _teacher(options)
    if not (policy / "config.json").is_file():
        raise RequestError(f"{policy} holds no policy: run the stage 'models' first")
    require_trainable(policy, settings.search)
    samples, failures = load_training_samples(settings)
    encoder = default_encoder(settings)
    prepare_run_folder(folder, settings, "coldstart", policy)
    examples, rejected = _examples(settings, samples, encoder)
    write_jsonl(folder / "failures.jsonl", [vars(failure) for failure in [*failures, *rejected]])
    plan = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batch=options.micro_batch,
        learning_rate=options.learning_rate,
        seed=settings.seed,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        lora_rank=options.lora_rank,
        save_steps=options.save_steps,
    )
    processor = load_processor(policy)
    rows: list[dict[str, float]] = []
    with stage_run(settings, "coldstart") as record, progress_bar("cold start", options.steps) as bar:

        def report(step: int, values: dict[str, float]) -> None:
            rows.append({"step": step, **values})
            record.log_metrics(values, step=step)
            bar.advance(note=f"loss {values['loss']:.3f}")

        # What is trained is float32: most steps of a small learning rate are less than bfloat16 can tell.
        model = load_model(policy, None if options.lora_rank else torch.float32)
        model = fine_tune(
            model, processor, examples, plan, folder / "checkpoints", report, vision=not options.freeze_vision
        )
        if options.bf16:
            model = model.to(torch.bfloat16)
        model.save_pretrained(folder, safe_serialization=True)
        processor.save_pretrained(folder)
        write_jsonl(folder / "metrics.jsonl", rows)
        record.log_artifact(folder / "metrics.jsonl")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def _examples(settings: Settings, samples: Sequence[Sample], encoder: Encoder) -> tuple[Any, list[Failure]]:
    """The dataset that the settings ask for, and the traces that were turned away."""
    paths, options = settings.paths, settings.coldstart
    count = options.steps * options.batch_size
    make_search = search_maker(settings, encoder)
    if options.traces == "pocket":
        from timesearch.pocket.hop_lessons import HopEpisodes, is_of_hops
        from timesearch.pocket.hop_traces import HOP_COLD_START
        from timesearch.pocket.lessons import Corpus, Episodes
        from timesearch.pocket.senses_lessons import SensesEpisodes, is_of_senses
        from timesearch.pocket.senses_traces import SENSES_COLD_START
        from timesearch.pocket.traces import COLD_STARTS

        corpus = Corpus(samples, settings.search, encoder, paths.frames, paths.features, paths.subtitles, paths.videos)
        if samples and is_of_hops(samples[0]):
            return HopEpisodes(corpus, count, HOP_COLD_START, options.reanswer_share, settings.seed), []
        if samples and is_of_senses(samples[0]):
            return SensesEpisodes(
                corpus, count, settings.seed, SENSES_COLD_START, options.reanswer_share, withheld=0.1
            ), []
        manners = COLD_STARTS[corpus.asked[0].scene.world]
        return Episodes(corpus, count, manners, options.reanswer_share, settings.seed), []
    file = Path(options.traces)
    if options.traces in ("teacher", "policy"):
        file = paths.coldstart.with_name(f"{paths.coldstart.name}.{options.traces}-{_origin(settings)}.jsonl")
        play_traces(settings, samples, encoder, file)
    traces, rejected = read_traces(file, samples)
    if not traces:
        first = f" The first: {rejected[0].message}" if rejected else ""
        raise RequestError(f"{file} has no well-formed and right trace ({len(rejected)} left out).{first}")
    search = make_search()
    traces = list(_carried_out(traces, search, rejected))
    if not traces:
        raise RequestError(f"no trace of {file} can be carried out. The first: {rejected[-1].message}")
    system = SearchProtocol.load(settings.search.prompts).texts["system"]
    return Recorded(traces, search, system, count, options.reanswer_share, settings.seed), rejected


@dataclass(frozen=True)
class Trace:
    """A recorded episode that answers a sample rightly; its messages carry no pixels."""

    sample: Sample
    messages: list[Message]


def read_traces(path: Path, samples: Sequence[Sample]) -> tuple[list[Trace], list[Failure]]:
    """Read recorded episodes about `samples`.

    A row names its sample by `id`, or where it has none by `video` and `question`, and holds the episode's messages
    under `prediction` or `messages`, as inference writes them, or as the reference publishes them: without any tool
    message, for each call is carried out when the row is loaded (`carry_out`). An open-ended answer is compared by its
    words, unless the row records the reward `accuracy` that a judge gave it.

    Returns:
        The traces to imitate, and a failure for each other row: `unknown_sample`, `not_answered` (an error or no
        messages), `ill_formed`, `unanswered_call` (some calls have a tool message, and others none) or `wrong_answer`.

    Raises:
        RequestError: the file is missing or holds a line that is not JSON.
    """
    from timesearch.base.batch import Failure

    find = _finder(samples)
    traces: list[Trace] = []
    failures: list[Failure] = []
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        sample, messages = find(row), row.get("prediction") or row.get("messages")
        if sample is None:
            named = "its video and question" if row.get("id") is None else f"the id {row['id']!r}"
            failures.append(Failure(where, "unknown_sample", f"{where}: no train sample has {named}"))
        elif not isinstance(messages, list) or row.get("error"):
            failures.append(Failure(sample.id, "not_answered", f"{where}: {row.get('error') or 'no messages'}"))
        elif format_reward(messages) < 1:
            failures.append(Failure(sample.id, "ill_formed", f"{where}: a turn breaks the format, or none answers"))
        elif _unanswered(messages) not in (0, _calls(messages)):
            text = f"{where}: {_unanswered(messages)} of its {_calls(messages)} calls have no tool message"
            failures.append(Failure(sample.id, "unanswered_call", text))
        else:
            said = final_answer(messages)
            judged = (row.get("rewards") or {}).get("accuracy")
            score = float(judged) if judged is not None else accuracy(said, sample.answer, sample.type)
            if score > 0.5:
                traces.append(Trace(sample, messages))
            else:
                text = f"{where}: it answers {str(said)[:80]!r}, not {sample.answer[:80]!r}"
                failures.append(Failure(sample.id, "wrong_answer", text))
    return traces, failures


def _finder(samples: Sequence[Sample]) -> Callable[[dict[str, Any]], Sample | None]:
    """Finds the sample that a row of traces is about; a published row may lead to its video from another folder."""
    by_id = {sample.id: sample for sample in samples}
    by_question: dict[str, list[Sample]] = {}
    for sample in samples:
        by_question.setdefault(sample.question, []).append(sample)

    def find(row: dict[str, Any]) -> Sample | None:
        if row.get("id") is not None:
            return by_id.get(str(row["id"]))
        asked, video = row.get("question"), f"/{row.get('video')}"
        found = by_question.get(asked, []) if isinstance(asked, str) else []
        return next((sample for sample in found if video.endswith(f"/{sample.video}")), None)

    return find


def _calls(messages: Sequence[Message]) -> int:
    return sum(len(parse_turn(text_of(message)).calls) for message in messages if message["role"] == "assistant")


def _unanswered(messages: Sequence[Message]) -> int:
    """Calls that no tool message answers."""
    return _calls(messages) - sum(exchange.call is not None for exchange in exchanges(messages))


def carry_out(trace: Trace, search: Search) -> Trace:
    """A trace whose calls have no tool messages, with those that the search gives; any other trace as it is.

    Raises:
        ItemError: `failed_call`, a call finds nothing: it is wrong, or comes when the budget is spent.
    """
    if not _unanswered(trace.messages):
        return trace
    search.open(trace.sample.model_dump())
    played: list[Message] = []
    for message in trace.messages:
        if message["role"] == "tool":
            continue
        played.append(message)
        for call in parse_turn(text_of(message)).calls if message["role"] == "assistant" else ():
            before = len(search.evidence)
            blocks = search.correct(call.error) if call.error else search.call(call.name, call.arguments)
            if len(search.evidence) == before:
                said = text_of({"role": "tool", "content": blocks})[:200]
                raise ItemError(
                    f"{trace.sample.id}: the call {describe_call(call)[:80]!r} finds nothing: {said}", "failed_call"
                )
            played.append(without_pixels({"role": "tool", "name": call.name, "content": blocks}))
    return Trace(trace.sample, played)


def _carried_out(traces: Sequence[Trace], search: Search, rejected: list[Failure]) -> Iterator[Trace]:
    from timesearch.base.batch import Failure

    for trace in traces:
        try:
            yield carry_out(trace, search)
        except ItemError as error:
            rejected.append(Failure(trace.sample.id, error.reason, str(error)))


@dataclass
class Recorded:
    """Recorded episodes with their pixels put back, mixed with re-answer examples; a map from number to example.

    The system and user message are the search's own, so that recordings of other prompts serve too; frames come
    from the frame cache, by the times that the recording names.
    """

    traces: Sequence[Trace]
    search: Search
    system: str
    count: int
    reanswer_share: float
    seed: int
    tools: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.tools = self.search.schemas

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        import numpy as np

        rng = np.random.default_rng([self.seed, number])
        trace = carry_out(self.traces[int(rng.integers(len(self.traces)))], self.search)
        if rng.random() < self.reanswer_share:
            pair = self._reanswer(trace, bool(rng.random() < 0.5), rng)
            if pair is not None:
                return Example(f"{trace.sample.id}, re-answer {number}", pair)
        self.search.open(trace.sample.model_dump())
        opening: list[Message] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.search.preview()},
        ]
        rest = [message for message in trace.messages if message["role"] in ("assistant", "tool")]
        played = [self._with_pixels(message) for message in rest]
        return Example(f"{trace.sample.id}, episode {number}", [*opening, *played], self.tools)

    def _with_pixels(self, message: Message) -> Message:
        if message["role"] == "assistant" or isinstance(message.get("content"), str):
            return message
        frames = self.search.video.frames
        blocks: list[Block] = []
        at = {id(block): each for each, of_it in evidence_in(message) for block in of_it}
        for block in blocks_of(message):
            if block["type"] == "text":
                blocks.append(block)
            elif (seen := at.get(id(block))) is not None and seen.seconds is not None:
                found = [seen] if seen.box is not None else self.search.frames([frames.nearest(seen.seconds)])
                blocks.append(self.search.show(found)[1])
            else:
                raise ItemError("a recorded image has no time before it", reason="image_mismatch")
        return {**message, "content": blocks}

    def _reanswer(self, trace: Trace, known: bool, rng: Any) -> list[Message] | None:
        """The re-answer to what the trace searched, or to frames far from the event; None where there are none."""
        sample, search = trace.sample, self.search
        search.open(sample.model_dump())
        frames = search.video.frames
        searched = sorted({frames.nearest(seconds) for seconds in searched_seconds(trace.messages)})
        indices = searched
        if not known:
            spans = [*sample.gt_spans, *((seconds, seconds) for seconds in sample.gt_seconds)]
            near = {index for start, end in spans for index in frames.window(start - FAR, end + FAR)}
            away = [index for index in range(len(frames)) if index not in near]
            if not spans or len(away) < len(searched):
                return None
            indices = sorted(int(index) for index in rng.choice(away, size=len(searched), replace=False))
        if not indices:
            return None
        answer = sample.answer if known else UNKNOWN
        return [
            {"role": "user", "content": search.ask_from(search.frames(indices))},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ]


def _origin(settings: Settings) -> str:
    """Digest of all that played traces depend on besides the sample: those of another origin are not taken up."""
    options = settings.coldstart
    player = weights_of(settings.paths.models / "policy") if options.traces == "policy" else options.teacher_model
    protocol = SearchProtocol.load(settings.search.prompts).digest
    made_of = [player, options.teacher_temperature, settings.seed, settings.search.shaping(), protocol]
    return json_digest(made_of)[:12]


def play_traces(settings: Settings, samples: Sequence[Sample], encoder: Encoder, file: Path) -> None:
    """Let the teacher or the base policy play one episode on each sample, and append them to `file`; what is in it is
    not played again.

    Raises:
        RequestError: no teacher is named, or the server does not serve it.
    """
    known = {row["id"] for _, row in read_rows(file) if not row.get("error")} if file.is_file() else set()
    jobs = [Job(sample) for sample in samples if sample.id not in known]
    file.parent.mkdir(parents=True, exist_ok=True)
    if jobs:
        make_search = search_maker(settings, encoder)
        with (
            progress_bar("traces", len(jobs)) as bar,
            file.open("a", encoding="utf-8") as out,
            _open_player(settings) as player,
        ):

            def record(_: Job, prediction: Prediction) -> None:
                out.write(prediction.model_dump_json() + "\n")
                out.flush()
                bar.advance()

            asyncio.run(play(jobs, player, make_search, record, settings.infer.concurrency))
    _judge_answers(settings, samples, file)


def _open_player(settings: Settings) -> AbstractContextManager[Policy]:
    """The teacher behind its server, or the base policy in the engine of the stage `infer`."""
    options = settings.coldstart
    if options.traces == "policy":
        base = settings.paths.models / "policy"
        return open_policy(settings, base, temperature=options.teacher_temperature, video_preview=False)
    url, model = _teacher(options)
    teacher = Served([url], model, settings.infer.retry_for)
    return open_policy(settings, at=teacher, temperature=options.teacher_temperature, video_preview=False)


def _teacher(options: ColdStart) -> tuple[str, str]:
    """URL and model of the teacher.

    Raises:
        RequestError: none is named.
    """
    if not options.teacher_url or not options.teacher_model:
        raise RequestError(
            "coldstart.traces is 'teacher': set coldstart.teacher_url (with /v1) and coldstart.teacher_model to a "
            "server and the vision-language model that it serves. Without a teacher, set coldstart.traces to 'policy', "
            "for the base policy's own right episodes, or to a file of episodes"
        )
    return options.teacher_url, options.teacher_model


def _judge_answers(settings: Settings, samples: Sequence[Sample], file: Path) -> None:
    """Record the judge's verdict on each open-ended answer in `file` that has none yet; 0 where it gave none."""
    from timesearch.judge.client import make_judge
    from timesearch.judge.server import judge_server

    by_id = {sample.id: sample for sample in samples if sample.type == "open_ended"}
    rows = [row for _, row in read_rows(file)]
    answered = [(row, final_answer(row["prediction"])) for row in rows if row["id"] in by_id and not row.get("error")]
    open_ended = [(row, said) for row, said in answered if said and "accuracy" not in (row.get("rewards") or {})]
    if not open_ended:
        return
    triples = [(by_id[row["id"]].question, by_id[row["id"]].answer, said) for row, said in open_ended]
    with judge_server(settings.judge, say=console.print):
        verdicts = asyncio.run(make_judge(settings.judge).score_many(triples))
    for (row, _), verdict in zip(open_ended, verdicts, strict=True):
        row["rewards"] = {**(row.get("rewards") or {}), "accuracy": verdict or 0.0}
    write_jsonl(file, rows)
