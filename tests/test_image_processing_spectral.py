"""Image processor: range and shape for every kind of image, area averaging, refusal of what has no meaning."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")


def picture(mode: str, size: tuple[int, int] = (50, 41)) -> Image.Image:
    """A picture of the given mode with a bright and a dark half."""
    levels = np.zeros((size[1], size[0]), dtype=np.uint8)
    levels[:, size[0] // 2 :] = 255
    grey = Image.fromarray(levels)
    if mode in ("I;16", "I"):
        wide = levels.astype(np.uint16) * 257
        return Image.fromarray(wide) if mode == "I;16" else Image.fromarray(wide.astype(np.int32))
    if mode == "F":
        return Image.fromarray(levels.astype(np.float32) / 255)
    if mode in ("La", "RGBa"):
        return grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "PA":
        return grey.convert("P").convert("PA")
    return grey.convert("RGB").convert(mode) if mode not in ("LA", "1") else grey.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_picture(mode, channels):
    processor = SpectralImageProcessor(image_size=16, num_channels=channels)
    pixels = processor(picture(mode))["pixel_values"]
    assert pixels.shape == (1, channels, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    expected = processor(picture("L"))["pixel_values"]
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (16, 16), (7, 5), (33, 65), (16, 17)])
def test_every_size_fits(size):
    pixels = SpectralImageProcessor(image_size=16, num_channels=3)(picture("RGB", size))["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.abs().max() <= 1


def test_shrinking_is_the_mean_of_blocks():
    levels = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
    pixels = SpectralImageProcessor(image_size=16)(Image.fromarray(levels), return_tensors="np")["pixel_values"]
    means = levels.reshape(16, 4, 16, 4).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(pixels[0, 0], means, atol=1 / 127.5 + 1e-6)  # Pillow rounds each axis to whole levels


def test_the_central_square_is_kept():
    levels = np.zeros((10, 30), dtype=np.uint8)
    levels[:, 10:20] = 255
    assert (SpectralImageProcessor(image_size=10)(levels)["pixel_values"] == 1).all()


def test_padding_by_hand():
    pixels = SpectralImageProcessor(image_size=32, pad=2)(np.full((28, 28), 255, np.uint8))["pixel_values"][0, 0]
    assert (pixels[2:30, 2:30] == 1).all()
    pixels[2:30, 2:30] = -1
    assert (pixels == -1).all()


@pytest.mark.parametrize("background", [-1.0, 1.0])
def test_transparent_pixels_show_the_background(background):
    hidden = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    pixels = SpectralImageProcessor(image_size=8, num_channels=3, background=background)(hidden)["pixel_values"]
    assert (pixels == background).all()
    floats = np.concatenate([np.full((8, 8, 3), 0.7), np.zeros((8, 8, 1))], axis=-1)
    pixels = SpectralImageProcessor(image_size=8, num_channels=3, background=background)(floats)["pixel_values"]
    assert (pixels == background).all()


def test_arrays_tensors_and_pictures_agree(random_images):
    processor = SpectralImageProcessor(image_size=16, num_channels=3)
    expected = processor([Image.fromarray(image) for image in random_images])["pixel_values"]
    channels_first = torch.from_numpy(random_images).permute(0, 3, 1, 2)
    for images in (random_images, list(random_images), channels_first, list(channels_first)):
        torch.testing.assert_close(processor(images)["pixel_values"], expected)
    floats = processor(random_images.astype(np.float32) / 255)["pixel_values"]
    torch.testing.assert_close(floats, expected, atol=1.5 / 127.5, rtol=0)


def test_sixteen_bits_are_not_cut_to_eight():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = ramp / 32767.5 - 1
    for image in (ramp, Image.fromarray(ramp), ramp.astype(np.float32) / 65535):
        pixels = SpectralImageProcessor(image_size=16)(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("white_level", [1000, 4095])
def test_the_white_of_fewer_bits_is_white(white_level, tmp_path):
    """As if the samples had been spread over all 16 bits; eight bits and floats have a white of their own."""
    ramp = np.linspace(0, white_level, 256).round().astype(np.uint16).reshape(16, 16)
    spread = np.round(ramp * (65535 / white_level)).astype(np.uint16)
    SpectralImageProcessor(image_size=16, white_level=white_level).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    full = SpectralImageProcessor(image_size=16)
    for image, same in ((ramp, spread), (Image.fromarray(ramp), Image.fromarray(spread))):
        torch.testing.assert_close(processor(image)["pixel_values"], full(same)["pixel_values"], atol=1e-4, rtol=0)
    above = np.full((16, 16), white_level + 1, np.uint16)
    assert processor(above)["pixel_values"].min() == 1 and processor(Image.fromarray(above))["pixel_values"].min() == 1
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (eight, eight.astype(np.float32) / 255, np.stack([eight, eight], -1)):
        torch.testing.assert_close(processor(image)["pixel_values"], full(image)["pixel_values"], atol=0, rtol=0)


@pytest.mark.parametrize("white_level", [0, 65536])
def test_a_white_that_no_sample_has_is_refused(white_level):
    with pytest.raises(ValueError, match=rf"white_level={white_level} must be in \[1, 65535\]; 4095"):
        SpectralImageProcessor(white_level=white_level)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 4), np.uint8),
        np.zeros((5, 5, 7), np.uint8),
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf),
        np.full((4, 4), -0.5),
        np.full((4, 4), 200.0),
        np.zeros((4, 4), np.int64),
        Image.new("L", (0, 3)),
    ],
)
def test_what_has_no_meaning_is_refused(image):
    with pytest.raises(ValueError):
        SpectralImageProcessor(image_size=16)([image])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"num_channels": 2}, "num_channels=2"),
        ({"image_size": 8, "pad": 4}, "pad=4"),
        ({"background": 2.0}, "background=2.0"),
    ],
)
def test_errors_name_the_field_and_its_value(fields, named):
    with pytest.raises(ValueError, match=named):
        SpectralImageProcessor(**fields)


def test_an_unknown_argument_is_not_swallowed():
    with pytest.raises(ValueError, match="do_resize"):
        SpectralImageProcessor()(picture("L"), do_resize=False)


def test_it_is_saved_and_loaded(tmp_path):
    processor = SpectralImageProcessor(image_size=16, num_channels=3, pad=1, background=0.0)
    processor.save_pretrained(tmp_path)
    again = SpectralImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert (again.image_size, again.num_channels, again.pad, again.background) == (16, 3, 1, 0.0)


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_postprocess_undoes_preprocess(channels, pad):
    shape = (5, 16 - 2 * pad, 16 - 2 * pad, channels)
    levels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    processor = SpectralImageProcessor(image_size=16, num_channels=channels, pad=pad, background=0.3)
    pixels = processor(levels)["pixel_values"]
    for picture, expected in zip(processor.postprocess(pixels), levels, strict=True):
        assert picture.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(picture).reshape(expected.shape), expected)
    array = processor.postprocess(pixels, "np")
    assert array.shape == shape and array.dtype == np.float32
    np.testing.assert_allclose(array, levels / 255, atol=1e-6)  # float32 rounding
    tensor = processor.postprocess(pixels, "pt")
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))


def test_postprocess_by_hand():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5, 0.998, -0.9961, 0.5, -0.5]).view(1, 1, 3, 3)
    picture = SpectralImageProcessor(image_size=3).postprocess(pixels.requires_grad_())[0]
    assert list(picture.tobytes()) == [0, 0, 128, 255, 255, 255, 0, 191, 64]


@pytest.mark.parametrize(("side", "inner"), [(32, 28), (16, 14), (8, 8), (64, 56)])
def test_postprocess_crops_the_share_of_a_coarser_image(side, inner):
    processor = SpectralImageProcessor(image_size=32, pad=2)
    assert processor.postprocess(torch.zeros(1, 1, side, side))[0].size == (inner, inner)


def test_postprocess_refuses_what_it_cannot_show():
    processor = SpectralImageProcessor(image_size=16)
    with pytest.raises(ValueError, match="output_type='latent'"):
        processor.postprocess(torch.zeros(1, 1, 16, 16), "latent")
    for shape in ((1, 3, 16, 16), (1, 16, 16), (1, 1, 16, 8)):
        with pytest.raises(ValueError, match="images has shape"):
            processor.postprocess(torch.zeros(shape))
    assert processor.postprocess(torch.zeros(0, 1, 16, 16)) == []
