"""Which token position is which scale and which place: the order of the coarse-to-fine sequence.

Scale 0 is the approximation band of the coarsest level; scale k >= 1 holds the three detail bands of the k-th
coarsest level, stacked on the channels (Spectral Image Tokenizer, arXiv:2412.09607, Section 3). Each scale is cut
into square patches; one patch is one token; tokens run row by row inside a scale. A prefix that ends at a scale's
end is a complete, coarser image.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """One scale: `channels` stacked bands of side `side`, cut into patches of side `patch`; `codes` code words whose
    ids start at `first_id`; its tokens start at `first_position` of the image's sequence."""

    channels: int
    side: int
    patch: int
    codes: int
    first_id: int
    first_position: int

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        """Coefficients in one patch."""
        return self.channels * self.patch**2


@dataclass(frozen=True)
class TokenLayout:
    """The scales, coarse to fine. `length` is the number of tokens of one image, `codes` the number of code ids."""

    scales: tuple[Scale, ...]

    @property
    def length(self) -> int:
        return sum(scale.tokens for scale in self.scales)

    @property
    def codes(self) -> int:
        return sum(scale.codes for scale in self.scales)

    @property
    def scale_of_position(self) -> list[int]:
        """For each of the `length` positions the index of its scale."""
        return [index for index, scale in enumerate(self.scales) for _ in range(scale.tokens)]

    @classmethod
    def build(
        cls, image_size: int, num_channels: int, levels: int, patch_sizes: Sequence[int], codebook_sizes: Sequence[int]
    ) -> "TokenLayout":
        """Builds the layout of an image of side `image_size` (pixels) decomposed `levels` times.

        `patch_sizes` and `codebook_sizes` have one entry per modelled scale, coarse to fine; scales beyond them (the
        finest details) are not tokenised.

        Raises:
            ValueError: sides that do not divide, or lists of the wrong length; names the field, value and remedy.
        """
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1.")
        if image_size < 1 or image_size % 2**levels:
            raise ValueError(
                f"image_size={image_size} is not a positive multiple of 2**levels={2**levels} (levels={levels});"
                " pad the images or use fewer levels."
            )
        if len(patch_sizes) != len(codebook_sizes) or not 1 <= len(patch_sizes) <= levels + 1:
            raise ValueError(
                f"patch_sizes={list(patch_sizes)} and codebook_sizes={list(codebook_sizes)} must have the same length,"
                f" between 1 and levels + 1 = {levels + 1}: one entry per scale, coarse to fine."
            )
        scales: list[Scale] = []
        first_id = first_position = 0
        for index, (patch, codes) in enumerate(zip(patch_sizes, codebook_sizes, strict=True)):
            side = image_size // 2 ** (levels if index == 0 else levels - index + 1)
            if patch < 1 or side % patch:
                raise ValueError(
                    f"patch_sizes[{index}]={patch} does not divide the side {side} of scale {index}; choose a divisor."
                )
            if codes < 2:
                raise ValueError(f"codebook_sizes[{index}]={codes} must be at least 2.")
            scale = Scale(num_channels * (1 if index == 0 else 3), side, patch, codes, first_id, first_position)
            first_id, first_position = first_id + codes, first_position + scale.tokens
            scales.append(scale)
        return cls(tuple(scales))


__all__ = ["Scale", "TokenLayout"]
