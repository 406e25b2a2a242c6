"""Text from rows to prompts: a step sees what it should, the card says what it must, and prompts steer the images."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
import train
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from text_parts import CAPTIONS, SLOTS, WIDTH, text_encoder, text_model

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, DPTrainingArguments, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.text_encoder import encode_text
from hf_spectral_dp.token_store import build_token_store

PALETTE = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def drawn(caption: str) -> Picture.Image:
    """16x16 pixels of the caption's colour: a disc, a square or stripes on white."""
    _, colour, shape = caption.split()
    y, x = np.mgrid[:16, :16] - 7.5
    inside = {"circle": x**2 + y**2 < 42, "square": (abs(x) < 6) & (abs(y) < 6), "stripes": (y + 7.5) % 4 < 2}[shape]
    return Picture.fromarray(np.where(inside[..., None], PALETTE[colour], 255).astype(np.uint8))


def colour_of(image: Picture.Image) -> str:
    """The palette's colour that the darkest quarter of the pixels is nearest to."""
    pixels = np.asarray(image, dtype=float).reshape(-1, 3)
    mean = pixels[np.argsort(pixels.min(1))[:64]].mean(0)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(mean - PALETTE[name])))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def processor():
    return SpectralImageProcessor(image_size=16, num_channels=3)


def store_of(captions, folder, encoder, processor, model=None, **options):
    rows = [{"image": drawn(each[0] if isinstance(each, list) else each), "captions": each} for each in captions]
    return build_token_store(
        rows, model or text_model(), processor, folder, caption_column="captions", text_encoder=encoder[0],
        tokenizer=encoder[1], progress=False, **options,
    )  # fmt: skip


def arguments(folder, **options) -> DPTrainingArguments:
    plain = {"target_epsilon": 8.0, "expected_batch_size": 12, "max_steps": 3, "micro_batch_size": 5, "use_cpu": True}
    return DPTrainingArguments(
        output_dir=str(folder), **{**plain, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **options}
    )


# -- a step ------------------------------------------------------------------------------------------------------------


def test_a_step_sees_each_row_with_one_of_its_captions_or_none(encoder, processor, tmp_path):
    """Every row in every batch; half of the coins leave the text out, each for itself."""
    captions = [CAPTIONS[:3]] * 20
    model = text_model(text_dropout=0.5)
    store = store_of(captions, tmp_path / "store", encoder, processor, model)
    trainer = DPTrainer(
        model, arguments(tmp_path / "run", sampling_rate=1.0, expected_batch_size=None, max_steps=40), store
    )
    expected = torch.cat([encode_text(*encoder, CAPTIONS[:3], SLOTS), torch.zeros(1, SLOTS, WIDTH)]).flatten(1).float()
    trainer._apart = True  # nothing is looked at beforehand
    seen, losses = [], trainer._losses

    def watched(model, rows):
        distances = torch.cdist(rows["text_states"].flatten(1).float(), expected)
        assert (distances.amin(1) < 0.02).all()
        seen.extend(distances.argmin(1).tolist())
        return losses(model, rows)

    trainer._losses = watched
    trainer.train()
    counts = Counter(seen)
    # 800 draws: 400 without text, 133 for each caption; six deviations are 85 and 63.
    assert len(seen) == 800 and abs(counts[3] - 400) < 85 and all(abs(counts[i] - 133) < 63 for i in range(3))
    # The coins of one batch are no copies of each other, nor of the next one's.
    batches = np.array(seen).reshape(40, 20) == 3
    assert len({row.tobytes() for row in batches}) == 40 and len({row.tobytes() for row in batches.T}) == 20


