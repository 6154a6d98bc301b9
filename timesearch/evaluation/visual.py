"""Visual metrics of LV-Haystack (T*, arXiv 2504.02259, Section 3): how much the searched frames look like the ground
truth, by structural similarity (SSIM, Wang et al. 2004, 11 x 11 Gaussian window of sigma 1.5).

Precision is the mean, over searched frames, of the similarity to the most similar ground-truth frame; recall is the
mean, over ground-truth frames, of that to the most similar searched frame. Two modes:

- ``standard`` is SSIM as it is defined, each colour channel by itself, over all places where the window fits; equal to
  scikit-image's `structural_similarity(gaussian_weights=True, channel_axis=-1, data_range=255)`.
- ``tstar`` is what T*'s code computes, and so what published tables hold. It hands images of shape (H, W, 3) to a
  function that expects (C, H, W): each of the H rows becomes a channel, and the window slides over (W, colour), padded
  with zeros. On an axis of three colours an 11-wide window is a fixed 3 x 3 mixing of the colours, which is how it is
  computed here: one filter along the rows, then one small matrix product.

Of the five filtered images that the SSIM of a pair needs, four (two means, two variances) belong to one frame each and
are computed once a frame; a pair costs one filter more, of the product of the two frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Mode = Literal["tstar", "standard"]
WINDOW = 11
SIGMA = 1.5
_RADIUS = WINDOW // 2
_OFFSETS = np.arange(-_RADIUS, _RADIUS + 1)
_KERNEL = np.exp(-(_OFFSETS**2) / (2 * SIGMA**2))
_KERNEL /= _KERNEL.sum()
_COLOUR_MIX = np.array([[_KERNEL[_RADIUS + j - i] for j in range(3)] for i in range(3)], dtype=np.float32)
_TILE = 24
_BAND = np.zeros((_TILE, _TILE + 2 * _RADIUS), dtype=np.float32)
for _row in range(_TILE):
    _BAND[_row, _row : _row + WINDOW] = _KERNEL
_LEVELS = 255.0
_UNBIASED = WINDOW**2 / (WINDOW**2 - 1)  # sample covariance, scikit-image's default


@dataclass(frozen=True)
class _Statistics:
    """What SSIM needs of one frame: float32 arrays of shape (3, H', W').

    `pixels` and `mean` count from mid-grey in mode ``standard``, which keeps variances exact in float32. `energy` (the
    mean squared) and `variance` carry half of SSIM's constants each, so that two frames' sum carries them whole.
    """

    pixels: np.ndarray
    mean: np.ndarray
    energy: np.ndarray
    variance: np.ndarray


class Ssim:
    """SSIM of frames in one mode: `statistics` once a frame, `similarity` once a pair.

    Intermediate images go into buffers that are kept: for a frame of 640 x 360, mapping fresh memory costs as much as
    the arithmetic. An object belongs to one thread.
    """

    def __init__(self, mode: Mode) -> None:
        if mode not in ("tstar", "standard"):
            raise ValueError(f"mode must be 'tstar' or 'standard', not {mode!r}")
        self._tstar = mode == "tstar"
        scale = 1.0 if self._tstar else _LEVELS
        self._luminance = np.float32((0.01 * scale) ** 2)
        self._contrast = np.float32((0.03 * scale) ** 2)
        self._centre = np.float32(0.0 if self._tstar else _LEVELS / 2)
        self._covariance_scale = np.float32(1.0 if self._tstar else _UNBIASED)
        self._buffers: dict[str, np.ndarray] = {}

    def statistics(self, frame: Any, reuse: _Statistics | None = None) -> _Statistics:
        """Statistics of an RGB frame: a uint8 array of shape (H, W, 3), or a PIL image.

        Args:
            frame: the frame.
            reuse: statistics that are needed no longer; those of this frame are written over them.

        Raises:
            ValueError: another shape, or, in mode ``standard``, a side shorter than the window.
        """
        array = np.asarray(frame)
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"a frame must have the shape (height, width, 3), not {array.shape}")
        if not self._tstar and min(array.shape[:2]) < WINDOW:
            raise ValueError(f"a frame of {array.shape[1]} x {array.shape[0]} pixels is smaller than the SSIM window")
        planes = array.transpose(2, 0, 1)
        if reuse is None or reuse.pixels.shape != planes.shape:
            trim = 0 if self._tstar else 2 * _RADIUS
            shape = (3, array.shape[0] - trim, array.shape[1] - trim)
            parts = [np.empty(size, dtype=np.float32) for size in (planes.shape, shape, shape, shape)]
            reuse = _Statistics(*parts)
        pixels, mean, energy, variance = reuse.pixels, reuse.mean, reuse.energy, reuse.variance
        np.copyto(pixels, planes)
        if self._tstar:
            pixels /= np.float32(_LEVELS)
        pixels -= self._centre
        np.copyto(mean, self._filtered(pixels, pixels, first_only=True))
        np.multiply(mean, mean, out=energy)
        np.subtract(self._filtered(pixels, pixels), energy, out=variance)
        variance *= self._covariance_scale
        variance += self._contrast / 2
        np.add(mean, self._centre, out=energy)
        energy *= energy
        energy += self._luminance / 2
        return reuse

    def similarity(self, a: _Statistics, b: _Statistics) -> float:
        """Mean SSIM of two frames of one size, in [-1, 1].

        Raises:
            ValueError: the sizes differ.
        """
        if a.pixels.shape != b.pixels.shape:
            raise ValueError(f"frames of different sizes: {a.pixels.shape[1:]} and {b.pixels.shape[1:]}")
        covariance = self._filtered(a.pixels, b.pixels)
        scratch = np.multiply(a.mean, b.mean, out=self._buffer("scratch", a.mean.shape))
        covariance -= scratch
        covariance *= 2 * self._covariance_scale
        covariance += self._contrast
        # (2 mean_a mean_b + C1) is the sum of the energies less the squared difference of the means
        energy = np.add(a.energy, b.energy, out=self._buffer("energy", a.mean.shape))
        np.subtract(a.mean, b.mean, out=scratch)
        scratch *= scratch
        np.subtract(energy, scratch, out=scratch)
        scratch *= covariance
        energy *= np.add(a.variance, b.variance, out=covariance)
        scratch /= energy
        return float(scratch.mean(axis=-1).mean(dtype=np.float64))

    def _filtered(self, a: np.ndarray, b: np.ndarray, first_only: bool = False) -> np.ndarray:
        """The product of two images under the window, or the first of them alone; in a buffer that is used again."""
        depth, height, width = a.shape
        if not self._tstar:
            image = a if first_only else np.multiply(a, b, out=self._buffer("image", a.shape))
            return self._smooth(self._smooth(image, 1), 2)
        padded = self._buffer("padded", (depth, height, width + 2 * _RADIUS))
        centre = padded[:, :, _RADIUS:-_RADIUS]
        if first_only:
            centre[...] = a
        else:
            np.multiply(a, b, out=centre)
        rows = self._smooth(padded, 2)
        mixed = self._buffer("mixed", rows.shape)
        np.matmul(_COLOUR_MIX, rows.reshape(3, -1), out=mixed.reshape(3, -1))
        return mixed

    def _smooth(self, images: np.ndarray, axis: int) -> np.ndarray:
        """Gaussian filter along one axis, where the window fits: tile by tile, a product with a banded matrix.

        BLAS does a tile's few needless multiplications by zero faster than anything else here filters without them.
        """
        size = images.shape[axis] - 2 * _RADIUS
        result = self._buffer(f"smooth {axis}", (*images.shape[:axis], size, *images.shape[axis + 1 :]))
        for start in range(0, size, _TILE):
            stop = min(start + _TILE, size)
            band = _BAND[: stop - start, : stop - start + 2 * _RADIUS]
            if axis == 1:
                np.matmul(band, images[:, start : stop + 2 * _RADIUS], out=result[:, start:stop])
            else:
                rows, smooth = images.reshape(-1, images.shape[2]), result.reshape(-1, size)
                np.matmul(rows[:, start : stop + 2 * _RADIUS], band.T, out=smooth[:, start:stop])
        return result

    def _buffer(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array that is kept under a name; new ones are zero."""
        if name not in self._buffers or self._buffers[name].shape != shape:
            self._buffers[name] = np.zeros(shape, dtype=np.float32)
        return self._buffers[name]


