"""Prompts in the pipeline: encoded by its own encoder, in order, reproducibly, and refused where they cannot work."""

import pytest
import torch
from text_parts import SLOTS, minilm, text_encoder, text_model

from hf_spectral_dp import DPSpectralPipeline, SpectralImageProcessor, modeling_spectral
from hf_spectral_dp.text_encoder import encode_text, load_text_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def model():
    """Text that moves the images."""
    model = text_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(0))
    return model


def pipeline(model, encoder=(None, None), **stored) -> DPSpectralPipeline:
    pipe = DPSpectralPipeline(model, SpectralImageProcessor(image_size=16, num_channels=3), None, *encoder, **stored)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, *arguments, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(*arguments, generator=generator, output_type="latent", **options).images


@pytest.fixture
def asked(model, monkeypatch) -> list[dict]:
    """What `sample` was asked for, checks without tokens left out."""
    calls, sample = [], model.sample

    def record(*arguments, **options):
        if options.get("num_tokens") != 0:
            calls.append(options)
        return sample(*arguments, **options)

    monkeypatch.setattr(model, "sample", record)
    return calls


def test_prompts_come_in_order_each_so_often_in_batches(model, encoder, asked):
    pipe = pipeline(model, encoder)
    images = pipe(
        ["red", "a blue square"], num_images_per_prompt=3, batch_size=4, guidance_scale=2.0,
        negative_prompt=["", "green"], output_type="latent",
    ).images  # fmt: skip
    assert images.shape == (6, 3, 16, 16) and [len(call["text_states"]) for call in asked] == [4, 2]
    for name, texts in (("text_states", ["red", "a blue square"]), ("negative_text_states", ["", "green"])):
        states = torch.cat([call[name] for call in asked])
        assert torch.equal(states, encode_text(*encoder, texts, SLOTS).repeat_interleave(3, 0))


def test_one_prompt_is_a_list_of_one_and_one_negative_prompt_is_for_all(model, encoder, asked):
    pipe = pipeline(model, encoder, guidance_scale=2.0)
    one = latents(pipe, "red", negative_prompt="blue")
    assert torch.equal(one, latents(pipe, ["red"], negative_prompt=["blue"]))
    assert torch.equal(latents(pipe, ["red", "green"], negative_prompt="blue")[:1].isfinite(), one.isfinite())
    assert torch.equal(asked[-1]["negative_text_states"], encode_text(*encoder, ["blue"] * 2, SLOTS))
    assert asked[-1]["guidance_scale"] == 2.0
    assert torch.equal(latents(pipe, "red", num_images=3), latents(pipe, "red", num_images_per_prompt=3))


def test_the_generator_decides_the_images_and_the_prompt_changes_them(model, encoder):
    pipe = pipeline(model, encoder)
    first = latents(pipe, ["red"] * 4)
    assert torch.equal(first, latents(pipe, ["red"] * 4)) and not torch.equal(first, latents(pipe, ["red"] * 4, seed=1))
    assert not torch.equal(first, latents(pipe, ["a blue square"] * 4))
    nothing = latents(pipe, [""] * 4)
    assert torch.equal(nothing, latents(pipe, num_images=4))  # an empty prompt is no condition
    assert torch.equal(
        latents(pipe, ["red"], guidance_scale=2.0, negative_prompt=""), latents(pipe, ["red"], guidance_scale=2.0)
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": ["red", "blue"], "negative_prompt": ["green"]}, "1 negative prompts for 2 prompts"),
        ({"prompt": "red", "class_labels": 1}, "class_labels and text_states are both given"),
        ({"negative_prompt": "red"}, "negative_prompt='red' needs a prompt"),
        ({"prompt": "red", "negative_prompt": "blue"}, "guidance_scale=1.0.*guidance_scale=3"),
        ({"prompt": []}, r"prompt=\[\].*non-empty lists of text"),
        ({"prompt": ["red", 3]}, r"prompt=\['red', 3\]"),
        ({"prompt": 3}, "prompt=3 and negative_prompt=None must be text"),
        ({"prompt": "red", "num_images": 2, "num_images_per_prompt": 3}, "two names of one"),
        ({"prompt": "red", "num_images_per_prompt": 0}, "num_images=0"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0.*class_labels or text_states"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(model, encoder, monkeypatch, inputs, message):
    monkeypatch.setattr(modeling_spectral, "draw", lambda *_: pytest.fail("a token was drawn"))
    with pytest.raises(ValueError, match=message):
        pipeline(model, encoder)(**inputs)


def test_missing_and_foreign_parts_are_named(model, encoder, tmp_path):
    pipe = pipeline(model)
    assert pipe(num_images=1).images[0].size == (16, 16)  # without a prompt nothing is missing
    with pytest.raises(ValueError, match="text_encoder=None.*load_text_encoder"):
        pipe("red")
    with pytest.raises(ValueError, match="tokenizer=None"):
        pipeline(model, (encoder[0], None))
    with pytest.raises(ValueError, match="hidden_size=8 but the model has text_width=12"):
        pipeline(text_model(text_width=12), encoder)
    with pytest.raises(ValueError, match=r"hidden_size=8 but the model has text_width=0 \(no text\)"):
        pipeline(text_model(text_width=0), encoder)
    with pytest.raises(ValueError, match="prompt='red', but the model has conditioning='none'.*class_labels"):
        pipeline(text_model(text_width=0))("red")
    with pytest.raises(ValueError, match="guidance_scale=3.0.*text_dropout=0"):
        pipeline(text_model(text_dropout=0.0), encoder)("red", guidance_scale=3.0)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_saved_and_loaded_with_its_encoder(model, kind, tmp_path):
    encoder = text_encoder(tmp_path / "encoder", kind)
    pipe = pipeline(model, encoder, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "pipe")
    again = DPSpectralPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.text_encoder) is type(encoder[0])
    prompts = ["red", "a blue square"]
    assert torch.equal(latents(again, prompts), latents(pipe, prompts))
    bare = DPSpectralPipeline.from_pretrained(tmp_path / "pipe", text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="text_encoder=None"):
        bare("red")


def test_offloading_changes_nothing(model, encoder):
    pipe = pipeline(model, encoder)
    expected = latents(pipe, ["red", "green"])
    pipe.enable_model_cpu_offload(device="cpu")  # the same hooks as on an accelerator
    assert torch.equal(latents(pipe, ["red", "green"]), expected)


def test_the_real_encoder_goes_the_whole_way(tmp_path):
    encoder = load_text_encoder(minilm())
    pipe = pipeline(text_model(text_width=384, max_text_tokens=8), encoder)
    pipe.save_pretrained(tmp_path / "pipe")
    again = DPSpectralPipeline.from_pretrained(tmp_path / "pipe")
    prompts = ["a painting of a red fox in the snow, oil on canvas", "smiling"]
    assert torch.equal(latents(again, prompts), latents(pipe, prompts))
