"""Views of an image: the image itself and a few fixed, slight changes of it, one of which training sees at a time.

Data augmentation in the only form that costs no privacy and no time in training: the changes are the same for every
image and were fixed beforehand, so the views of an image are a function of that image alone.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 256
_LIMITS = {"rotation": 180.0, "scaling": 0.5, "shear": 0.5, "shift": 0.5}


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which views are kept of every image. View 0 is the image itself.

    Attributes:
        count: views of an image, in [1, 256].
        rotation: largest angle in degrees, in [0, 180], in both directions.
        scaling: largest change of size, in [0, 0.5]: 0.1 is a tenth smaller or larger.
        shear: largest slant, in [0, 0.5]: pixels to the side per pixel upwards.
        shift: largest way in each direction as a share of the side, in [0, 0.5].
        mirror: every second view is mirrored, left to right.

    Formal guarantee: `of` maps every image by itself, by maps that depend on these fields only. So all views of an
    image belong to its privacy unit, and a unit that shows one of them at a time moves a sum by no more than one image
    does; see `TokenStore.__getitem__`.

    Raises:
        ValueError: a field out of its range, or one view that is to be changed, or several that are all the same.
    """

    count: int
    rotation: float = 0.0
    scaling: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    mirror: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.count, Integral) or not 1 <= self.count <= _MOST:
            raise ValueError(f"count={self.count!r} must be a whole number in [1, {_MOST}]: views kept of every image.")
        for name, limit in _LIMITS.items():
            if not isinstance(value := getattr(self, name), Real) or not 0 <= value <= limit:
                raise ValueError(f"{name}={value!r} must be a number in [0, {limit:g}].")
        if not isinstance(self.mirror, bool):
            raise ValueError(f"mirror={self.mirror!r} must be true or false.")
        if (self.count > 1) != (self.mirror or self._bends):
            raise ValueError(
                f"count={self.count} with no change given, or changes for a single view: view 0 is the image itself, so"
                " give count above 1 and one or more of rotation, scaling, shear, shift, mirror."
            )
        if self.mirror and not self._bends and self.count > 2:
            raise ValueError(f"count={self.count} but mirror alone makes two views; take count=2.")

    @property
    def _bends(self) -> bool:
        return any(getattr(self, name) for name in _LIMITS)

    def of(self, images: Tensor) -> list[Tensor]:
        """All views, each (B, C, S, S) like the images (B, C, S, S) in [-1, 1]; what moves in repeats the edge.

        The changes are uniform in their ranges, drawn from seed 0: the same for every image, call and machine.
        """
        draw = torch.rand(self.count, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
        shown = [images]
        for number, (turn, size, slant, right, down) in enumerate(draw[1:].tolist(), 1):
            view = images.flip(-1) if self.mirror and number % 2 else images
            if self._bends:
                angle, scale = math.radians(self.rotation * turn), 1 + self.scaling * size
                cos, sin, lean = math.cos(angle) / scale, math.sin(angle) / scale, self.shear * slant
                # From places of the view to places of the image, in half sides.
                map_ = [[cos, lean * cos - sin, 2 * self.shift * right], [sin, lean * sin + cos, 2 * self.shift * down]]
                grid = F.affine_grid(images.new_tensor(map_).expand(len(images), 2, 3), list(images.shape), False)
                view = F.grid_sample(view, grid, "bicubic", "border", False).clamp(-1, 1)
            shown.append(view)
        return shown


__all__ = ["Views"]
