"""Noise: the right law on every kind of tensor, and a stream that no seed, fork, pickle or copy gives twice."""

import copy
import os
import pickle
import random

import numpy as np
import pytest
import torch
from randomgen import AESCounter
from scipy import stats

from hf_spectral_dp.privacy import noise
from hf_spectral_dp.privacy.noise import (
    _TWISTER_START,
    _TWISTER_WORDS,
    GaussianNoise,
    _keyed_state,
    describe_randomness,
    noise_source,
    secret_coins,
    system_generator,
)


def fixed(key: int) -> np.random.Generator:
    """Makes a statistical test repeatable."""
    return np.random.Generator(AESCounter(key=key))


@pytest.fixture(params=["AES", "ChaCha20"])
def cipher(request, monkeypatch):
    """Both ciphers, whatever this processor prefers."""
    monkeypatch.setattr(
        noise, "_cipher", lambda: {"AES": noise._AesCounter, "ChaCha20": noise._ChaCha20}[request.param]
    )


@pytest.fixture
def philox(monkeypatch):
    """The path of GPUs, on the CPU. There torch's generator is a Mersenne twister; all else is what a GPU runs."""
    monkeypatch.setattr(noise, "_PHILOX_DEVICES", ("cpu",))


def defects(drawn: np.ndarray) -> list[str]:
    """What is wrong with a million standard normals. A right generator fails once in a million runs."""
    found = {
        "deviation": abs(drawn.std() - 1) >= 0.005,  # seven standard errors of 1 / sqrt(2e6)
        "mean": abs(drawn.mean()) >= 0.005,
        "law": stats.kstest(drawn, "norm").pvalue <= 1e-6,
        "tails": not 4.2 < np.abs(drawn).max() < 7.1,  # expected 4.9, P(outside) < 1e-6
        "repetition": len(np.unique(drawn)) < 0.9 * len(drawn),
    }
    return [name for name, wrong in found.items() if wrong]


def million(mechanism: GaussianNoise) -> np.ndarray:
    tensor = torch.zeros(1000, 1000, dtype=torch.float64)
    mechanism.add_([tensor])
    return tensor.flatten().numpy() / mechanism.standard_deviation


def test_the_default_passes_every_statistic(cipher):
    assert defects(million(GaussianNoise(2.0))) == []


def test_the_path_of_gpus_passes_every_statistic(philox):
    assert defects(million(GaussianNoise(2.0))) == []


