"""image_rows: which images become rows, in order, whoever reads them."""

import numpy as np

from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.image_rows import batches_of, examples_of, kept_of, total_of
from hf_spectral_dp.privacy.units import FirstRows


def listed(count: int, broken: int) -> list[dict]:
    images = [np.full((16, 16), 20 * index, dtype=np.uint8) for index in range(count)]
    return [{"image": b"no image" if i == broken else image, "who": f"p{i // 3}"} for i, image in enumerate(images)]


def test_broken_images_and_those_beyond_a_limit_are_left_out_across_batches():
    data, units = listed(8, broken=1), FirstRows("who", 2)
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    values, names, reasons = [], [], 0
    for batch in batches_of(examples_of(data, ("image", None, None, "who")), 4):
        pixels, kept, why = kept_of(batch, processor, units)
        assert len(pixels) == len(kept)
        values += ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        names += [example[-1] for example in kept]
        reasons += len(why)
    assert values == [0, 40, 60, 80, 120, 140] and names == ["p0", "p0", "p1", "p1", "p2", "p2"] and reasons == 1
    assert units.beyond_limit == 1


def test_a_stream_has_no_length():
    assert total_of([1, 2]) == 2 and total_of(iter([1])) is None
    assert [len(batch) for batch in batches_of(iter([(1,)] * 5), 2)] == [2, 2, 1]
