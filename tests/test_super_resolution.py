"""Super-resolution: it never contradicts the coarse image, stays in range, and other backends fit behind `upscale`."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

from hf_spectral_dp.super_resolution import (
    SpectralSuperResolution,
    SpectralSuperResolutionConfig,
    Upscaler,
    upscale,
    upscaler,
)
from hf_spectral_dp.wavelets import dwt2

torch.set_num_threads(1)


def network(channels: int = 1, scale: int = 2, wild: bool = True) -> SpectralSuperResolution:
    torch.manual_seed(0)
    model = SpectralSuperResolution(
        SpectralSuperResolutionConfig(num_channels=channels, scale=scale, features=4, num_blocks=1)
    ).eval()
    if wild:  # weights far from any trained ones: the properties must hold for every network
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
    return model


def swin(scale: int = 2) -> Swin2SRForImageSuperResolution:
    torch.manual_seed(0)
    return Swin2SRForImageSuperResolution(
        Swin2SRConfig(
            image_size=16, embed_dim=8, depths=[1], num_heads=[1], window_size=8, upscale=scale, mlp_ratio=1.0
        )
    ).eval()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_block_means_are_the_input_and_values_stay_in_range(channels, scale):
    images = torch.rand(3, channels, 6, 5) * 2 - 1
    images[0, 0, :2] = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.999])
    result = network(channels, scale)(images)
    assert result.shape == (3, channels, 6 * scale, 5 * scale)
    assert result.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(F.avg_pool2d(result, scale), images, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_network_that_mends_its_input_is_free_to_change_the_means():
    config = SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1, keep_average=False)
    mending = SpectralSuperResolution(config).eval()
    mending.load_state_dict(network().state_dict())
    images = torch.rand(2, 1, 6, 5) * 2 - 1
    result = mending(images)
    assert result.shape == (2, 1, 12, 10) and result.abs().max() <= 1
    assert (F.avg_pool2d(result, 2) - images).abs().max() > 0.1


@torch.no_grad()
def test_keeps_the_haar_approximation_band():
    images = torch.rand(1, 1, 8, 8) * 2 - 1
    low = dwt2(network()(images), 1).approximation
    torch.testing.assert_close(low / 2, images, atol=1e-5, rtol=0)


@torch.no_grad()
def test_untrained_network_is_bicubic_with_the_right_means():
    images = torch.linspace(-0.5, 0.5, 16).view(1, 1, 4, 4)
    result = network(wild=False)(images)
    torch.testing.assert_close(result, upscale("bicubic", images), atol=0.05, rtol=0)


def test_training_reduces_the_error_and_every_parameter_learns():
    model = network(wild=False)
    target = torch.rand(8, 1, 4, 1).repeat(1, 1, 2, 8) - 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.l1_loss(model(F.avg_pool2d(target, 2)), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_default_network_is_small_and_survives_saving(tmp_path):
    assert SpectralSuperResolution(SpectralSuperResolutionConfig()).num_parameters() <= 150_000
    model = network(3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    images = torch.rand(1, 3, 4, 4)
    loaded = SpectralSuperResolution.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (8, 16), (11, 9)])
@torch.no_grad()
def test_swin2sr_of_any_size_and_channels(channels, size):
    images = torch.rand(2, channels, *size) * 2 - 1
    result = upscale(swin(), images)
    assert result.shape == (2, channels, 2 * size[0], 2 * size[1])
    assert result.abs().max() <= 1


@torch.no_grad()
def test_swin2sr_gets_zero_to_one():
    model, images = swin(), torch.rand(1, 3, 8, 8) * 2 - 1
    direct = model(pixel_values=(images + 1) / 2).reconstruction
    torch.testing.assert_close(upscale(model, images), (direct * 2 - 1).clamp(-1, 1))


@pytest.mark.parametrize("mode", ["nearest", "bicubic", "lanczos"])
def test_plain_resampling_keeps_a_constant(mode):
    result = upscale(mode, torch.full((2, 3, 4, 5), 0.25), scale=3)
    assert result.shape == (2, 3, 12, 15)
    torch.testing.assert_close(result, torch.full_like(result, 0.25), atol=1e-5, rtol=0)


def test_nearest_by_hand():
    result = upscale("nearest", torch.tensor([[[[-1.0, 1.0]]]]))
    assert result.tolist() == [[[[-1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]]]]


def test_errors_name_value_and_remedy():
    images = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="'magic'.*nearest, bicubic, lanczos"):
        upscale("magic", images)
    with pytest.raises(ValueError, match="scale=0"):
        upscale("nearest", images, scale=0)
    with pytest.raises(ValueError, match="scale=4 but SpectralSuperResolution upscales by 2"):
        upscale(network(), images, scale=4)
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\).*3, h, w"):
        upscale(network(3), images)
    with pytest.raises(ValueError, match="expected"):
        upscale("nearest", images[0])
    with pytest.raises(ValueError, match="scale=3"):
        SpectralSuperResolutionConfig(scale=3)
    with pytest.raises(ValueError, match="num_channels=2"):
        SpectralSuperResolutionConfig(num_channels=2)


# Tiles.


@pytest.mark.parametrize("size", [(16, 16), (29, 17), (5, 40)])
@pytest.mark.parametrize(("scale", "overlap"), [(2, 6), (4, 9)])  # 2 + 2 * 1 convolutions, bicubic 2; then half of it
@torch.no_grad()
def test_tiles_of_a_local_network_leave_no_seam(size, scale, overlap):
    images = torch.rand(2, 3, *size) * 2 - 1
    enlarge = upscaler(network(3, scale))
    whole = enlarge(images)
    tiled = enlarge(images, tile_size=8, tile_overlap=overlap)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    assert (enlarge(images, tile_size=8, tile_overlap=0) - whole).abs().max() > 1e-3  # the overlap matters here


@pytest.mark.parametrize("mode", ["nearest", "bicubic", "lanczos"])
def test_tiles_of_plain_resampling_leave_no_seam(mode):
    images = torch.rand(1, 1, 13, 21) * 2 - 1
    enlarge = upscaler(mode, scale=3)
    torch.testing.assert_close(enlarge(images, tile_size=5, tile_overlap=4), enlarge(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_tiles_of_the_default_network_leave_no_seam():
    """2 + 2 * 5 convolutions of 3 x 3 see 12 pixels far: less than the pipeline's overlap of 32."""
    torch.manual_seed(0)
    model = SpectralSuperResolution(SpectralSuperResolutionConfig(features=8)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    images, enlarge = torch.rand(1, 3, 40, 33) * 2 - 1, upscaler(model)
    whole = enlarge(images)
    torch.testing.assert_close(enlarge(images, tile_size=16, tile_overlap=12), whole, atol=1e-5, rtol=0)
    assert (enlarge(images, tile_size=16, tile_overlap=2) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(48, 64), (45, 62)])
