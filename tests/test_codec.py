"""Codec: the nearest code word of every patch, images of every prefix, nothing to train, and a fit that repeats."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from hf_spectral_dp import SpectralCodec, SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.codec import _bands, _patches

torch.set_num_threads(1)

LAYOUTS = [
    {"levels": 2, "patch_sizes": [2, 2, 4], "codebook_sizes": [16, 16, 16]},
    {"levels": 2, "patch_sizes": [1, 2], "codebook_sizes": [8, 24], "wavelet": "db2"},
    {"levels": 3, "patch_sizes": [2], "codebook_sizes": [5], "wavelet": "sym4"},
]


def random_codec(num_channels: int = 1, seed: int = 0, **fields) -> SpectralCodec:
    """A codec of 16x16 images whose code words have the size of wavelet coefficients."""
    codec = SpectralCodec(SpectralConfig(image_size=16, num_channels=num_channels, **(fields or LAYOUTS[0])))
    generator = torch.Generator().manual_seed(seed)
    for index in range(len(codec.layout.scales)):
        codec.codebook(index).normal_(std=1.0, generator=generator)
    return codec


def smooth_images(number: int, num_channels: int = 1, seed: int = 1) -> torch.Tensor:
    """Blurred noise with grain, (number, channels, 16, 16) in [-1, 1]: most energy is coarse, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(number, num_channels, 4, 4, generator=generator), (16, 16), mode="bilinear")
    grain = torch.randn(number, num_channels, 16, 16, generator=generator)
    return (0.4 * coarse + 0.1 * grain).clamp(-1, 1)


def lossless_codec(images: torch.Tensor, **fields) -> SpectralCodec:
    """A codec whose code words are all patches of the given images."""
    codec = random_codec(images.shape[1], **fields)
    sizes = [len(patches.flatten(0, 1)) for patches in codec.patches(images)]
    codec = random_codec(images.shape[1], **{**fields, "codebook_sizes": sizes})
    for index, patches in enumerate(codec.patches(images)):
        codec.codebook(index).copy_(patches.flatten(0, 1))
    return codec


def repeat(images: torch.Tensor, times: int) -> torch.Tensor:
    return images.repeat_interleave(times, -1).repeat_interleave(times, -2)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("fields", LAYOUTS)
def test_encode_picks_the_nearest_code_word(fields, num_channels):
    codec, images = random_codec(num_channels, **fields), smooth_images(5, num_channels)
    tokens = codec.encode(images)
    assert tokens.shape == (5, codec.layout.length) and tokens.dtype == torch.int64
    for index, (patches, scale) in enumerate(zip(codec.patches(images), codec.layout.scales, strict=True)):
        chosen = tokens[:, scale.first_position : scale.first_position + scale.tokens] - scale.first_id
        assert chosen.min() >= 0 and chosen.max() < scale.codes
        for image in range(len(images)):
            for place in range(scale.tokens):
                distances = (patches[image, place].double() - codec.codebook(index).double()).square().sum(1)
                # Squared distances here stay below a few hundred; float32 rounds them to about 1e-5.
                assert distances[chosen[image, place]] <= distances.min() + 1e-4


@pytest.mark.parametrize("fields", LAYOUTS)
def test_tokens_of_one_image_do_not_depend_on_another(fields):
    codec, images = random_codec(**fields), smooth_images(6)
    alone = torch.cat([codec.encode(image[None]) for image in images])
    assert torch.equal(codec.encode(images), alone)
    assert torch.equal(codec.encode(images.flip(0)).flip(0), alone)
    assert codec.encode(images[:0]).shape == (0, codec.layout.length)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("fields", [LAYOUTS[0], {**LAYOUTS[0], "wavelet": "db2"}])
def test_decoded_images_keep_their_tokens(fields, num_channels):
    """Decoding lands exactly on code words, so a second pass changes nothing, as long as no pixel is clamped."""
    codec = random_codec(num_channels, **fields)
    for index in range(3):
        codec.codebook(index).mul_(0.2)  # keeps every decoded pixel inside [-1, 1]
    tokens = codec.encode(smooth_images(8, num_channels))
    images = codec.decode(tokens)
    assert images.abs().max() < 1
    assert torch.equal(codec.encode(images), tokens)
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)


