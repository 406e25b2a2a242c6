"""Wavelets: equal to PyWavelets, inverted exactly, energy kept; refusal of what has no orthonormal transform."""

import warnings

import pytest
import pywt
import torch

from hf_spectral_dp.wavelets import Detail, Subbands, approximation, check_wavelet, dwt2, idwt2

torch.set_num_threads(1)

ORTHOGONAL = [name for name in pywt.wavelist(kind="discrete") if pywt.Wavelet(name).orthogonal and name != "dmey"]
SHAPES = [(2, 3, 16, 24), (1, 1, 32, 8)]  # batch and channels; both sides shorter than the longest filters
# Against PyWavelets: the same taps, summed in another order. Inverse and energy in float64: no better than the taps
# themselves, which for the longest symlets and coiflets are orthonormal to about ten digits.
AGREES = {torch.float32: 5e-6, torch.float64: 1e-13}
INVERTS = {torch.float32: 5e-6, torch.float64: 1e-9}


def random_images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def flat(subbands: Subbands) -> list[torch.Tensor]:
    return [subbands.approximation, *(band for detail in subbands.details for band in detail)]


def test_every_orthogonal_filter_is_accepted_and_no_other():
    accepted = []
    for name in pywt.wavelist(kind="discrete"):
        try:
            check_wavelet(name)
            accepted.append(name)
        except ValueError:
            pass
    assert accepted == ORTHOGONAL and len(accepted) > 60


@pytest.mark.parametrize("dtype", AGREES)
@pytest.mark.parametrize("wavelet", ORTHOGONAL)
def test_equals_pywavelets_and_inverts(wavelet, dtype):
    agrees, inverts = {"atol": AGREES[dtype], "rtol": 0}, {"atol": INVERTS[dtype], "rtol": 0}
    for shape in SHAPES:
        images = random_images(shape, dtype)
        for levels in (1, 2, 3):
            subbands = dwt2(images, levels, wavelet)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyWavelets finds the image short for the filter
                low, *details = pywt.wavedec2(images.double().numpy(), wavelet, "periodization", levels, axes=(-2, -1))
                expected = [low, *(band for detail in details for band in detail)]
                back = pywt.waverec2([low, *details], wavelet, "periodization", axes=(-2, -1))
            for band, theirs in zip(flat(subbands), expected, strict=True):
                assert band.dtype == dtype
                torch.testing.assert_close(band.double(), torch.from_numpy(theirs), **agrees)
            for band in flat(subbands)[:4]:  # the coarsest level
                assert band.shape == (*shape[:2], shape[2] // 2**levels, shape[3] // 2**levels)
            torch.testing.assert_close(idwt2(subbands), images, **inverts)
            torch.testing.assert_close(idwt2(subbands).double(), torch.from_numpy(back), **agrees)
            energy = sum(band.double().square().sum() for band in flat(subbands))
            torch.testing.assert_close(energy, images.double().square().sum(), atol=0, rtol=INVERTS[dtype])


def test_half_precision_keeps_its_dtype():
    images = random_images((1, 1, 8, 8), torch.bfloat16)
    back = idwt2(dwt2(images, 2))
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, images, atol=0.1, rtol=0)  # eight bits of mantissa, values up to three


@pytest.mark.parametrize("wavelet", ["haar", "db3", "sym5", "coif1"])
def test_rows_and_channels_do_not_mix(wavelet):
    images = random_images((4, 3, 16, 16))
    together = flat(dwt2(images, 2, wavelet))
    alone = flat(dwt2(images[2:3, 1:2], 2, wavelet))
    for all_bands, band in zip(together, alone, strict=True):
        torch.testing.assert_close(all_bands[2:3, 1:2], band, atol=1e-6, rtol=0)  # sums of another order


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_gradient_is_the_inverse_transform(wavelet):
    images = random_images((2, 1, 8, 8), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(flat(dwt2(x, 2, wavelet))), images)
    # The gradient of half the energy is the input itself exactly when the transform is orthonormal.
    (sum(band.square().sum() for band in flat(dwt2(images, 2, wavelet))) / 2).backward()
    torch.testing.assert_close(images.grad, images.detach(), atol=1e-9, rtol=0)
    low = random_images((2, 1, 2, 2), torch.float64).requires_grad_()
    details = dwt2(images.detach(), 2, wavelet).details
    assert torch.autograd.gradcheck(lambda x: idwt2(Subbands(x, details, wavelet)), low)


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_the_approximation_alone_is_the_same(wavelet):
    images = random_images((2, 3, 16, 24))
    assert approximation(images, 0) is images
    for levels in (1, 2, 3):
        assert torch.allclose(approximation(images, levels, wavelet), dwt2(images, levels, wavelet).approximation)


