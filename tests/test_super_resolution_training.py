"""Training super-resolution on public images: what is seen, the judge, and images that a private mean weighs."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sequences, tiny_model, wild
from critic_parts import knowing
from PIL import Image
from pipeline_parts import enlarging, of_half_the_side

from hf_spectral_dp import (
    SpectralImageProcessor,
    super_resolution_training,
)
from hf_spectral_dp.private_marks import UNRECORDED
from hf_spectral_dp.super_resolution_training import (
    Coarse,
    Discriminator,
    Schedule,
    eight_bits,
    mend_towards,
    one_cycle,
    public_squares,
    redrawn,
    square,
    train_super_resolution,
)


def test_the_judge_learns_to_tell_and_says_so_to_the_other_side():
    """Noise against flat images: after some steps its own loss is small and flat images look false."""
    torch.manual_seed(0)
    judge = Discriminator(channels=1)
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
    squares = [square(Image.fromarray(photo), 16, 3, rng) for _ in range(400)]
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
    greedy = redrawn(prior, tokens, [1.0, 1e-7, 1e-7])
    assert torch.equal(greedy[:, :4], tokens[:, :4]) and torch.equal(greedy[:, 4:], logits.argmax(-1)[:, 4:])
    torch.manual_seed(0)
    drawn = redrawn(prior, tokens, [1.0, 1.0, 1.0])
    found = logits.gather(2, drawn[..., None])[:, 4:, 0].mean()
    entropy = -(logits.exp() * logits.clamp_min(-1e4)).sum(-1)[:, 4:].mean()
    assert abs(found + entropy) < 0.05


@pytest.mark.parametrize("rise", [0.1, 0.3])
def test_learning_rates_rise_and_end_at_zero(rise):
    rates = [one_cycle(share, rise) for share in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert np.argmax(rates) == round(100 * rise) and np.sum(np.diff(np.sign(np.diff(rates))) != 0) <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_squares_are_of_photos_as_the_processor_sees_them(channels):
    """Sixteen bits, and what lies behind transparency: Pillow's own conversion clips the one and forgets the other."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    clear = Image.new("RGBA", (32, 32), (200, 200, 200, 0))
    for image in (Image.fromarray(ramp), clear):
        seen = SpectralImageProcessor(image_size=16, num_channels=channels)(image)["pixel_values"]
        whole = square(image, 16, channels, np.random.default_rng(1))  # whose first coin says: all of it
        assert abs(whole.mean() - (float(seen.mean()) + 1) * 127.5) < 1


def test_photos_of_twelve_bits_are_as_the_processor_sees_them():
    image = Image.fromarray(np.linspace(0, 4095, 16 * 16).reshape(16, 16).astype(np.uint16))
    seen = SpectralImageProcessor(image_size=16, white_level=4095)(image)["pixel_values"][0, 0]
    eight = eight_bits(image, 4095)
    assert eight.mode == "L" and eight_bits(eight) == eight
    np.testing.assert_allclose(np.asarray(eight), (seen + 1) * 127.5, atol=0.51)


def test_public_squares_are_some_of_each_photo_and_stop_at_the_memory(monkeypatch):
    photos = [Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)) for shade in range(10)]
    found = public_squares(iter(photos), 4, 1, seed=0)
    assert found.shape == (30, 1, 4, 4) and found.dtype == torch.uint8
    assert torch.equal(found[:, 0, 0, 0], torch.arange(10).repeat_interleave(3))
    monkeypatch.setattr(super_resolution_training, "MEMORY", 7 * 16)
    assert len(public_squares(iter(photos), 4, 1, seed=0)) == 7


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_images_are_seen_as_often_as_the_odds_say(monkeypatch, adversarial):
    """Images of one shade each: the network meets those of odds 0 never, the others by their odds."""
    torch.manual_seed(0)
    images = torch.arange(0, 200, 50, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 16, 16)
    seen, at = [], Coarse.at

    def spy(coarse, step, target):
        seen.append(((target[:, 0, 0, 0] + 1) * 127.5).round())
        return at(coarse, step, target)

    monkeypatch.setattr(Coarse, "at", spy)
    schedule = Schedule(steps=20, batch_size=32, adversarial=adversarial)
    trained, steps = train_super_resolution(
        enlarging(), images, Coarse(2), schedule, odds=torch.tensor([0.0, 3.0, 1.0, 0.0])
    )
    met = torch.cat(seen)
    assert steps == 20 and not trained.training
    assert set(met.tolist()) == {50.0, 100.0} and 0.68 < (met == 50).float().mean() < 0.82


def test_mending_learns_from_images_of_the_private_mean_and_leaves_all_else_as_it_is(monkeypatch):
    """The odds are the critic's, of the features of these images; public network, model and critic do not change."""
    torch.manual_seed(0)
    model, public = of_half_the_side(), enlarging()
    images = torch.randint(0, 256, (60, 1, 16, 16), dtype=torch.uint8)
    critic = knowing(torch.zeros(6))
    features = critic.features(images.float() / 127.5 - 1)
    directions = F.normalize(features, dim=1)
    with torch.no_grad():  # the mean of a third of them
        critic.sums.weight.copy_(0.25 * directions[:20].mean(0))
    before = copy.deepcopy([part.state_dict() for part in (critic, public, model)])
    given, train = [], super_resolution_training.train_super_resolution

    def spy(network, images, coarse, schedule, odds):
        given.append((coarse, schedule, odds))
        return train(network, images, coarse, schedule, odds)

    monkeypatch.setattr(super_resolution_training, "train_super_resolution", spy)
    schedule = Schedule(steps=3, batch_size=4, adversarial=0.1, goes_on=True)
    mended = mend_towards(critic, public, model, images, 0.7, schedule)
    coarse, used, odds = given[0]
    assert used is schedule and torch.equal(odds, critic.odds(features))
    assert coarse.prior is model and list(coarse.temperature) == [0.7] * len(model.config.layout.scales)
    for part, kept in zip((critic, public, model), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in part.state_dict().items())
    pairs = zip(mended.parameters(), public.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs) and not mended.training
    assert mended.config.private_runs == [UNRECORDED] and public.config.private_runs is None
    model.config.private_runs, public.config.private_runs = ["bb"], ["cc"]
    for run, named in ((None, UNRECORDED), ("aa", "aa")):
        critic.config.private_runs = run and [run]
        assert mend_towards(critic, public, model, images, 0.7, schedule).config.private_runs == [named, "bb", "cc"]


def test_without_a_mean_all_images_are_alike():
    critic = knowing()
    with torch.no_grad():
        critic.sums.bias.fill_(-1.0)
    with pytest.warns(UserWarning, match="none is preferred"):
        odds = critic.odds(torch.randn(10, 6))
    assert torch.allclose(odds, torch.full((10,), 0.1, dtype=odds.dtype))
