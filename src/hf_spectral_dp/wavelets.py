"""Images to wavelet subbands and back: the orthonormal, periodised two-dimensional discrete wavelet transform.

One level splits an image of side n into four bands of side n/2: the approximation LL and three details. With an
orthogonal filter and periodic boundary the transform of one axis is an n x n orthogonal matrix, so the inverse is
its transpose: exact, differentiable and the same on every device. The coefficients equal
`pywt.wavedec2(..., mode="periodization")` (Mallat 1989; PyWavelets supplies the filters).

Orthonormal Haar: LL at level L equals 2**L times the mean of 2**L x 2**L blocks.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pywt
import torch
from torch import Tensor


class Detail(NamedTuple):
    """The detail bands of one level, each (batch, channels, height, width), in PyWavelets' order (cH, cV, cD)."""

    horizontal: Tensor
    vertical: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class Subbands:
    """A wavelet decomposition, coarse to fine.

    Attributes:
        approximation: coarsest LL band, (batch, channels, H / 2**levels, W / 2**levels).
        details: one `Detail` per level, coarsest first; `details[k]` has side `H / 2**(levels - k)`.
        wavelet: name of the PyWavelets filter that made it.
    """

    approximation: Tensor
    details: tuple[Detail, ...]
    wavelet: str = "haar"


@lru_cache
def _is_orthogonal(wavelet: str) -> bool:
    """PyWavelets also calls "dmey" orthogonal, but its truncated filter is so only to two digits: checked by value."""
    if wavelet not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(wavelet).orthogonal:
        return False
    matrix = _analysis_matrix(wavelet, 128)
    return bool(np.abs(matrix @ matrix.T - np.eye(128)).max() < 1e-6)


def check_wavelet(wavelet: str) -> None:
    """Raises ValueError unless `wavelet` names an orthogonal discrete PyWavelets filter."""
    if not _is_orthogonal(wavelet):
        known = ", ".join(name for name in pywt.wavelist(kind="discrete") if _is_orthogonal(name))
        raise ValueError(f"wavelet={wavelet!r} is not an orthogonal PyWavelets filter; choose one of: {known}.")


@lru_cache(maxsize=256)
def _analysis_matrix(wavelet: str, side: int) -> np.ndarray:
    """Orthogonal (side, side) matrix: the first side/2 rows give the low band, the rest the high band."""
    filters = pywt.Wavelet(wavelet)
    matrix = np.zeros((side, side))
    for half, taps in enumerate((filters.dec_lo, filters.dec_hi)):
        for k in range(side // 2):
            for j, tap in enumerate(taps):
                # PyWavelets' periodization centres the filter: output k sees input 2k + len/2 - j.
                matrix[half * (side // 2) + k, (2 * k + len(taps) // 2 - j) % side] += tap
    return matrix


def _matrix(wavelet: str, side: int, like: Tensor) -> Tensor:
    return torch.as_tensor(_analysis_matrix(wavelet, side), dtype=like.dtype, device=like.device)


def _check(images: Tensor, levels: int, wavelet: str) -> None:
    check_wavelet(wavelet)
    if levels < 1:
        raise ValueError(f"levels={levels} must be at least 1.")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images has shape {tuple(images.shape)}, dtype {images.dtype}; expected floating (B, C, H, W)."
        )
    height, width = images.shape[-2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"image sides {height}x{width} are not divisible by 2**levels={2**levels};"
            " pad the image or use fewer levels."
        )


def dwt2(images: Tensor, levels: int, wavelet: str = "haar") -> Subbands:
    """Decomposes images into wavelet subbands. Energy is preserved (orthonormal).

    Args:
        images: (batch, channels, H, W), floating point; H and W divisible by 2**levels.
        levels: number of decompositions, at least 1.
        wavelet: any orthogonal PyWavelets filter ("haar", "db2", "sym4", ...).

    Raises:
        ValueError: unknown or non-orthogonal filter, `levels` < 1, wrong rank, or a side not divisible by 2**levels.
    """
    _check(images, levels, wavelet)
    details: list[Detail] = []
    low = images
    for _ in range(levels):
        rows, columns = low.shape[-2] // 2, low.shape[-1] // 2
        bands = _matrix(wavelet, 2 * rows, low) @ low @ _matrix(wavelet, 2 * columns, low).T
        details.append(Detail(bands[..., rows:, :columns], bands[..., :rows, columns:], bands[..., rows:, columns:]))
        low = bands[..., :rows, :columns]
    return Subbands(low, tuple(reversed(details)), wavelet)


def approximation(images: Tensor, levels: int, wavelet: str = "haar") -> Tensor:
    """The coarsest LL band alone: `dwt2(images, levels, wavelet).approximation` without the work for the details.

    Args and errors are those of `dwt2`; levels may be 0, which returns the images.
    """
    _check(images, max(levels, 1), wavelet)
    for _ in range(levels):
        rows, columns = (_matrix(wavelet, side, images)[: side // 2] for side in images.shape[-2:])
        images = rows @ images @ columns.T
    return images


def idwt2(subbands: Subbands) -> Tensor:
    """Inverse of `dwt2`, exact up to rounding. Fewer details than levels give the coarser LL band.

    Returns:
        (batch, channels, h * 2**len(details), w * 2**len(details)) for an approximation of side (h, w).

    Raises:
        ValueError: a detail band whose shape differs from the band it is combined with.
    """
    low = subbands.approximation
    for detail in subbands.details:
        if any(band.shape != low.shape for band in detail):
            raise ValueError(
                f"detail bands {[tuple(b.shape) for b in detail]} do not match the approximation {tuple(low.shape)};"
                " details must be ordered coarse to fine."
            )
        top = torch.cat([low, detail.vertical], dim=-1)
        bottom = torch.cat([detail.horizontal, detail.diagonal], dim=-1)
        bands = torch.cat([top, bottom], dim=-2)
        rows, columns = (_matrix(subbands.wavelet, side, bands) for side in bands.shape[-2:])
        low = rows.T @ bands @ columns
    return low


__all__ = ["Detail", "Subbands", "approximation", "check_wavelet", "dwt2", "idwt2"]
