"""What a run did, recorded in MLflow: a parent run for a flow, a run for each stage, a trace for a sampled episode.

MLflow is a record, never a condition: while it is away, what cannot be written is kept in order and tried again, it is
said once, and the computing goes on. What an MLflow that answers does not take is set aside, tried once more at the
end, and then named; where the experiment or the run was deleted, nothing is waited for.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from timesearch.base.extras import require_modules
from timesearch.base.files import file_digest, project_folder, write_text
from timesearch.base.http import status_may_pass
from timesearch.base.redaction import redact, redact_value
from timesearch.data.messages import ToolCall, box_of, describe_call, exchanges, parse_turn, text_of
from timesearch.data.samples import Prediction
from timesearch.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LiveSpan

logger = logging.getLogger(__name__)

PARENT_RUN = "TIMESEARCH_PARENT_RUN"
"""Environment variable with the id of the run that stage runs are nested in."""

_RETRY_AFTER = 10.0
"""Seconds between tries to reach an MLflow that does not answer."""
_LAST_CHANCE = 60.0
"""Seconds that an ended run waits for an MLflow that does not answer."""
_PATIENCE = 120.0
"""Seconds that the start of a run waits for its id, and its end for the last records, while MLflow does not fail."""
_WASTED = 10.0
"""Seconds spent on records that are not taken after which no further file is tried: each may take that long."""
_DATA_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""
_VIEW = {
    "searchFilter": "",
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    **{key: [] for key in ("runsPinned", "runsHidden", "columnOrder")},
    **{key: {} for key in ("runsExpanded", "runsVisibilityMap", "columnWidths")},
}
"""State of MLflow's list of runs as its own *Share* button writes it: all runs, the newest first."""
_SHARED_SECTIONS = {
    "coldstart": ("search",),
    "train": ("search", "judge"),
    "infer": ("search",),
    "evaluate": ("judge",),
}