def test_fewer_details_give_the_coarser_band():
    images = random_images((2, 3, 16, 16))
    deep, shallow = dwt2(images, 3, "db2"), dwt2(images, 1, "db2")
    partial = idwt2(Subbands(deep.approximation, deep.details[:2], "db2"))
    torch.testing.assert_close(partial, shallow.approximation, atol=5e-6, rtol=0)
    assert torch.equal(idwt2(Subbands(images, (), "db2")), images)


def test_haar_by_hand():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])
    low, (detail,) = dwt2(image, 1).approximation, dwt2(image, 1).details
    assert low.item() == pytest.approx((1 + 2 + 3 + 8) / 2)
    assert detail.horizontal.item() == pytest.approx((1 + 2 - 3 - 8) / 2)  # the upper minus the lower row
    assert detail.vertical.item() == pytest.approx((1 - 2 + 3 - 8) / 2)  # the left minus the right column
    assert detail.diagonal.item() == pytest.approx((1 - 2 - 3 + 8) / 2)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_haar_low_band_is_the_block_mean(levels):
    images = random_images((2, 3, 16, 24))
    means = torch.nn.functional.avg_pool2d(images, 2**levels)
    torch.testing.assert_close(dwt2(images, levels).approximation, 2**levels * means, atol=5e-6, rtol=0)
    constant = dwt2(torch.full((1, 1, 16, 16), 0.3), levels)
    torch.testing.assert_close(constant.approximation, torch.full_like(constant.approximation, 0.3 * 2**levels))
    assert all(band.abs().max() < 1e-6 for detail in constant.details for band in detail)


@pytest.mark.parametrize("wavelet", ["Haar", "", "db39", "bior2.2", "rbio1.3", "dmey", "mexh"])
def test_a_filter_without_orthonormal_transform_is_refused(wavelet):
    with pytest.raises(ValueError, match=rf"wavelet='{wavelet}' .* choose one of: .*haar"):
        dwt2(torch.zeros(1, 1, 8, 8), 1, wavelet)


@pytest.mark.parametrize(
    ("images", "levels", "message"),
    [
        (torch.zeros(1, 1, 8, 8), 0, "levels=0 must be at least 1"),
        (torch.zeros(1, 1, 8, 8), -1, "levels=-1 must be at least 1"),
        (torch.zeros(1, 1, 7, 8), 1, r"7x8 are not divisible by 2\*\*levels=2; pad"),
        (torch.zeros(1, 1, 8, 12), 3, r"8x12 are not divisible by 2\*\*levels=8; pad"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1, r"dtype torch.uint8; expected floating \(B, C, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.complex64), 1, "complex64; expected floating"),
        (torch.zeros(1, 8, 8), 1, r"shape \(1, 8, 8\).*expected floating \(B, C, H, W\)"),
    ],
)
def test_errors_name_value_and_rule(images, levels, message):
    with pytest.raises(ValueError, match=message):
        dwt2(images, levels)


def test_details_of_the_wrong_order_are_refused():
    subbands = dwt2(torch.zeros(1, 1, 16, 16), 2)
    with pytest.raises(ValueError, match="do not match the approximation.*coarse to fine"):
        idwt2(Subbands(subbands.approximation, subbands.details[::-1]))
    wide = Detail(*(torch.zeros(1, 3, 4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\).*\(1, 1, 4, 4\)"):
        idwt2(Subbands(subbands.approximation, (wide,)))
