"""What all test files start from: one thread, no network, the examples at hand, a tiny model with a usable codec."""

import io
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # last: a script there is called evaluate, like a library

import numpy as np
import pytest
import torch
from PIL import Image

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"

torch.set_num_threads(1)


def tiny_model(num_channels: int = 1, num_classes: int = 10) -> SpectralTokenizerForCausalLM:
    """A model for 16x16 images, T = 12 tokens, with random code words on the scale of wavelet coefficients."""
    config = SpectralConfig(
        image_size=16,
        num_channels=num_channels,
        levels=2,
        patch_sizes=[2, 2, 4],
        codebook_sizes=[16, 16, 16],
        num_classes=num_classes,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SpectralTokenizerForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        model.codec.codebook(index).normal_(std=2.0, generator=generator)
    return model


def one_private(folder: Path, private: str, *public: str) -> list[str]:
    """Options of a script that name models in a folder: one that a private run made, public ones for the others."""
    for name, runs in (("public", None), ("private", ["ab" * 32])):
        model = tiny_model()
        model.config.private_runs = runs
        model.save_pretrained(folder / name)
    named = dict.fromkeys(public, folder / "public") | {private: folder / "private"}
    return [str(word) for pair in named.items() for word in pair]


def wild(model: SpectralTokenizerForCausalLM, std: float = 0.4) -> SpectralTokenizerForCausalLM:
    """Weights large enough that every token, position and condition moves every later logit."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def sequences(model: SpectralTokenizerForCausalLM, rows: int = 4, seed: int = 0) -> torch.Tensor:
    """Legal sequences (rows, 1 + length) with random start tokens, made without the model's own sampling."""
    generator = torch.Generator().manual_seed(seed)
    layout, vocabulary = model.config.layout, model.config.vocab_size
    columns = [torch.randint(layout.codes, vocabulary, (rows,), generator=generator)]
    for scale in (layout.scales[index] for index in layout.scale_of_position):
        columns.append(torch.randint(scale.first_id, scale.first_id + scale.codes, (rows,), generator=generator))
    return torch.stack(columns, dim=1)


def encoded(levels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file of these levels."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def grey_model() -> SpectralTokenizerForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def colour_model() -> SpectralTokenizerForCausalLM:
    return tiny_model(num_channels=3, num_classes=0)


@pytest.fixture
def random_images() -> np.ndarray:
    """Forty uint8 images (40, 20, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (40, 20, 24, 3), dtype=np.uint8)