@torch.no_grad()
def test_tiles_of_swin2sr_leave_no_seam_where_windows_coincide(size):
    """Two layers of windows of 4, the second shifted, and three convolutions: what is 16 pixels away has no effect.

    Exact up to rounding, if tiles and overlap are multiples of the window; else a tile has other windows than the whole.
    """
    torch.manual_seed(0)
    fields = {"embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": 4, "upsampler": "pixelshuffledirect"}
    model = Swin2SRForImageSuperResolution(Swin2SRConfig(image_size=16, **fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    images, enlarge = torch.rand(1, 3, *size) * 2 - 1, upscaler(model)
    whole = enlarge(images)
    assert whole.std() > 0.1
    torch.testing.assert_close(enlarge(images, tile_size=16, tile_overlap=16), whole, atol=1e-4, rtol=0)
    for tile_size, tile_overlap in ((16, 4), (16, 18), (15, 16)):  # sees too little, and two without common windows
        found = enlarge(images, tile_size=tile_size, tile_overlap=tile_overlap)
        assert (found - whole).abs().max() > 1e-2, (tile_size, tile_overlap)


@torch.no_grad()
def test_tiles_see_no_more_than_they_should():
    seen = []
    enlarge = Upscaler(1, lambda images: (seen.append(images.shape[-2:]), images)[1])
    images = torch.rand(1, 3, 20, 20)
    assert torch.equal(enlarge(images, tile_size=8, tile_overlap=2), images)
    assert len(seen) == 9 and max(max(shape) for shape in seen) == 12


# Devices, precision and compilation.


@torch.no_grad()
def test_half_precision_models_give_images_of_the_input_s_precision():
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    for model in (network(3, wild=False), swin()):
        expected = upscale(model, images)
        found = upscale(model.to(torch.bfloat16), images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiled_models_are_known():
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    for model in (network(3), swin()):
        expected = upscale(model, images)
        wrapped = torch.compile(model, backend="eager")
        torch.testing.assert_close(upscale(wrapped, images, scale=2), expected)
        model.compile(backend="eager")  # in place, as users of diffusers do
        torch.testing.assert_close(upscale(model, images), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_backend_that_does_not_keep_its_word_is_refused():
    with pytest.raises(ValueError, match=r"the upscaler made \(1, 3, 4, 4\) of \(1, 3, 4, 4\), which is not scale=2"):
        Upscaler(2, lambda images: images)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="tile_size=0 must be at least 1"):
        Upscaler(1, lambda images: images)(torch.zeros(1, 3, 4, 4), tile_size=0)
