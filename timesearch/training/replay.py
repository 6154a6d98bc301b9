"""Groups that teach nothing, replaced by groups that do.

Where all episodes of a question earn the same reward, all advantages are zero and the group's gradient with them. The
paper's code swaps such a batch for an earlier one; here single groups are swapped, with the log-probabilities under
which they were played, so that the clipped ratio knows how old they are.

A process that holds only a slice of a group treats the slice as a group of its own: zero advantages teach nothing
there either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Batch = dict[str, Any]
"""What `GRPOTrainer` learns from, as `_generate_and_score_completions` returns it, B episodes long."""

_PROMPT = ("prompt_ids", "prompt_mask")


def idle_groups(advantages: torch.Tensor, size: int) -> list[int]:
    """Numbers of the groups (of `size` episodes each, in order) whose advantages (B,) are all zero."""
    return [group for group, part in enumerate(advantages.split(size)) if not part.any()]


def rows_of(groups: Sequence[int], size: int) -> list[int]:
    """Rows of the batch that `groups` fill."""
    return [row for group in groups for row in range(group * size, (group + 1) * size)]


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """A batch of some rows of `batch`; its images are split by row.

    Its tensors are copies in main memory: a view would keep the whole batch alive, and a GPU has no room to keep
    images in.
    """
    index = list(rows)
    return {
        key: [_kept(value[row]) for row in index]
        if isinstance(value, list)
        else _kept(value[index] if value.dim() else value)
        for key, value in split_pixel_values_by_grid(batch).items()
    }


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def put(batch: Batch, rows: Sequence[int], other: Batch, pad_token: int) -> Batch:
    """`batch` with `rows` replaced by the rows of `other` (from `take`), both padded to a common length.

    Prompts are padded on the left and completions on the right, as TRL does. The result is where `batch` is.
    """
    batch = split_pixel_values_by_grid(batch)
    prompt = max(part["prompt_ids"].size(1) for part in (batch, other))
    completion = max(part["completion_ids"].size(1) for part in (batch, other))
    batch, other = (_widen(part, prompt, completion, pad_token) for part in (batch, other))
    for key, value in batch.items():
        if isinstance(value, list):
            value = list(value)
            for row, replacement in zip(rows, other[key], strict=True):
                value[row] = replacement.to(value[row]) if isinstance(replacement, torch.Tensor) else replacement
            batch[key] = value
        elif value.dim():
            batch[key] = value.clone()
            batch[key][list(rows)] = other[key].to(value)
    return unsplit_pixel_values_by_grid(batch)


def _widen(batch: Batch, prompt: int, completion: int, pad_token: int) -> Batch:
    left = prompt - batch["prompt_ids"].size(1)
    right = completion - batch["completion_ids"].size(1)
    widened = dict(batch)
    for key, value in batch.items():
        # Lists and numbers a row or a batch have no length in tokens; nor has a column of one number a row, which looks
        # like tokens only where completions are one token long.
        if isinstance(value, list) or value.dim() < 2 or value.size(1) == 1 != completion - right:
            continue
        # TRL pads the tool mask by 1 (0 marks what a tool said): the completion mask leaves padding out.
        fill = pad_token if key in ("prompt_ids", "completion_ids") else int(key == "tool_mask")
        # Token types cover prompt and completion in one row; all else belongs to one of them.
        sides = (left, right) if key == "mm_token_type_ids" else (left, 0) if key in _PROMPT else (0, right)
        widened[key] = torch.nn.functional.pad(value, sides, value=fill)
    return widened


class ReplayBuffer:
    """The newest groups that taught something.

    Args:
        capacity: groups kept, with their images, in main memory.
    """

    def __init__(self, capacity: int) -> None:
        self._groups: deque[Batch] = deque(maxlen=capacity)

    def exchange(self, batch: Batch, size: int, pad_token: int) -> tuple[Batch, int]:
        """Replace idle groups of `batch` by kept ones, newest first, and keep those of `batch` that are not idle.

        Returns:
            The batch, and how many groups were replaced.
        """
        idle = idle_groups(batch["advantages"], size)
        groups = batch["advantages"].numel() // size
        fresh = [take(batch, rows_of([group], size)) for group in range(groups) if group not in idle]
        replaced = 0
        for group, kept in zip(idle, reversed(self._groups), strict=False):
            batch = put(batch, rows_of([group], size), kept, pad_token)
            replaced += 1
        self._groups.extend(fresh)
        return batch, replaced


def refill(batch: Batch, spare: Batch, size: int, pad_token: int) -> tuple[Batch, int]:
    """Replace idle groups of `batch` by groups of `spare`, another batch of the same policy, that are not idle.

    Returns:
        The batch, and how many groups were replaced.
    """
    idle = idle_groups(batch["advantages"], size)
    useless = idle_groups(spare["advantages"], size)
    useful = [group for group in range(spare["advantages"].numel() // size) if group not in useless]
    pairs = list(zip(idle, useful, strict=False))
    for group, source in pairs:
        batch = put(batch, rows_of([group], size), take(spare, rows_of([source], size)), pad_token)
    return batch, len(pairs)
