"""Gaussian noise that nobody can subtract: drawn by a generator whose key only the operating system ever knew.

Threat model. The adversary sees everything that is published (weights, card, logs, code, every `seed`), may know all
training rows but one, and has unlimited time for statistics. It does not read the memory of the training process,
measure its timing, or break AES-128 or ChaCha20. Under that model the noise must be unpredictable, so:

* the bits come from a CSPRNG keyed with at least 128 bits of `os.urandom`; no seed reaches it, so neither
  `set_seed(42)` nor a guessed `rng_state.pth` reproduces the noise;
* the key is never written: generators refuse to be pickled or copied, and a resumed run draws a new key, because the
  same noise on another gradient would cancel by subtraction;
* a forked child is re-keyed, since parent and child would otherwise draw the same noise (forks made by `os.fork`,
  as `multiprocessing` makes them; a C library that forks by itself and then runs Python goes unnoticed).

On a GPU the default is weaker, and the privacy report says so: the noise comes from torch's Philox4x32-10, a fast
counter-based generator that was made for statistics and not against an adversary. Its key has 64 bits, fresh from
`os.urandom` for every step and dropped after it, and its draws are independent standard normals as far as anybody
knows. The adversary must then neither distinguish Philox from random bits nor try 2^64 keys, for each step again.
`secure_mode` draws on the CPU by the cipher instead, as is done for every device but a GPU in any case. Which rows
enter a batch is always decided by the cipher.

Known limit: floating-point numbers cannot represent a continuous Gaussian, and the gaps between those that occur may
tell sums apart (Mironov, CCS 2012). Drawing and adding in float64 and rounding once to the tensor's type narrows this;
it does not prove it away. The guarantee is that of the real-valued mechanism.
"""

import math
import os
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from randomgen import AESCounter, ChaCha
from torch import Tensor

_CHUNK = 1 << 20  # values drawn at once: 8 MiB of float64
_PHILOX_DEVICES = ("cuda",)  # where torch.Generator is Philox; on the CPU it is a Mersenne twister of a 32-bit seed
_TWISTER_WORDS, _TWISTER_START = 624, 24  # in the bytes of that generator's state, eight for each word


class _Secret:
    """Refuses every way in which Python writes down or duplicates an object."""

    def __reduce_ex__(self, protocol: Any = None) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds the key of the privacy noise and cannot be pickled or copied;"
            " call system_generator() where it is needed."
        )

    __reduce__ = __getstate__ = __reduce_ex__


class _AesCounter(_Secret, AESCounter):
    description = "AES-128 in counter mode"
    key_bytes = 16


class _ChaCha20(_Secret, ChaCha):
    description = "ChaCha20"
    key_bytes = 32


class _SystemGenerator(_Secret, np.random.Generator):
    """A `numpy.random.Generator` with a key of the operating system, which it changes after a fork."""

    def __init__(self) -> None:
        super().__init__(_cipher()(key=0))
        self.rekey()
        _generators.add(self)

    def rekey(self) -> None:
        cipher: Any = self.bit_generator
        cipher.seed(key=int.from_bytes(os.urandom(cipher.key_bytes), "little"), counter=0)


_generators: "weakref.WeakSet[_SystemGenerator]" = weakref.WeakSet()


def _rekey_all() -> None:
    for generator in _generators:
        generator.rekey()


os.register_at_fork(after_in_child=_rekey_all)


def _cipher() -> type:
    """AES where the processor has it in hardware: randomgen's software AES is slow and leaks timing, ChaCha20 not."""
    return _AesCounter if AESCounter(key=0).use_aesni else _ChaCha20


def system_generator() -> np.random.Generator:
    """A new generator for secrets: noise and sampling. Every call has its own key of >= 128 bits from `os.urandom`.

    It cannot be seeded, pickled or copied (TypeError), and draws another stream in a forked child.
    """
    return _SystemGenerator()