def test_coarse_images_keep_their_tokens():
    """Without the finest scale the same holds for Haar once each coarse pixel is repeated."""
    codec = random_codec(levels=2, patch_sizes=[2, 2], codebook_sizes=[16, 16])
    for index in range(2):
        codec.codebook(index).mul_(0.2)
    tokens = codec.encode(smooth_images(8))
    assert torch.equal(codec.encode(repeat(codec.decode(tokens), 2)), tokens)


def test_decoded_images_stay_in_range():
    codec = random_codec()
    for index in range(3):
        codec.codebook(index).mul_(100)
    images = codec.decode(codec.encode(smooth_images(4)))
    assert images.abs().max() == 1 and images.isfinite().all()


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_prefix_of_whole_scales_is_the_block_mean(num_channels, scales):
    images = smooth_images(3, num_channels)
    fields = {"levels": 3, "patch_sizes": [1, 2, 4, 2][:scales], "codebook_sizes": [2] * scales}
    codec = lossless_codec(images, **fields)
    side = codec.config.coarse_size
    assert side == 2 * 2 ** (scales - 1)
    tokens = codec.encode(images)
    for index, scale in enumerate(codec.layout.scales):
        decoded = codec.decode(tokens[:, : scale.first_position + scale.tokens])
        known = 2 * 2**index  # side that the first index + 1 scales determine
        means = repeat(F.avg_pool2d(images, 16 // known), side // known)
        # Orthonormal sums of 256 pixels below 1 in float32.
        torch.testing.assert_close(decoded, means, atol=1e-5, rtol=0)


def test_no_tokens_give_the_grey_image():
    decoded = random_codec().decode(torch.zeros(2, 0, dtype=torch.long))
    assert decoded.shape == (2, 1, 16, 16) and (decoded == 0).all()


def test_a_prefix_changes_only_its_own_patches():
    """With Haar a token of the coarsest scale fills one block; the others stay grey."""
    codec = random_codec()
    tokens = codec.encode(smooth_images(2))
    first = codec.decode(tokens[:, :1])
    assert (first[..., :8, :8] != 0).all()
    assert (first[..., 8:, :] == 0).all() and (first[..., :8, 8:] == 0).all()


@pytest.mark.parametrize("codes", [4, 16, 64])
def test_every_further_token_lowers_the_mean_error_of_the_fitted_images(codes):
    """Mean over images that look alike everywhere: a code word near the mean of its patches is better than zero."""
    images = smooth_images(400)
    codec = random_codec(levels=2, patch_sizes=[2, 2, 4], codebook_sizes=[codes] * 3)
    codec.fit(images)
    tokens = codec.encode(images)
    errors = [(codec.decode(tokens[:, :t]) - images).square().mean().item() for t in range(codec.layout.length + 1)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("fields", LAYOUTS)
def test_patches_and_bands_are_inverse(fields, num_channels):
    for scale in random_codec(num_channels, **fields).layout.scales:
        bands = torch.randn(3, scale.channels, scale.side, scale.side)
        patches = _patches(bands, scale)
        assert patches.shape == (3, scale.tokens, scale.patch_dim)
        assert torch.equal(_bands(patches, scale), bands)
        # Row by row: the token after the first is the patch to the right of it.
        corner = bands[0, :, : scale.patch, : scale.patch]
        assert torch.equal(patches[0, 0], corner.flatten())
        if scale.grid > 1:
            right = bands[0, :, : scale.patch, scale.patch : 2 * scale.patch]
            assert torch.equal(patches[0, 1], right.flatten())


def test_fit_repeats_reports_and_leaves_global_randomness_alone():
    images = smooth_images(200)
    codecs = [random_codec(seed=seed) for seed in (0, 1, 2)]
    torch_state = torch.get_rng_state()
    reports = [codec.fit(images, seed=seed) for codec, seed in zip(codecs, (3, 3, 4), strict=True)]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert reports[0] == reports[1] != reports[2]
    assert all(torch.equal(codecs[0].codebook(i), codecs[1].codebook(i)) for i in range(3))

    tokens = codecs[0].encode(images)
    for index, (patches, scale) in enumerate(zip(codecs[0].patches(images), codecs[0].layout.scales, strict=True)):
        ids = tokens[:, scale.first_position : scale.first_position + scale.tokens] - scale.first_id
        error = (patches - codecs[0].codebook(index)[ids]).square().sum() / patches.square().sum()
        assert reports[0]["relative_error"][index] == pytest.approx(error.item(), rel=1e-4)  # float32 sums
        assert reports[0]["used"][index] == len(ids.unique()) / scale.codes
        assert 0 < error < 1


def test_fit_finds_the_clusters_by_hand():
    """Four kinds of constant image and four code words: nothing is lost in LL, and there is no detail to lose."""
    values = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    images = values.repeat(8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    codec = random_codec(levels=1, patch_sizes=[8], codebook_sizes=[4])
    report = codec.fit(images)
    assert report["used"] == [1.0] and report["relative_error"][0] < 1e-10
    assert codec.codebook(0).mean(1).sort().values.tolist() == pytest.approx((2 * values).tolist(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fit_reports_no_error_where_there_is_no_energy():
    assert random_codec().fit(torch.zeros(16, 1, 16, 16))["relative_error"] == [0.0, 0.0, 0.0]


def test_fit_needs_as_many_patches_as_code_words():
    with pytest.raises(ValueError, match=r"4 patches cannot fill codebook_sizes\[0\]=16; give more images"):
        random_codec().fit(smooth_images(1))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 16, 8), (2, 1, 32, 32), (1, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images has shape .*this codec takes \(B, 1, 16, 16\)"):
        random_codec().encode(torch.zeros(shape))


@pytest.mark.parametrize("position", range(12))
def test_ids_of_another_scale_are_refused(position):
    codec = random_codec()
    tokens = codec.encode(smooth_images(2))
    index = codec.layout.scale_of_position[position]
    scale = codec.layout.scales[index]
    for foreign in (-100, -1, scale.first_id - 1, scale.first_id + scale.codes, 48, 10**6):
        wrong = tokens.clone()
        wrong[1, position] = foreign
        message = rf"scale {index} lies outside \[{scale.first_id}, {scale.first_id + 16}\); tokens must come from"
        with pytest.raises(ValueError, match=message):
            codec.decode(wrong[:, : position + 1])


@pytest.mark.parametrize("shape", [(12,), (1, 13), (1, 1, 12)])
def test_too_many_tokens_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens has shape .*expected \(B, at most 12\)"):
        random_codec().decode(torch.zeros(shape, dtype=torch.long))


def test_nothing_is_trainable_and_an_optimizer_step_changes_nothing():
    model = tiny_model()
    before = [model.codec.codebook(index).clone() for index in range(3)]
    assert list(model.codec.parameters()) == []
    assert not any(name.startswith("codec") for name, _ in model.named_parameters())
    assert {name for name, _ in model.codec.named_buffers()} == {"codebook_0", "codebook_1", "codebook_2"}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    inputs = torch.cat([model.start_tokens(None, 2)[:, None], model.codec.encode(smooth_images(2))], dim=1)
    model.per_example_loss(inputs).sum().backward()
    optimizer.step()
    assert all(torch.equal(model.codec.codebook(index), before[index]) for index in range(3))
    assert not model.codec.encode(smooth_images(1).requires_grad_()).requires_grad


def test_the_codec_moves_with_the_model():
    model = tiny_model().to("meta")
    assert {model.codec.codebook(index).device.type for index in range(3)} == {"meta"}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_code_words_are_loaded_bit_for_bit(tmp_path, dtype):
    """Half precision halves the transformer, not the codec: rounded code words would mean other tokens."""
    model, images = tiny_model(), smooth_images(16)
    model.save_pretrained(tmp_path)
    loaded = SpectralTokenizerForCausalLM.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    assert loaded.lm_head.weight.dtype == (dtype or torch.float32)
    for index in range(3):
        assert loaded.codec.codebook(index).dtype == torch.float32
        assert torch.equal(loaded.codec.codebook(index), model.codec.codebook(index))
    assert torch.equal(loaded.codec.encode(images), model.codec.encode(images))
    tokens = model.codec.encode(images)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_neither_tokens_nor_images(dtype):
    codec, images = random_codec(codebook_sizes=[512] * 3, levels=2, patch_sizes=[2, 2, 4]), smooth_images(64)
    tokens = codec.encode(images)
    with torch.autocast("cpu", dtype):
        assert torch.equal(codec.encode(images), tokens)
        decoded = codec.decode(tokens)
    assert torch.equal(decoded, codec.decode(tokens)) and decoded.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_codec_still_works(dtype):
    codec, images = random_codec().to(dtype), smooth_images(4)
    tokens = codec.encode(images.to(dtype))
    assert codec.decode(tokens).dtype == torch.float32
    # Only the code words are rounded, to eight bits at least.
    torch.testing.assert_close(codec.decode(tokens), random_codec().decode(tokens), atol=0.05, rtol=0)