@pytest.mark.parametrize(
    "broken, caught",
    [
        (lambda values: values * 0.99, "deviation"),
        (lambda values: values + 0.01, "mean"),
        (lambda values: values.clip(-3, 3), "tails"),
        (lambda values: np.sign(values) * stats.norm.ppf(0.5 + np.abs(values) % 0.5), "law"),
        (lambda values: np.random.default_rng(0).laplace(size=len(values)) / np.sqrt(2), "law"),
        (lambda values: np.tile(values[:10_000], 100), "repetition"),
        (lambda values: values.astype(np.float16), "repetition"),
    ],
)
def test_a_broken_generator_does_not(broken, caught):
    assert caught in defects(np.asarray(broken(million(GaussianNoise(1.0, generator=fixed(6)))), np.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standard_deviation", [1e-3, 1.0, 250.0])
def test_a_million_draws_are_gaussian(dtype, standard_deviation):
    tensor = torch.zeros(1000, 1000, dtype=dtype)
    GaussianNoise(standard_deviation, generator=fixed(1)).add_([tensor])
    drawn = tensor.double().flatten().numpy() / standard_deviation
    assert abs(drawn.std() - 1) < 0.005  # seven standard errors of 1 / sqrt(2e6)
    assert abs(drawn.mean()) < 0.005
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert 4.3 < np.abs(drawn).max() < 6.5  # the tails are there; expected 4.9, P(outside) < 1e-4


def test_entries_tensors_and_calls_are_independent(monkeypatch):
    """Chunks of 1000 values, so that reuse across a chunk would show."""
    monkeypatch.setattr(noise, "_CHUNK", 1000)
    tensors, mechanism = [torch.zeros(100, 700), torch.zeros(70_000)], GaussianNoise(1.0, generator=fixed(2))
    mechanism.add_(tensors)
    again = torch.zeros(70_000)
    mechanism.add_([again])
    drawn = torch.cat([tensors[0].flatten(), tensors[1], again])
    assert len(drawn.unique()) > 0.98 * len(drawn)  # chance equals of float32 values, no repeated chunk
    for lag in (1, 500, 1000, 70_000):
        correlation = (drawn[lag:] * drawn[:-lag]).mean().item()
        assert abs(correlation) < 5 / np.sqrt(len(drawn) - lag)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_every_entry_is_noised_once_whatever_shape_and_strides(chunk, monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    base, table = torch.arange(240.0), torch.zeros(24, 10)
    tensors = [
        base.clone().view(2, 3, 40).transpose(0, 2),
        table[:, ::3],
        base.clone().view(1, 240, 1),
        torch.tensor(3.0),
        torch.zeros(0, 5),
        torch.nn.Parameter(base.clone()),
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    GaussianNoise(1.0, generator=fixed(3)).add_(tensor for tensor in tensors)
    for old, new in zip(before, tensors, strict=True):
        difference = (new.detach() - old).flatten()
        assert (difference != 0).all()
        # A second helping of noise, or none, would show in 240 values; 25 % is 5 standard errors.
        assert difference.numel() < 240 or abs(difference.std().item() - 1) < 0.25
    assert not table[:, 1::3].any()  # what lies between the strides belongs to another tensor


def test_the_sum_is_rounded_once():
    """The float64 sum to the nearest float32; noise rounded before it is added gives other values."""
    tensor = torch.full((1000,), 1 / 3)
    GaussianNoise(1.0, generator=fixed(4)).add_([tensor])
    added = torch.from_numpy(fixed(4).standard_normal(1000))
    assert torch.equal(tensor, (torch.full((1000,), 1 / 3).double() + added).float())
    assert not torch.equal(tensor, torch.full((1000,), 1 / 3) + added.float())


def test_zero_noise_changes_nothing():
    tensor = torch.randn(100)
    expected = tensor.clone()
    GaussianNoise(0.0).add_([tensor])
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("standard_deviation", [-1.0, float("inf"), float("nan")])
def test_an_impossible_deviation_is_refused(standard_deviation):
    with pytest.raises(ValueError, match=f"standard_deviation={standard_deviation}"):
        GaussianNoise(standard_deviation)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, 3).to_sparse(),  # noise on the stored entries alone would publish which rows were touched
        None,
    ],
)
def test_a_tensor_that_cannot_hold_noise_is_refused_before_any_is_changed(wrong):
    good = torch.zeros(3)
    with pytest.raises(TypeError, match=r"tensors\[1\].*float32"):
        GaussianNoise(1.0).add_([good, wrong])
    assert torch.equal(good, torch.zeros(3))


def test_one_value_in_many_places_is_refused():
    """An expanded tensor would carry one noise for all its entries."""
    with pytest.raises(RuntimeError, match="single memory location"):
        GaussianNoise(1.0).add_([torch.zeros(1).expand(5)])


def test_no_seed_reaches_the_noise(cipher):
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        tensor = torch.zeros(50)
        GaussianNoise(1.0).add_([tensor])
        drawn.append(tensor)
    assert not (drawn[0] == drawn[1]).any()


def test_the_global_generators_are_left_alone():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    GaussianNoise(1.0).add_([torch.zeros(100)])
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_every_generator_has_its_own_stream(cipher):
    draws = {system_generator().bytes(16) for _ in range(200)}
    assert len(draws) == 200


def test_a_key_is_at_least_128_bits_of_the_operating_system(cipher, monkeypatch):
    asked = []
    monkeypatch.setattr(noise.os, "urandom", lambda size: asked.append(size) or b"\1" * size)
    same = [system_generator().bytes(16) for _ in range(2)]
    assert same[0] == same[1]  # the key is all there is: nothing else feeds the stream
    assert len(asked) == 2 and min(asked) >= 16


def test_every_bit_of_the_key_counts(cipher, monkeypatch):
    streams = set()
    for bit in range(128):
        monkeypatch.setattr(noise.os, "urandom", lambda size, bit=bit: (1 << bit).to_bytes(size, "little"))
        streams.add(system_generator().bytes(16))
    assert len(streams) == 128


@pytest.mark.parametrize(
    ("bit_generator", "published"),
    [
        # FIPS 197 (AES-128, key and block zero) and RFC 8439, Appendix A.1 (ChaCha20, key, nonce and counter zero).
        (noise._AesCounter, "66e94bd4ef8a2c3b884cfa59ca342b2e"),
        (noise._ChaCha20, "76b8e0ada0f13d90405d6ae55386bd28"),
    ],
)
def test_the_ciphers_are_the_published_ones(bit_generator, published):
    assert bit_generator(key=0).random_raw(2).astype("<u8").tobytes().hex() == published


def test_without_aes_in_hardware_chacha_is_used(monkeypatch):
    class SoftwareAes:
        use_aesni = False

        def __init__(self, key):
            pass

    monkeypatch.setattr(noise, "AESCounter", SoftwareAes)
    assert type(system_generator().bit_generator) is noise._ChaCha20
    assert describe_randomness()["generator"].startswith("ChaCha20")


@pytest.mark.parametrize("method", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_secrets_are_never_written_down_or_duplicated(cipher, method):
    generator = system_generator()
    for secret in (generator, generator.bit_generator, GaussianNoise(1.0)):
        # A shallow copy of the mechanism shares its generator, so no stream is drawn twice.
        if method is copy.copy and isinstance(secret, GaussianNoise):
            assert copy.copy(secret)._generator is secret._generator
            continue
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            method(secret)
    for name in ("__reduce__", "__getstate__"):
        with pytest.raises(TypeError, match="cannot be pickled"):
            getattr(generator, name)()


def test_a_forked_child_draws_another_stream(cipher):
    mechanism, control = GaussianNoise(1.0), fixed(5)
    mechanism.add_([torch.zeros(3)])  # leaves buffered bits behind, which a child must not use either

    def draw() -> bytes:
        tensor = torch.zeros(8, dtype=torch.float64)
        mechanism.add_([tensor])
        return tensor.numpy().tobytes() + control.bytes(16)

    streams = []
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, draw())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            streams.append(pipe.read())
        assert os.waitpid(child, 0)[1] == 0
    streams.append(draw())
    values = np.array([np.frombuffer(stream[:64]) for stream in streams])
    assert len(np.unique(values)) == values.size
    assert len({stream[64:] for stream in streams}) == 1  # an ordinary generator repeats itself: the test can see it


def test_only_a_gpu_without_secure_mode_is_left_to_philox():
    assert noise_source("cuda") == noise_source("cuda:3") == "philox"
    for device, secure_mode in (("cpu", False), ("cpu", True), ("cuda", True), ("mps", False), ("xpu", False)):
        assert noise_source(device, secure_mode) == "cipher"


def test_every_call_has_its_own_key_of_64_bits_on_a_gpu(philox, monkeypatch):
    asked = []
    monkeypatch.setattr(noise.os, "urandom", lambda size: asked.append(size) or bytes([len(asked)]) * size)
    mechanism = GaussianNoise(1.0)
    asked.clear()
    drawn = [torch.zeros(20, dtype=torch.float64) for _ in range(4)]
    mechanism.add_(drawn[:2])
    mechanism.add_(drawn[2:])
    assert asked == [8, 8]  # one key for all tensors of a call, so one stream and no repetition
    assert len(torch.stack(drawn).unique()) == 80
    again = torch.zeros(20, dtype=torch.float64)
    asked.clear()
    mechanism.add_([again])
    assert torch.equal(again, drawn[0])  # the key is all there is: nothing else feeds the stream, no state remains


def test_no_seed_reaches_the_noise_of_a_gpu_and_none_is_left_behind(philox):
    drawn, states = [], []
    for _ in range(2):
        torch.manual_seed(0)
        tensor = torch.zeros(50)
        GaussianNoise(1.0).add_([tensor])
        drawn.append(tensor)
        states.append(torch.get_rng_state())
    assert not (drawn[0] == drawn[1]).any()
    assert torch.equal(states[0], torch.manual_seed(0).get_state())
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(GaussianNoise(1.0))


def test_strides_chunks_and_rounding_on_the_path_of_gpus(philox, monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", 7)
    table = torch.zeros(24, 10)
    GaussianNoise(1.0).add_([table[:, ::3]])
    assert (table[:, ::3] != 0).all() and not table[:, 1::3].any()
    assert len(table[:, ::3].unique()) == 96


def test_noise_for_another_device_is_refused_before_any_is_drawn():
    """The report names what drew the noise; it must not be wrong about it."""
    good = torch.zeros(3)
    with pytest.raises(TypeError, match=r"tensors\[0\] lies on cpu, but the noise was announced for cuda"):
        GaussianNoise(1.0, device="cuda").add_([good])
    assert torch.equal(good, torch.zeros(3))


def test_the_description_is_plain_text():
    for source in ("cipher", "philox"):
        description = describe_randomness(source)
        assert set(description) == {"generator", "key", "sampling", "arithmetic", "known_limit"}
        assert all(isinstance(value, str) for value in description.values())
        assert "randomgen" in description["sampling"] and "Mironov" in description["known_limit"]
        assert ("randomgen" in description["generator"]) == (source == "cipher")
    assert "not a cryptographic generator" in description["generator"] and "64 bits" in description["key"]


def test_what_a_model_draws_is_secret_and_leaves_the_seeded_generator_alone():
    """Two steps under one seed draw other coins; what the seed gives afterwards is as if there had been none."""


    def seeded() -> None:
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)

    def rest() -> list[float]:
        return [float(torch.rand(())), np.random.rand(), random.random()]

    drawn = []
    for _ in range(2):
        seeded()
        with secret_coins():
            drawn.append(torch.rand(2000).tolist())
            drawn.append(np.random.rand(2000))
            drawn.append([random.random() for _ in range(2000)])
        after = rest()
    seeded()
    assert rest() == after
    relations = np.corrcoef(np.array(drawn)) - np.eye(6)  # also between the three, whose keys must not be one
    assert np.abs(relations).max() < 6 / 2000**0.5
    for some in drawn:  # uniform: five standard errors
        assert abs(np.mean(some) - 0.5) < 5 * 12**-0.5 / 2000**0.5


def test_the_state_of_the_generator_is_laid_out_as_assumed():
    """The key fills every word that a seed decides, and nothing else; the seed itself is only noted in the first."""
    states = [torch.Generator().manual_seed(85899347 * seed).get_state() for seed in range(50)]
    differ = torch.stack([state != states[0] for state in states]).any(0)
    words = slice(_TWISTER_START, _TWISTER_START + 8 * _TWISTER_WORDS)
    assert differ[words].view(-1, 8)[:, :4].all() and not differ[words].view(-1, 8)[:, 4:].any()
    assert not differ[words.stop :].any() and not differ[8 : words.start].any()
    keyed = _keyed_state(system_generator())
    assert (keyed[words].view(-1, 8)[:, :4] != states[0][words].view(-1, 8)[:, :4]).any(1).all()
    assert torch.equal(torch.Generator().get_state()[words.stop :], keyed[words.stop :])
