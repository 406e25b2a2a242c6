"""The script that trains a super-resolution network on public images: sharp details, and codecs that it mends."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sequences, tiny_model, wild
from PIL import Image
from transformers import AutoModelForImageToImage

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.super_resolution import upscale_to

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

import train_super_resolution  # noqa: E402


def test_the_judge_learns_to_tell_and_says_so_to_the_other_side():
    """Noise against flat images: after some steps its own loss is small and flat images look false."""
    torch.manual_seed(0)
    judge = train_super_resolution.Discriminator(channels=1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    flat, beside = torch.zeros(16, 1, 32, 32), torch.zeros(16, 1, 32, 32)
    first = judge.loss(flat, torch.randn(16, 1, 32, 32), beside).item()
    for _ in range(30):
        loss = judge.loss(flat, torch.randn(16, 1, 32, 32), beside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    true = torch.randn(16, 1, 32, 32)
    assert judge.loss(flat, true, beside).item() < first / 2
    judge.eval()  # spectral normalisation refines its estimate in training mode
    false, unlike = judge.of_enlarged(flat, true, beside)
    assert float(false) > float(judge.of_enlarged(true, true, beside)[0])
    assert float(unlike) > 0 == float(judge.of_enlarged(true, true, beside)[1])


@pytest.mark.parametrize("side", [16, 40])
def test_squares_are_whole_images_and_parts_of_any_sharpness(side):
    """Of noise: the whole of a small image is itself, of a large one its averages; parts differ in sharpness."""
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(photo).resize((16, 16), Image.Resampling.BOX))
    rng = np.random.default_rng(1)
    squares = [train_super_resolution.square(Image.fromarray(photo), 16, 3, rng) for _ in range(400)]
    same = [np.array_equal(square, whole) for square in squares]
    assert 0.4 < np.mean(same) < 0.65
    contrasts = [np.abs(np.diff(square.astype(float), axis=1)).mean() for square in squares]
    assert min(contrasts) < 0.6 * max(contrasts)
    assert {square.shape for square in squares} == {(16, 16, 3)} and squares[0].dtype == np.uint8


def test_redrawn_details_are_the_priors_and_coarse_tokens_stay():
    """Near temperature 0 the likeliest details given the true tokens before; at 1 as likely as the prior says."""
    prior = wild(tiny_model(), 0.3)
    tokens = sequences(prior, 400)[:, 1:]
    null = tokens.new_full((len(tokens), 1), prior.config.null_token_id)
    logits = prior(torch.cat([null, tokens[:, :-1]], 1), use_cache=False).logits.log_softmax(-1)
    greedy = train_super_resolution.redrawn(prior, tokens, [1.0, 1e-7, 1e-7])
    assert torch.equal(greedy[:, :4], tokens[:, :4]) and torch.equal(greedy[:, 4:], logits.argmax(-1)[:, 4:])
    torch.manual_seed(0)
    drawn = train_super_resolution.redrawn(prior, tokens, [1.0, 1.0, 1.0])
    found = logits.gather(2, drawn[..., None])[:, 4:, 0].mean()
    entropy = -(logits.exp() * logits.clamp_min(-1e4)).sum(-1)[:, 4:].mean()
    assert abs(found + entropy) < 0.05


@pytest.mark.parametrize("rise", [0.1, 0.3])
def test_learning_rates_rise_and_end_at_zero(rise):
    rates = [train_super_resolution.one_cycle(share, rise) for share in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert np.argmax(rates) == round(100 * rise) and np.sum(np.diff(np.sign(np.diff(rates))) != 0) <= 2


def test_a_prior_needs_its_codec(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--public", "p", "--out", "o", "--prior", "some/prior"])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "--prior some/prior without --codec" in capsys.readouterr().err


@pytest.mark.parametrize("adversarial", ["0", "0.1"])
def test_a_network_for_what_a_codec_makes_of_images(tmp_path, monkeypatch, adversarial):
    """From tokens of side 4 to images of side 16: twice the same doubling network, which mends as well."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(40):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")  # is passed over
    config = SpectralConfig(
        image_size=16, num_channels=3, levels=3, patch_sizes=[1, 1], codebook_sizes=[8, 8], hidden_size=16,
        intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    model = SpectralTokenizerForCausalLM(config)
    model.codec.fit(torch.rand(40, 3, 16, 16) * 2 - 1)
    model.save_pretrained(tmp_path / "codec")
    options = {
        "public": tmp_path / "photos", "codec": tmp_path / "codec", "out": tmp_path / "out", "size": 16, "steps": 40,
        "batch_size": 4, "features": 4, "num_blocks": 1, "adversarial": adversarial, "learning_rate": 0.01,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    train_super_resolution.main()
    network = AutoModelForImageToImage.from_pretrained(tmp_path / "out").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        enlarged = upscale_to(16, network, model.decode(model.codec.encode(images)))
    assert enlarged.shape == images.shape and bool((enlarged.abs() <= 1).all())
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"--adversarial {float(adversarial)}" in text
    if adversarial == "0":  # trained on the error alone, it beats plain resampling
        figures = text.split("PSNR in dB: ")[1].split()
        assert float(figures[0].rstrip(";")) > float(figures[2].rstrip(";"))
    else:  # a new judge, another folder; the steps in which the judge learns alone leave the network as it is
        given[given.index("--out") + 1] = str(tmp_path / "on")
        monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given, "--start", str(tmp_path / "out")])
        sys.argv += ["--save_steps", "40"]
        train_super_resolution.main()
        kept = AutoModelForImageToImage.from_pretrained(tmp_path / "on-40")
        on = AutoModelForImageToImage.from_pretrained(tmp_path / "on").eval()
        changes = [(a - b).abs().max() for a, b in zip(network.parameters(), on.parameters(), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), on.parameters(), strict=True))
        assert 0 < max(changes) < 0.5 and f"--start {tmp_path / 'out'}" in (tmp_path / "on" / "README.md").read_text()


def test_going_on_without_a_judge_is_refused(monkeypatch, capsys):
    given = ["--public", "glyphs", "--start", "folder", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "--start folder without --adversarial" in capsys.readouterr().err


def test_a_network_of_another_task_is_refused_before_any_image_is_read(tmp_path, monkeypatch, capsys):
    config = train_super_resolution.SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1)
    train_super_resolution.SpectralSuperResolution(config).save_pretrained(tmp_path / "grey")
    given = ["--public", "nowhere", "--adversarial", "0.1", "--start", str(tmp_path / "grey"), "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "'num_channels': 1" in (said := capsys.readouterr().err) and "the task is {'num_channels': 3" in said