def test_without_noise_the_step_is_the_clipped_mean_of_the_rows_shown(encoder, processor, tmp_path):
    model = text_model(text_dropout=0.0)
    store = store_of([[each] for each in CAPTIONS], tmp_path / "store", encoder, processor, model)
    trainer = DPTrainer(model, arguments(tmp_path / "run", sampling_rate=1.0, expected_batch_size=None), store)
    trainer._noise.add_ = lambda tensors: None
    taken = {}
    step = trainer.training_step

    def watched(*given, **options):
        result = step(*given, **options)
        if not taken:
            taken.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return result

    trainer.training_step = watched
    twin = text_model()
    rows = store[range(12)]
    sums = {name: torch.zeros_like(parameter) for name, parameter in twin.named_parameters()}
    for row in range(12):
        twin.zero_grad()
        some = {name: values[row : row + 1] for name, values in rows.items()}
        twin.per_example_loss(**some).sum().backward()
        norm = sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None) ** 0.5
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad * min(1.0, 1.0 / norm)
    trainer.train()
    for name, expected in sums.items():
        torch.testing.assert_close(taken[name], expected / 12, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_and_model_must_agree_on_text_before_anything_is_spent(encoder, processor, tmp_path):
    store = store_of([["a red circle"]] * 20, tmp_path / "store", encoder, processor)
    plain = build_token_store(
        [{"image": drawn("a red circle")}] * 20, text_model(text_width=0), processor, tmp_path / "plain", progress=False
    )
    for model, rows in (
        (text_model(text_width=0), store),
        (text_model(), plain),
        (text_model(max_text_tokens=4), store),
    ):
        with pytest.raises(ValueError, match=r"\(max_text_tokens, text_width\) = .*caption_column"):
            DPTrainer(model, arguments(tmp_path / "run"), rows)
    assert not (tmp_path / "run").exists()


def test_a_single_pass_takes_its_text_along(encoder, processor, tmp_path):
    store = store_of([[each] for each in CAPTIONS], tmp_path / "store", encoder, processor)
    args = arguments(tmp_path / "run", sampling="single_pass", expected_batch_size=6, max_steps=2)
    trainer = DPTrainer(text_model(text_dropout=0.0), args, store)
    trainer._apart = True
    shown, losses = [], trainer._losses
    trainer._losses = lambda model, rows: shown.append(rows["text_states"]) or losses(model, rows)
    trainer.train()
    assert torch.equal(torch.cat(shown), store[range(12)]["text_states"])


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> dict:
    """A config whose every part lies in tmp_path: 60 captioned images, a prior without text."""
    text_model(text_width=0).save_pretrained(tmp_path / "prior")
    SpectralImageProcessor(image_size=16, num_channels=3).save_pretrained(tmp_path / "prior")
    text_encoder(tmp_path / "encoder")
    (tmp_path / "data").mkdir()
    captions = [[CAPTIONS[index % 12], "a photo of a " + CAPTIONS[index % 12][2:]] for index in range(60)]
    features = Features({"image": Image(), "captions": [Value("string")]})
    data = {"image": [drawn(each[0]) for each in captions], "captions": captions}
    Dataset.from_dict(data, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    return {
        "output": str(tmp_path / "out"),
        "data": {
            "source": str(tmp_path / "data"), "split": "train", "caption_column": "captions", "num_examples": 60,
            "description": "toys",
        },
        "model": {
            "prior": str(tmp_path / "prior"), "prior_source": "noise", "super_resolution": None,
            "super_resolution_source": "none", "text_encoder": str(tmp_path / "encoder"),
            "text_encoder_source": "random words", "max_text_tokens": SLOTS,
        },
        "training": {
            "target_epsilon": 8.0, "expected_batch_size": 20, "max_steps": 3, "micro_batch_size": 8, "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True,
        },
        "sampling": {"guidance_scale": 2.0},
        "card": {
            "hyperparameter_tuning": "by convention", "tuning_data": "none",
            "prompts": ["a red circle", "a blue square"],
        },
    }  # fmt: skip


def run(job, tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    train.main()


def test_captions_in_card_out_prompts_in(job, tmp_path, monkeypatch, capsys):
    run(job, tmp_path, monkeypatch)
    folder = tmp_path / "out" / "pipeline"
    card = PrivacyCard.load(folder)
    assert card.verify(folder) == [] and 0.99 * 8 < card.report["claim"]["epsilon"] <= 8
    assert card.report["unit"]["definition"] == "one row of the training data (one image with all its captions)"
    assert {"role": "text encoder", "source": "random words"} in card.report["public_data"]
    readme = (folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in readme and 'prompt="' in readme
    assert "Not covered: prompts that users type" in readme and "a private caption used as a prompt" in readme
    released = {entry["path"].split("/")[0] for entry in card.report["released"]}
    assert {"text_encoder", "tokenizer"} <= released
    assert Picture.open(folder / "samples.png").width > 8 * 64
    pipeline = DPSpectralPipeline.from_pretrained(folder)
    assert (type(pipeline.text_encoder).__name__, pipeline.model.config.conditioning) == ("BertModel", "text")
    images = pipeline("a red circle", negative_prompt="blue", num_images_per_prompt=2).images
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("data", "caption_column", "lacks data.caption_column; a model with text needs all of"),
        ("model", "text_encoder", "lacks model.text_encoder;"),
        ("model", "text_encoder_source", "lacks model.text_encoder_source;"),
        ("card", "prompts", "lacks card.prompts;"),
    ],
)
def test_a_half_textual_config_is_refused(job, tmp_path, monkeypatch, section, field, message):
    del job[section][field]
    with pytest.raises(ValueError, match=message):
        run(job, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_adapters_alone_cannot_give_text_to_a_prior_without(job, tmp_path, monkeypatch):
    job["training"]["lora_rank"] = 2
    with pytest.raises(ValueError, match="lora_rank=2 .*would stay random"):
        run(job, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_prompts_steer_the_image(encoder, processor, tmp_path):
    """Without privacy, on toy images: a model that saw colours by name draws the colour that it is asked for."""
    model = text_model(codebook_sizes=[12, 12, 12], hidden_size=32, intermediate_size=64)
    pixels = processor([drawn(caption) for caption in CAPTIONS])["pixel_values"]
    model.codec.fit(pixels, seed=0)
    store = store_of([[each] for each in CAPTIONS], tmp_path / "store", encoder, processor, model)
    rows, torch_ = store[range(12)], torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        kept = (torch.rand(12, generator=torch_) >= 0.1)[:, None, None]
        loss = model.per_example_loss(rows["input_ids"], rows["text_states"] * kept).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = DPSpectralPipeline(model, processor, None, *encoder)
    pipe.set_progress_bar_config(disable=True)

    def accuracy(prompts, **options) -> float:
        images = pipe(prompts, num_images=4, generator=torch.Generator().manual_seed(0), **options).images
        asked = [caption.split()[1] for caption in CAPTIONS for _ in range(4)]
        return float(np.mean([colour_of(image) == colour for image, colour in zip(images, asked, strict=True)]))

    assert accuracy(CAPTIONS, guidance_scale=2.0) > 0.9
    assert accuracy([""] * 12) < 0.6  # one in four by chance
