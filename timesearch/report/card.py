"""The card of a policy: what it is, what it was trained on, what it reaches, and how that was measured.

It is a model card in the form of the Hugging Face hub (arXiv 1810.03993): figures stand in its front matter too, where
the hub reads them. The figures are those of `results/`, with their 95% intervals, and only if they are of this policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from timesearch.base.digests import remembered
from timesearch.base.errors import RequestError
from timesearch.base.redaction import redact_value
from timesearch.data.rows import read_samples
from timesearch.evaluation.results import load_metrics
from timesearch.evaluation.table import TABLE_COLUMNS
from timesearch.inference.fingerprint import checkpoint_digest, words_for
from timesearch.inference.methods import trained_method
from timesearch.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

FIGURES = (*TABLE_COLUMNS, ("completeness", "completeness", 100))
"""Numbers of a policy that are shown beside others': words, name, and what it is multiplied by."""
_TASK = "video-text-to-text"


@dataclass(frozen=True)
class DataFile:
    """A file of samples as a card names it; `context` says what it serves for."""

    path: Path
    context: str
    rows: int
    sha256: str


def data_files(settings: Settings, root: Path = Path()) -> list[DataFile]:
    """The files of samples that are there, of the project in the folder `root`."""
    named = (("training", settings.paths.train_samples), ("evaluation", settings.paths.test_samples))
    return [
        DataFile(path, context, len(read_samples(root / path, lambda _: None)), remembered(root / path))
        for context, path in named
        if (root / path).is_file()
    ]


def figures_of(settings: Settings, policy: Path, root: Path = Path()) -> dict[str, Any] | None:
    """The whole metrics of a policy's episodes; None where they were not evaluated.

    Args:
        settings: of the project.
        policy: folder of the checkpoint.
        root: folder of the project.

    Raises:
        RequestError: the figures are of another checkpoint, or are no figures.
    """
    paths = settings.paths
    played = {trained_method(settings): paths.train, "coldstart": paths.coldstart, "base": paths.models / "policy"}
    for method, checkpoint in played.items():
        path = root / paths.results / "evaluation" / f"{method}.json"
        if path.is_file() and (root / checkpoint).resolve() == policy.resolve():
            metrics = load_metrics(path)
            made = (metrics.get("fingerprint") or {}).get("made_of") or {}
            if made.get("checkpoint") not in (None, checkpoint_digest(policy)):
                raise RequestError(
                    f"the figures in {path} are of other weights than {policy} holds: run `timesearch infer` and "
                    "`timesearch evaluate` again"
                )
            return metrics
    return None


def model_card(
    settings: Settings, policy: Path, name: str, licence: str | None = None, root: Path = Path()
) -> ModelCard:
    """Write a policy's card.

    Args:
        settings: with which it was trained and evaluated.
        policy: folder of the checkpoint.
        name: of the model.
        licence: an identifier as the hub lists them, such as ``apache-2.0``; None leaves it open.
        root: folder of the project.

    Raises:
        RequestError: as `figures_of`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    metrics = figures_of(settings, policy, root)
    data = data_files(settings, root)
    base = settings.models.policy if settings.models.policy.count("/") == 1 and not _is_local(settings, root) else None
    front = ModelCardData(
        model_name=name,
        base_model=base,
        license=licence,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["timesearch", "long-video", "temporal-search", "grpo"],
        eval_results=_eval_results(metrics, data) if metrics else None,
    )
    parts = [
        f"# {name}",
        "A vision-language policy that answers a question about a long video by searching it: it sees a sparse "
        "preview, asks for the frames that match a description within a window of time, looks at them, and searches "
        f"again or answers. It was made by [timesearch](https://arxiv.org/abs/2511.05489) from "
        f"`{_shown(settings.models.policy, root)}`.",
        "## Use",
        '```bash\ntimesearch ask video.mp4 "What happens at the end?" --model . --params params.yaml '
        "--protocol protocol\n```",
        "`protocol/` holds the words and rules by which it plays, `params.yaml` its budgets. Played by others, it does "
        "not reach the figures below.",
        "## Figures",
        _figures(metrics),
        "## Data",
        _table(("file", "for", "rows", "SHA-256"), [(d.path.name, d.context, f"{d.rows:,}", d.sha256) for d in data]),
        "## What the figures are made of",
        _fingerprint(metrics),
        "## Training",
        f"```yaml\n{_yaml(training_settings(settings))}```",
        "## Licence",
        f"`{licence}`." if licence else "Not stated: the base policy's terms hold for what was made of it.",
    ]
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def training_settings(settings: Settings) -> dict[str, Any]:
    """What of the parameters shaped the policy, without paths, addresses and what only sets the pace."""
    sections = {name: getattr(settings, name).shaping() for name in ("frames", "search", "coldstart", "train")}
    sections["search"]["prompts"] = Path(settings.search.prompts).name  # where they lay is nobody's concern
    sections["coldstart"]["traces"] = Path(settings.coldstart.traces).name
    models = settings.models.model_dump(mode="json", include={"encoder", "pretrained", "encoder_steps"})
    budgets = {"preview": settings.infer.preview, "budgets": dict(settings.infer.budgets)}
    named = {"profile": settings.profile, "seed": settings.seed, "models": models, **sections, "infer": budgets}
    return dict(redact_value(named))


def _is_local(settings: Settings, root: Path) -> bool:
    return (root / settings.models.policy).exists()


def _shown(model: str, root: Path) -> str:
    """A model's name; of a folder its last part."""
    return Path(model).name if (root / model).exists() else model


def _eval_results(metrics: Mapping[str, Any], data: list[DataFile]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    tests = [each for each in data if each.context == "evaluation"]
    name = tests[0].path.name if tests else "samples"
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type="timesearch-samples",
            dataset_name=name,
            dataset_revision=tests[0].sha256 if tests else None,
            metric_type=metric,
            metric_name=words,
            metric_value=round(metrics[metric], 6),
            metric_args={"interval_95": metrics["intervals"][metric]} if metric in metrics.get("intervals", {}) else {},
        )
        for words, metric, _ in FIGURES
        if metrics.get(metric) is not None
    ]


def _figures(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "None: it has not been evaluated."
    rows = []
    for words, name, scale in FIGURES:
        if (value := metrics.get(name)) is not None:
            interval = metrics.get("intervals", {}).get(name)
            low_high = f"{interval[0] * scale:.1f} to {interval[1] * scale:.1f}" if interval else "–"
            rows.append((words, f"{value * scale:.1f}", low_high))
    note = (
        f"Over {metrics['episodes']:,} episodes, {metrics['errors']} of which ended in an error. Shares are in per "
        f"cent, times count as found within {metrics['threshold']:g} s, intervals are bootstrapped over episodes."
    )
    return _table(("measure", "value", "95% interval"), rows) + "\n\n" + note


def _fingerprint(metrics: Mapping[str, Any] | None) -> str:
    made = (metrics or {}).get("fingerprint") or {}
    if not made.get("digest"):
        return "Nothing is known of it."
    named = made.get("made_of") or {}
    rows = [(words_for(name), f"`{value}`".replace("|", "\\|")) for name, value in sorted(named.items())]
    told = (
        f"Fingerprint `{made['digest']}`; questions: {made['questions']['count']:,}, `{made['questions']['digest']}`."
    )
    return f"{told}\n\n{_table(('ingredient', 'value'), rows)}" if rows else told


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