def ssim_matrix(
    gt_frames: Sequence[Any] | np.ndarray, pred_frames: Sequence[Any] | np.ndarray, mode: Mode
) -> np.ndarray:
    """SSIM of each of n ground-truth frames with each of m searched frames, shape (n, m).

    Only the ground truth's statistics are kept; searched frames pass one by one.
    """
    ssim = Ssim(mode)
    truth = [ssim.statistics(frame) for frame in gt_frames]
    scores = np.zeros((len(truth), len(pred_frames)))
    statistics = None
    for column, frame in enumerate(pred_frames):
        statistics = ssim.statistics(frame, reuse=statistics)
        for row, other in enumerate(truth):
            scores[row, column] = ssim.similarity(other, statistics)
    return scores


def ssim_precision_recall(
    gt_frames: Sequence[Any] | np.ndarray, pred_frames: Sequence[Any] | np.ndarray, mode: Mode = "tstar"
) -> tuple[float, float]:
    """Visual precision and recall of one episode.

    Args:
        gt_frames: n RGB frames, uint8 arrays of shape (H, W, 3) or PIL images, all of one size.
        pred_frames: m frames of the same size.
        mode: ``tstar`` for numbers that compare with published tables, ``standard`` for a correct SSIM.

    Returns:
        (precision, recall); both 0 where either list is empty.

    Raises:
        ValueError: an unknown mode, frames that are not RGB, or sizes that differ.
    """
    scores = ssim_matrix(gt_frames, pred_frames, mode)
    if scores.size == 0:
        return 0.0, 0.0
    return float(scores.max(axis=0).mean()), float(scores.max(axis=1).mean())