@contextmanager
def secret_coins(device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, what draws from the global generators of torch, NumPy and Python is keyed anew by the operating system.

    That is what dropout and random augmentation do. Trainers seed these generators with a public number, and one row
    less moves the coins of all rows behind it: for whoever knows the seed more than one row's share of a sum changes.

    Formal guarantee: coins drawn inside are secret, independent, and of one law for all rows, whatever place a row has.
    Let them be drawn first: given these, a row is one fixed function of the weights, so what holds for a step given its
    coins holds for the mixture, by joint convexity. Assumptions: every number is drawn for one row, since which rows
    of a step share another one depends on their number (`PerExampleClipper.check_coins`); and, as for noise on a GPU,
    these generators look random to the adversary, though none is cryptographic. On a GPU the key has 64 bits; on a CPU
    the whole state comes from the cipher.

    Args:
        device: where the model computes. All generators go on afterwards as if nothing had been drawn.
    """
    place = torch.device(device)
    others, kind = ([], None) if place.type == "cpu" else ([place], place.type)
    numpys, pythons, keys = np.random.get_state(), random.getstate(), system_generator()
    with torch.random.fork_rng(others, device_type=kind):  # the CPU's generator always
        torch.set_rng_state(_keyed_state(keys))
        np.random.set_state(("MT19937", _words(keys).astype(np.uint32), _TWISTER_WORDS, 0, 0.0))
        random.setstate((pythons[0], (*_words(keys).tolist(), _TWISTER_WORDS), None))
        if kind is not None:
            module = torch.get_device_module(kind)
            with module.device(place) if hasattr(module, "device") else nullcontext():  # its own, not the current one's
                module.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _words(keys: np.random.Generator) -> np.ndarray:
    """The state (624,) of a Mersenne twister, as uint64 below 2**32, all of it from the cipher."""
    return keys.integers(2**32, size=_TWISTER_WORDS, dtype=np.uint64)


def _keyed_state(keys: np.random.Generator) -> Tensor:
    """A state of torch's CPU generator, all of its words from the cipher; `manual_seed` would take 32 bits only."""
    state, words = torch.Generator().get_state(), _words(keys)
    state[_TWISTER_START : _TWISTER_START + words.nbytes] = torch.from_numpy(words.view(np.uint8))
    return state


def noise_source(device: torch.device | str = "cpu", secure_mode: bool = False) -> Literal["cipher", "philox"]:
    """What draws the noise of tensors on `device`: the cipher, or on a GPU without `secure_mode` torch's Philox."""
    return "philox" if torch.device(device).type in _PHILOX_DEVICES and not secure_mode else "cipher"


def describe_randomness(source: Literal["cipher", "philox"] = "cipher") -> dict[str, str]:
    """Where the randomness of noise and sampling comes from, in words for the privacy report.

    Args:
        source: what drew the noise, `GaussianNoise.source`.
    """
    cipher: Any = _cipher()
    generator = f"{cipher.description} (randomgen {metadata.version('randomgen')})"
    key = f"{8 * cipher.key_bytes} bits from os.urandom for every generator, process and resume; never saved"
    noise, noise_key = generator, key
    if source == "philox":
        noise = f"Philox4x32-10 on the GPU (torch {metadata.version('torch')}): fast, not a cryptographic generator"
        noise_key = "64 bits from os.urandom, new for every step; never saved"
    return {
        "generator": noise,
        "key": noise_key,
        "sampling": f"{generator}; key of {key}",
        "arithmetic": "noise drawn and added in float64, rounded once to the type of the gradient",
        "known_limit": "floating-point Gaussian (Mironov 2012): the guarantee is that of real-valued noise",
    }


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views that cover `tensor`, whatever its strides, with at most `_CHUNK` values each."""
    if tensor.numel() <= _CHUNK:
        yield tensor
    else:
        longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
        for half in tensor.tensor_split(2, dim=longest):
            yield from _pieces(half)


class GaussianNoise:
    """Adds independent N(0, standard_deviation^2) to every entry of tensors.

    Formal guarantee:
        Let f be a sum with L2 sensitivity C over all tensors of one call together, and let standard_deviation =
        noise_multiplier * C. Then f + noise is the Gaussian mechanism with that noise multiplier (Dwork and Roth 2014,
        Appendix A), for the adjacency in which C holds. Assumptions: every entry of f passes through `add_` exactly
        once, in one call on one rank; the generator is the default one; arithmetic is real-valued (see the module).
        With `source` "philox" it holds against an adversary who cannot tell Philox under a random 64-bit key from
        random bits; calls have independent keys, so that breaking one step's noise does not uncover another's.

    Args:
        standard_deviation: >= 0 and finite, in the unit of the tensors; 0 adds nothing (the non-private twin).
        device: where the tensors lie.
        secure_mode: draw by the cipher on every device, a GPU included.
        generator: for tests only. Left out, it is a `system_generator()`; anything else voids the guarantee.

    Attributes:
        source: "cipher" or "philox": what draws the noise, for `describe_randomness`.

    Raises:
        ValueError: standard_deviation is negative, infinite or not a number.
    """

    def __init__(
        self,
        standard_deviation: float,
        device: torch.device | str = "cpu",
        secure_mode: bool = False,
        generator: np.random.Generator | None = None,
    ):
        if not 0 <= standard_deviation < math.inf:
            raise ValueError(
                f"standard_deviation={standard_deviation} must be finite and >= 0; it is the noise multiplier of the"
                " plan times the clipping norm."
            )
        self.standard_deviation = float(standard_deviation)
        self.device = torch.device(device)
        self.source = noise_source(device, secure_mode)
        self._generator = system_generator() if generator is None else generator

    @torch.no_grad()
    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Adds fresh noise in place, drawn and added in float64, with the same law on any device.

        Args:
            tensors: dense float32 or float64 tensors of any shape and strides on `device`, each once. Memory beyond
                them is bounded by a few tens of MiB.

        Raises:
            TypeError: a tensor is not dense, of another type (half precision would round the noise away), or on another
                kind of device than the one that `source` was chosen for. All are checked before the first is changed.
        """
        tensors = list(tensors)
        for index, tensor in enumerate(tensors):
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            if not dense or tensor.dtype not in (torch.float32, torch.float64):
                kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"tensors[{index}] ({kind}) must be a dense float32 or float64 tensor; accumulate the clipped sum"
                    " in float32."
                )
            if tensor.device.type != self.device.type:
                raise TypeError(
                    f"tensors[{index}] lies on {tensor.device}, but the noise was announced for {self.device}; make a"
                    " GaussianNoise for that device."
                )
        draw = self._philox() if self.source == "philox" else self._cipher
        for tensor in tensors:
            for piece in _pieces(tensor):
                noise = draw(piece)
                piece.copy_(noise.mul_(self.standard_deviation).add_(piece.to(noise.device)))

    def _cipher(self, like: Tensor) -> Tensor:
        """Standard normals of the shape of a tensor, float64, on the CPU."""
        return torch.from_numpy(self._generator.standard_normal(like.numel())).view(like.shape)

    @staticmethod
    def _philox() -> Callable[[Tensor], Tensor]:
        """As `_cipher`, drawn where the tensor lies, by generators that live as long as one call and have its keys."""
        generators: dict[torch.device, torch.Generator] = {}

        def draw(like: Tensor) -> Tensor:
            if like.device not in generators:
                generators[like.device] = torch.Generator(like.device)
                generators[like.device].manual_seed(int.from_bytes(os.urandom(8), "little"))
            # float64 also because its uniforms reach far: normals from 32 bits end at 6.7 standard deviations.
            drawn = torch.empty(like.shape, dtype=torch.float64, device=like.device)
            return drawn.normal_(generator=generators[like.device])

        return draw


__all__ = ["GaussianNoise", "describe_randomness", "noise_source", "secret_coins", "system_generator"]
