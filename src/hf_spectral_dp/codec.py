"""Subbands to discrete tokens and back: a frozen vector quantiser in the wavelet domain, one codebook per scale.

Because the transform is orthonormal, the squared error of the image is the sum of the squared errors of the patches,
so quantising every scale on its own with its own codebook loses nothing against quantising them jointly in sequence.
Codebooks are fitted on PUBLIC images only (`fit`) and never change afterwards; encoding a private image is then a
per-image map and touches no other image.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor, nn

from .configuration_spectral import SpectralConfig
from .layout import Scale
from .wavelets import Detail, Subbands, approximation, dwt2, idwt2


@lru_cache(maxsize=256)
def _patch_order(scale: Scale) -> Tensor:
    """Where in flattened bands (channels, side, side) the elements of the patches lie, patch by patch, row by row."""
    g, p = scale.grid, scale.patch
    places = torch.arange(scale.channels * scale.side**2).reshape(scale.channels, g, p, g, p)
    return places.permute(1, 3, 0, 2, 4).flatten()


def _patches(bands: Tensor, scale: Scale) -> Tensor:
    """(B, channels, side, side) to (B, tokens, patch_dim): one selection, ten times as fast as permuting on a CPU."""
    order = _patch_order(scale).to(bands.device)
    return bands.flatten(1).index_select(1, order).view(-1, scale.tokens, scale.patch_dim)


def _bands(patches: Tensor, scale: Scale) -> Tensor:
    """Inverse of `_patches`."""
    order = _patch_order(scale).argsort().to(patches.device)
    return patches.flatten(1).index_select(1, order).view(-1, scale.channels, scale.side, scale.side)


def _argmin(scores: Tensor) -> Tensor:
    """Argmin over the last dimension. On a CPU by NumPy, whose loop is vectorised, eight times as fast."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmin(-1))
    return scores.argmin(-1)


class SpectralCodec(nn.Module):
    """Images in [-1, 1] to coarse-to-fine token ids and back. Has buffers only, no trainable parameters.

    The token ids of scale k lie in `[first_id, first_id + codes)` of that scale in `config.layout`.
    """

    def __init__(self, config: SpectralConfig):
        super().__init__()
        self.config = config
        self.layout = config.layout
        for index, scale in enumerate(self.layout.scales):
            self.register_buffer(f"codebook_{index}", torch.zeros(scale.codes, scale.patch_dim))

    def codebook(self, index: int) -> Tensor:
        """(codes, patch_dim) code words of scale `index`, in units of orthonormal wavelet coefficients."""
        return self.get_buffer(f"codebook_{index}")

    def patches(self, images: Tensor) -> list[Tensor]:
        """Unquantised patches per scale, each (B, tokens, patch_dim), of images (B, C, image_size, image_size)."""
        size, channels = self.config.image_size, self.config.num_channels
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; this codec takes (B, {channels}, {size}, {size})."
            )
        unused = self.config.levels - len(self.layout.scales) + 1  # finest levels, whose details have no tokens
        low = approximation(images, unused, self.config.wavelet)
        stacks = [low]
        if unused < self.config.levels:
            bands = dwt2(low, self.config.levels - unused, self.config.wavelet)
            stacks = [bands.approximation, *(torch.cat(detail, dim=1) for detail in bands.details)]
        return [_patches(stack, scale) for stack, scale in zip(stacks, self.layout.scales, strict=True)]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Nearest code words of images (B, C, image_size, image_size) in [-1, 1]: LongTensor (B, layout.length)."""
        with torch.autocast(images.device.type, enabled=False):  # half precision would change the tokens
            return self.quantise(self.patches(images.float()))

    @torch.no_grad()
    def quantise(self, patches: list[Tensor]) -> Tensor:
        """Nearest code words of float32 patches, per scale (B, tokens, patch_dim): LongTensor (B, layout.length)."""
        tokens = []
        for index, (points, scale) in enumerate(zip(patches, self.layout.scales, strict=True)):
            code_words = self.codebook(index).float()
            # argmin |x - c|^2 = argmin |c|^2 / 2 - <x, c>: one matrix product instead of a distance table.
            scores = torch.addmm(code_words.square().sum(1) / 2, points.flatten(0, 1), code_words.T, alpha=-1)
            tokens.append(_argmin(scores).view(points.shape[:2]) + scale.first_id)
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Image of a token sequence or of any prefix of it; missing tokens count as zero coefficients.

        Args:
            tokens: LongTensor (B, t), 0 <= t <= layout.length; each id inside its position's scale.

        Returns:
            (B, C, coarse_size, coarse_size) in [-1, 1].

        Raises:
            ValueError: too many tokens, or an id that does not belong to the scale of its position.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.layout.length:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, at most {self.layout.length}).")
        stacks = []
        for index, scale in enumerate(self.layout.scales):
            ids = tokens[:, scale.first_position : scale.first_position + scale.tokens] - scale.first_id
            if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < scale.codes):
                raise ValueError(
                    f"a token of scale {index} lies outside [{scale.first_id}, {scale.first_id + scale.codes});"
                    " tokens must come from this codec's encode or this model's sample."
                )
            code_words = self.codebook(index).float()
            patches = code_words.new_zeros(tokens.shape[0], scale.tokens, scale.patch_dim)
            patches[:, : ids.shape[1]] = code_words[ids]
            stacks.append(_bands(patches, scale))
        details = tuple(Detail(*stack.chunk(3, dim=1)) for stack in stacks[1:])
        with torch.autocast(tokens.device.type, enabled=False):
            low = idwt2(Subbands(stacks[0], details, self.config.wavelet))
        # Orthonormal LL grows twofold per level; back to the range of pixels.
        return (low / (self.config.image_size // self.config.coarse_size)).clamp(-1, 1)

    @torch.no_grad()
    def fit(self, images: Tensor, seed: int = 0) -> dict[str, list[float]]:
        """Fits every codebook by k-means (Lloyd) on PUBLIC images (N, C, image_size, image_size) in [-1, 1].

        Returns:
            "relative_error": per scale, mean squared quantisation error over mean energy; "used": per scale, share
            of code words that at least one patch uses.

        Raises:
            ValueError: fewer patches than code words in a scale.
        """
        from sklearn.cluster import MiniBatchKMeans

        report: dict[str, list[float]] = {"relative_error": [], "used": []}
        for index, (patches, scale) in enumerate(zip(self.patches(images.float()), self.layout.scales, strict=True)):
            points = patches.flatten(0, 1).cpu().numpy()
            if len(points) < scale.codes:
                raise ValueError(
                    f"{len(points)} patches cannot fill codebook_sizes[{index}]={scale.codes}; give more images."
                )
            means = MiniBatchKMeans(scale.codes, random_state=seed, batch_size=8192, n_init=1, max_iter=60)
            assigned = means.fit_predict(points)
            self.codebook(index).copy_(torch.from_numpy(means.cluster_centers_))
            error, energy = ((points - means.cluster_centers_[assigned]) ** 2).sum(), (points**2).sum()
            report["relative_error"].append(float(error / energy) if energy else 0.0)
            report["used"].append(len(set(assigned.tolist())) / scale.codes)
        return report


def codec_fingerprint(codec: nn.Module) -> str:
    """SHA-256 (hex) of a codec's buffers: names, shapes and float32 values. Two equal codecs give equal tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


__all__ = ["SpectralCodec", "codec_fingerprint"]