def tracking_uri(settings: Settings) -> str:
    """The MLflow store: `MLFLOW_TRACKING_URI` where it is set, else the settings' own; a file is under the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri
    store, project = _sqlite_file(uri), project_folder()
    return uri if store is None or project == Path.cwd() else f"sqlite:///{project / store}"


class _GoneError(Exception):
    """MLflow will not take this run, however often it is asked; the text says why."""


@dataclass(frozen=True)
class _Record:
    """Something to be written: what it is, in words, and whether it goes to the store of files."""

    what: str
    write: Callable[[MlflowClient], object]
    is_file: bool = False


class Run:
    """One MLflow run, written by a thread of its own, so that no method waits for MLflow."""

    def __init__(self, settings: Settings, name: str, tags: Mapping[str, str], run_id: str | None = None) -> None:
        require_modules("recording a run", "mlflow")
        self._id = run_id
        self._name = name
        self._tracking = settings.tracking
        self._uri = tracking_uri(settings)
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._pending: Queue[_Record | None] = Queue()
        self._refused: list[_Record] = []
        self._refusal = ""
        self._wasted = 0.0
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._away = self._lost = self._gone = False
        self._do("its beginning", lambda client: self._open(client, tags))
        self._writer = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._writer.start()
        self._settled.wait(_PATIENCE)

    @property
    def id(self) -> str | None:
        """The run's id; None until MLflow has been reached."""
        return self._id

    def log_params(self, params: Mapping[str, Any], prefix: str = "") -> None:
        """Record parameters, nested mappings under dotted names."""
        flat = {name: redact(str(value))[:6000] for name, value in _flatten(params, prefix)}
        self._do("parameters", lambda client: self._log_params(client, flat))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; with `step`, as points of a curve."""
        now = int(time.time() * 1000)
        values = {name: float(value) for name, value in metrics.items()}
        self._do("metrics", lambda client: self._log_metrics(client, values, now, step or 0))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags."""
        clean = {name: redact(value) for name, value in tags.items()}
        self._do("tags", lambda client: [client.set_tag(str(self._id), *tag) for tag in clean.items()])

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Record a file, or all files of a folder, under `folder` of the run's artifacts; texts lose their secrets."""
        path = Path(path)
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        for file in files:
            inner = file.relative_to(path).parent if path.is_dir() else Path()
            target = Path(folder or "") / inner
            write = partial(self._log_file, file=file, folder=target.as_posix())
            self._do((target / file.name).as_posix(), write, is_file=True)

    def log_text(self, text: str, name: str) -> None:
        """Record a text file under the artifact path `name`."""
        clean = redact(text)
        self._do(name, lambda client: client.log_text(str(self._id), clean, name), is_file=True)

    def log_data(self, path: Path, rows: int, digest: str, context: str) -> None:
        """Record a file as a data set that the run takes in.

        Args:
            path: the file.
            rows: number of its rows.
            digest: SHA-256 of its bytes, in hex.
            context: what it serves for, such as ``training``.
        """
        self._do(str(path), lambda client: self._log_data(client, path, digest, rows, context))

    def share_view(self, key: str, columns: Iterable[str]) -> None:
        """Let the list of runs be seen with columns of its own, at the list's address with ``?viewStateShareKey=key``.

        MLflow shows no metric there by itself, and keeps what a person chose in that browser alone.

        Args:
            key: of the view, the same for all runs of the experiment.
            columns: such as ``metrics.qa_accuracy`` and ``params.train.learning_rate``.
        """
        named = [f"{kind}.`{name}`" for kind, _, name in (column.partition(".") for column in columns)]
        view = json.dumps({**_VIEW, "selectedColumns": named})
        tag = f"mlflow.sharedViewState.{key}"
        self._do("a view", lambda client: client.set_experiment_tag(self._experiment, tag, view))

    def register(self, name: str, folder: str, card: str, tags: Mapping[str, str]) -> None:
        """Register what lies under `folder` of the run's artifacts as a version of the model `name`.

        A version that has the same tag ``checkpoint`` is the same policy: it gets the new card and tags.

        Args:
            name: of the registered model.
            folder: artifact path.
            card: Markdown, shown as the version's description.
            tags: of the version, ``checkpoint`` (digest of the weights) among them.
        """
        clean = {key: redact(value) for key, value in tags.items()}
        self._do(f"the model {name}", lambda client: self._register(client, name, folder, redact(card), clean))

    def log_episode(self, prediction: Prediction, frames: Path | str | None = None, name: str = "episode") -> None:
        """Record an episode as a trace with one span a turn, the frames that it saw shown small.

        Args:
            prediction: the episode.
            frames: root of the frame caches that the shown frames are read from; None records their times only.
            name: what the trace is called in the list of traces.
        """
        root = Path(frames) if frames else None
        self._do("an episode", lambda client: self._trace(client, prediction, root, name))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, once what is pending is written."""
        self._do("its end", lambda client: client.set_terminated(str(self._id), status))
        self._pending.put(None)
        self._deadline = time.monotonic() + _LAST_CHANCE
        self._closing.set()
        self._writer.join(_PATIENCE)
        if self._writer.is_alive() or self._lost:
            logger.warning("MLflow did not come back: the last records of this run (%s) are not in it", self._name)
        elif self._refused and not self._gone:
            logger.warning(
                "MLflow at %s did not take %d records of this run (%s), the first of them %s: %s; the others are in it",
                redact(self._uri),
                len(self._refused),
                self._name,
                redact(self._refused[0].what),
                self._refusal,
            )

    def _do(self, what: str, write: Callable[[MlflowClient], object], is_file: bool = False) -> None:
        self._pending.put(_Record(what, write, is_file))

    def _write(self) -> None:
        """Write what is pending, in order, and then once more what was set aside."""
        if self._go_through(iter(self._pending.get, None)):
            aside, self._refused = self._refused, []
            self._go_through(aside)

    def _go_through(self, records: Iterable[_Record | None]) -> bool:
        """Write records; False where MLflow stayed away."""
        for record in records:
            assert record is not None
            if record.is_file and self._wasted > _WASTED:
                self._refused.append(record)
            elif not self._settle(record):
                return False
        return True

    def _settle(self, record: _Record) -> bool:
        """Write a record or set it aside, waiting while MLflow is away; False where it did not come back."""
        while not self._gone and not self._try(record):
            if time.monotonic() > self._deadline:
                self._lost = True
                return False
            if self._closing.wait(_RETRY_AFTER):
                time.sleep(min(_RETRY_AFTER, 1.0))
        return True

    def _try(self, record: _Record) -> bool:
        """Write a record, or set it aside where MLflow answers and does not take it; False while MLflow is away."""
        began = time.monotonic()
        try:
            self._client = self._client or self._connect()
            record.write(self._client)
        except Exception as error:  # MLflow's stores raise errors of many libraries, and none may stop the work
            where = redact(self._uri)
            try:
                answers = self._takes_records(error)
            except _GoneError as gone:
                logger.warning("MLflow at %s: %s; this run (%s) is not recorded", where, gone, self._name)
                self._gone = True
                self._settled.set()
                return True
            if answers:
                self._refused.append(record)
                self._refusal = _first(error)
                self._wasted += time.monotonic() - began
                return True
            if not self._away:
                logger.warning("MLflow at %s: %s; work goes on, records are kept and retried", where, _first(error))
            self._away = True
            self._settled.set()
            return False
        if self._away:
            logger.warning("MLflow is back: what was kept is written")
        self._away = False
        self._settled.set()
        return True

    def _takes_records(self, error: Exception) -> bool:
        """Whether MLflow is there for other records of this run, though one of them ended in `error`.

        Raises:
            _GoneError: it will take none.
        """
        if isinstance(error, _GoneError):
            raise error
        if self._client is None or self._id is None:
            if _lasts(error):
                raise _GoneError(_first(error))
            return False
        try:
            run = self._client.get_run(self._id)
        except Exception as failure:
            if _lasts(failure):
                raise _GoneError(_first(failure)) from failure
            return False
        if run.info.lifecycle_stage == "deleted":
            raise _GoneError("the run was deleted, or its experiment: restore it there, or start another")
        return True

    def _connect(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would write into the home folder
        import mlflow

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self._uri)
        name = self._tracking.experiment
        with _alone(self._uri):
            client = mlflow.MlflowClient()
            found = client.get_experiment_by_name(name)
            try:
                self._experiment = (
                    found.experiment_id if found else client.create_experiment(name, _artifacts_of(self._uri, name))
                )
            except mlflow.MlflowException:  # another run made it in between
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
                self._experiment = found.experiment_id
        if found is not None and found.lifecycle_stage == "deleted":
            raise _GoneError(
                f"the experiment {name!r} was deleted: restore it (mlflow experiments restore --experiment-id "
                f"{found.experiment_id}), or name another in tracking.experiment"
            )
        return client

    def _open(self, client: MlflowClient, tags: Mapping[str, str]) -> None:
        if self._id is not None and _is_active(client, self._id):
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(self._experiment, run_name=self._name, tags=dict(tags)).info.run_id

    def _log_params(self, client: MlflowClient, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = client.get_run(str(self._id)).data.params
        entries = [Param(name, value) for name, value in params.items() if name not in known]
        for start in range(0, len(entries), 100):
            client.log_batch(str(self._id), params=entries[start : start + 100])

    def _log_metrics(self, client: MlflowClient, values: Mapping[str, float], when: int, step: int) -> None:
        from mlflow.entities import Metric

        entries = [Metric(name, value, when, step) for name, value in values.items()]
        for start in range(0, len(entries), 1000):
            client.log_batch(str(self._id), metrics=entries[start : start + 1000])

    def _log_data(self, client: MlflowClient, path: Path, digest: str, rows: int, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=path.name,
            digest=digest[:_DATA_DIGEST],
            source_type="local",
            source=json.dumps({"uri": redact(str(path))}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        client.log_inputs(str(self._id), [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def _register(self, client: MlflowClient, name: str, folder: str, card: str, tags: Mapping[str, str]) -> None:
        from mlflow import MlflowException

        try:
            client.create_registered_model(name, description="Policies that `train` made; the weights are under DVC.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        same = client.search_model_versions(f"name = '{name}' AND tag.checkpoint = '{tags['checkpoint']}'")
        if same:
            version = same[0].version
            client.update_model_version(name, version, card)
            for tag in tags.items():
                client.set_model_version_tag(name, version, *tag)
            return
        source = f"{client.get_run(str(self._id)).info.artifact_uri}/{folder}"
        made = client.create_model_version(name, source, str(self._id), dict(tags), description=card)
        client.set_tag(str(self._id), "registered_model", f"{name} {made.version}")

    def _log_file(self, client: MlflowClient, file: Path, folder: str) -> None:
        """Copy a file as it is, unless it is a text with a secret in it."""
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        if (clean := redact(text)) == text:
            client.log_artifact(str(self._id), str(file), None if folder == "." else folder)
        else:
            client.log_text(str(self._id), clean, (Path(folder) / file.name).as_posix())

    def _trace(self, client: MlflowClient, prediction: Prediction, frames: Path | None, name: str) -> None:
        import mlflow

        client.get_run(str(self._id))  # fails while MLflow is away, where what follows would be lost without an error
        prediction = Prediction.model_validate(redact_value(prediction.model_dump(mode="json")))
        experiment = self._experiment
        show = _Thumbnails(prediction.video, frames)
        chat = [_readable(message, show) for message in prediction.prediction]
        root = mlflow.start_span_no_context(
            name,
            span_type="AGENT",
            inputs={"question": prediction.question, "options": prediction.options, "video": prediction.video},
            tags={"sample": prediction.id},
            metadata={"mlflow.sourceRun": str(self._id)},
            experiment_id=experiment,
        )
        _turn_spans(root, prediction, chat)
        root.set_outputs(
            {
                "answer": prediction.predicted_answer,
                "right_answer": prediction.answer,
                "searched_seconds": prediction.searched_seconds,
                "rewards": prediction.rewards,
                "error": prediction.error.model_dump() if prediction.error else None,
            }
        )
        root.set_attributes({"turns": prediction.turns, "usage": prediction.usage.model_dump()})
        root.end(status="ERROR" if prediction.error else "OK")


@contextmanager
def stage_run(settings: Settings, stage: str, keep: Path | str | None = None) -> Iterator[Run]:
    """Open the MLflow run of a stage, nested in the run that `TIMESEARCH_PARENT_RUN` names, if it is set.

    Its parameters are the stage's section and those that it shares; it ends FINISHED, FAILED, or KILLED (Ctrl-C).

    Args:
        settings: all settings.
        stage: name of the stage.
        keep: file that keeps the run's id, so that an interrupted stage goes on in the same run.
    """
    tags = {"stage": stage, "profile": settings.profile, **_code_tags(Path())}
    parent = os.environ.get(PARENT_RUN)
    if parent:
        tags["mlflow.parentRunId"] = parent
    known = Path(keep).read_text(encoding="utf-8").strip() if keep and Path(keep).is_file() else None
    run = Run(settings, stage, tags, run_id=known or None)
    if keep and run.id:
        write_text(keep, run.id + "\n")
    sections = (stage, *_SHARED_SECTIONS.get(stage, ()))
    values = settings.model_dump(mode="json")
    run.log_params({"seed": settings.seed, **{name: values[name] for name in sections if name in values}})
    with _finishing(run):
        yield run


@contextmanager
def parent_run(settings: Settings, name: str, folder: Path | str = ".") -> Iterator[Run]:
    """Open the run that the stage runs of a flow in `folder` are nested in, with all parameters."""
    tags = {"profile": settings.profile, **_code_tags(Path(folder))}
    run = Run(settings, name, tags)
    run.log_params(settings.model_dump(mode="json"))
    run.log_text(_params_text(settings), "params.yaml")
    with _finishing(run):
        yield run


@contextmanager
def _finishing(run: Run) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other runs of this machine away while a SQLite store is opened: two that create its tables break it."""
    store = _sqlite_file(uri)
    if store is None:
        yield
        return
    lock = store.with_name(f"{store.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sqlite_file(uri: str) -> Path | None:
    file = uri.removeprefix("sqlite:///")
    return Path(file) if file != uri else None


def _artifacts_of(uri: str, experiment: str) -> str | None:
    """Folder of an experiment's artifacts: beside a SQLite store, from wherever it is opened; else the store's own."""
    store = _sqlite_file(uri)
    return str(store.resolve().parent / "mlruns" / experiment) if store else None


def _params_text(settings: Settings) -> str:
    import yaml

    return yaml.safe_dump(redact_value(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _code_tags(folder: Path) -> dict[str, str]:
    """The commit and the digest of DVC's lock file, so that a run can be made again."""
    tags = {}
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return {**tags, **lock_tags(folder)}


def lock_tags(folder: Path) -> dict[str, str]:
    """The digest of the lock file that names every input and output of the stages in `folder`."""
    lock = folder / "dvc.lock"
    return {"dvc_lock_sha256": file_digest(lock)} if lock.is_file() else {}


def _flatten(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        dotted = f"{prefix}.{name}" if prefix else name
        if isinstance(item, Mapping):
            yield from _flatten(item, dotted)
        else:
            yield dotted, item


def _lasts(error: Exception) -> bool:
    """Whether MLflow answered with a refusal that no later try changes, or what answers is no MLflow."""
    from mlflow import MlflowException

    if not isinstance(error, MlflowException):
        return False
    return not status_may_pass(error.get_http_status_code()) or "not in a valid JSON format" in str(error)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether a run that is to go on is there; it may have been deleted, or be of another store."""
    from mlflow import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return False
        raise


def _first(error: Exception) -> str:
    return redact(str(error).strip().partition("\n")[0])[:200] or type(error).__name__


class _Thumbnails:
    """Small data URLs of a video's frames; None where there is no cache."""

    def __init__(self, video: str, root: Path | None, side: int = 160) -> None:
        self._path = root / f"{video}.frames" if root else None
        self._side = side

    def __call__(self, index: int) -> str | None:
        if self._path is None or not self._path.is_file():
            return None
        import base64
        import io

        from timesearch.video.frames import FrameCache

        image = FrameCache.open(self._path)[index].copy()
        image.thumbnail((self._side, self._side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _readable(message: Mapping[str, Any], show: Callable[[int], str | None]) -> dict[str, Any]:
    """A message in OpenAI's chat form, which MLflow's trace view draws as a conversation."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    blocks: list[dict[str, Any]] = []
    for block in content:
        if block.get("type") == "text":
            blocks.append({"type": "text", "text": block.get("text", "")})
        elif (box := box_of(block)) is not None:
            region = ", ".join(f"{side:g}" for side in box)
            blocks.append({"type": "text", "text": f"[picture of the source, region {region}]"})
        elif isinstance(block.get("frame"), int):
            url = show(block["frame"])
            blocks.append(
                {"type": "image_url", "image_url": {"url": url}}
                if url
                else {"type": "text", "text": f"[frame {block['frame']}]"}
            )
    return {"role": message["role"], "content": blocks}


def _turn_spans(root: LiveSpan, prediction: Prediction, chat: list[dict[str, Any]]) -> None:
    """One span a turn of the policy, and one for what each tool call gave back."""
    import mlflow

    turn = 0
    new: list[dict[str, Any]] = []
    answered = iter(exchanges(prediction.prediction))
    for message, shown in zip(prediction.prediction, chat, strict=True):
        if message["role"] == "assistant":
            turn += 1
            said = parse_turn(text_of(message))
            calls = "; ".join(describe_call(call) for call in said.calls)
            act = calls or ("answer" if said.answer is not None else "no act")
            span = mlflow.start_span_no_context(
                f"turn {turn}: {act}"[:120], span_type="CHAT_MODEL", parent_span=root, inputs={"messages": new}
            )
            span.set_attribute("mlflow.message.format", "openai")
            span.set_outputs({"choices": [{"index": 0, "message": shown}]})
            span.end()
            new = []
            continue
        new.append(shown)
        if message["role"] == "tool":
            call = next(answered).call or ToolCall("", {})
            span = mlflow.start_span_no_context(
                call.name or "tool", span_type="TOOL", parent_span=root, inputs=call.arguments
            )
            span.set_outputs(shown["content"])
            span.end()
