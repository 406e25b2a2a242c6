"""Captions: each schema is read, and a row shows its own captions only, each as often as the others."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from text_parts import CAPTIONS, SLOTS, WIDTH, text_encoder, text_model

from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.captions import captions_of
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.text_encoder import encode_text
from hf_spectral_dp.token_store import TokenStore, build_token_store


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def processor():
    return SpectralImageProcessor(image_size=16, num_channels=3)


def pictures(count: int) -> list[Picture.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Picture.fromarray(each) for each in pixels]


def build(rows, folder, encoder, processor, caption_column="captions", **options) -> TokenStore:
    model = text_model()
    words = dict(zip(("text_encoder", "tokenizer"), encoder, strict=True))
    return build_token_store(
        rows, model, processor, folder, caption_column=caption_column, progress=False, **words, **options
    )


def states_of(encoder, captions: list[str]) -> torch.Tensor:
    return encode_text(*encoder, captions, SLOTS)


def which(shown: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Which of the expected texts each shown is. (The size of the encoder's batch moves the last bits of float16.)"""
    distances = torch.cdist(shown.float().flatten(1), expected.float().flatten(1))
    assert (distances.amin(1) < 0.02).all(), "a text that is none of the row's own"
    return distances.argmin(1).tolist()


# -- how captions are written down -------------------------------------------------------------------------------------


def test_every_schema_by_hand():
    assert captions_of("  a red circle\n") == ["a red circle"]
    assert captions_of(["a", " ", "b"]) == captions_of(np.array(["a", "b"])) == ["a", "b"]
    assert captions_of([{"raw": "a", "sentid": 3}, {"caption": "b", "id": 1}]) == ["a", "b"]
    assert captions_of(None) == captions_of("") == captions_of([]) == captions_of([None, ""]) == []
    for value in (3, [3], {"words": "a"}, [["a"], 4.0]):
        with pytest.raises(ValueError, match="is no caption"):
            captions_of(value)


def as_faces(folder):
    """One column of text, in Parquet."""
    features = Features({"image": Image(), "caption": Value("string")})
    data = {"image": pictures(6), "caption": CAPTIONS[:6]}
    Dataset.from_dict(data, features=features).to_parquet(folder / "train.parquet")
    return load_images(str(folder), "train"), "caption", [[caption] for caption in CAPTIONS[:6]]


def as_coco_on_the_hub(folder):
    """A column of lists, of different lengths."""
    captions = [CAPTIONS[index : 2 * index] for index in range(6)]
    features = Features({"image": Image(), "captions": [Value("string")]})
    data = {"image": pictures(6), "captions": captions}
    Dataset.from_dict(data, features=features).to_parquet(folder / "train.parquet")
    return load_images(str(folder), "train"), "captions", captions


def as_coco_on_disk(folder):
    """A folder of images and COCO's own annotations, in any order."""
    (folder / "train2017").mkdir()
    images, annotations, captions = [], [], []
    for index, picture in enumerate(pictures(6)):
        picture.save(folder / "train2017" / f"{index:012d}.png")
        images.insert(0, {"id": 100 + index, "file_name": f"{index:012d}.png", "height": 16, "width": 16})
        captions.append(CAPTIONS[index : 2 * index])
        annotations += [{"image_id": 100 + index, "id": 7, "caption": caption} for caption in captions[-1]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    rows = load_images(str(folder / "train2017"), "train", caption_files=str(folder / "captions.json"))
    return rows, "captions", captions


def as_mm_celeba_hq(folder):
    """A folder of images, and one text file of the same name for each, a caption a line; one is missing."""
    for name in ("images", "text"):
        (folder / name).mkdir()
    captions = []
    for index, picture in enumerate(pictures(6)):
        picture.save(folder / "images" / f"{index}.png")
        captions.append(CAPTIONS[index : 2 * index])
        if captions[-1]:
            (folder / "text" / f"{index}.txt").write_text("\n".join(captions[-1]) + "\n\n")
    rows = load_images(str(folder / "images"), "train", caption_files=str(folder / "text"))
    return rows, "captions", captions


@pytest.mark.parametrize("schema", [as_faces, as_coco_on_the_hub, as_coco_on_disk, as_mm_celeba_hq])
def test_every_schema_becomes_rows_that_show_their_own_captions(schema, encoder, processor, tmp_path):
    (tmp_path / "data").mkdir()
    rows, column, captions = schema(tmp_path / "data")
    store = build(rows, tmp_path / "store", encoder, processor, column)
    assert len(store) == 6 and store.verify()
    assert store.unit == "one row of the training data (one image with all its captions)"
    plain = build_token_store(pictures_as_rows(6), text_model(text_width=0), processor, tmp_path / "plain")
    assert torch.equal(store[range(6)]["input_ids"], plain[range(6)]["input_ids"])  # the images, in their order
    for index, own in enumerate(captions):
        expected = states_of(encoder, own or [""])
        shown = store[[index] * 40]["text_states"]
        assert shown.shape == (40, SLOTS, WIDTH) and shown.dtype == torch.float16
        assert set(which(shown, expected)) == set(range(len(expected)))
    assert store.report["uncaptioned"] == sum(not own for own in captions)
    assert store.report["captions"] == len({caption for own in captions for caption in own})


def pictures_as_rows(count):
    return [{"image": picture} for picture in pictures(count)]


def rows_with(captions):
    return [{"image": p, "captions": c} for p, c in zip(pictures(len(captions)), captions, strict=True)]


# -- what a row shows --------------------------------------------------------------------------------------------------


def test_each_caption_is_as_likely_as_the_others_and_draws_are_independent(encoder, processor, tmp_path):
    store = build(rows_with([CAPTIONS[:4], CAPTIONS[4:6]]), tmp_path / "store", encoder, processor)
    drawn = which(store[[0, 1] * 4000]["text_states"], states_of(encoder, CAPTIONS[:6]))
    pairs = Counter(zip(drawn[::2], drawn[1::2], strict=True))
    # Eight equally likely pairs, 500 each of 4,000: six deviations are 126.
    assert len(pairs) == 8 and all(abs(count - 500) < 126 for count in pairs.values())


def test_a_caption_is_kept_once_at_its_length_and_in_no_words(encoder, processor, tmp_path):
    store = build(rows_with([["a red circle"], ["blue", "a red circle"], None]), tmp_path / "store", encoder, processor)
    assert (tmp_path / "store" / "captions.f16").stat().st_size == (3 + 1) * WIDTH * 2
    for path in (tmp_path / "store").iterdir():
        assert b"circle" not in path.read_bytes()
    assert not store[2]["text_states"].any() and store[2]["text_states"].shape == (SLOTS, WIDTH)


def test_many_chunks_persons_broken_images_and_a_copy(encoder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_spectral_dp.row_file.ROWS_PER_CHUNK", 8)
    rows = rows_with([[CAPTIONS[index % 12]] for index in range(30)])
    rows = [{**row, "person": index // 3} for index, row in enumerate(rows)]
    rows.insert(5, {"image": b"broken", "captions": ["of nobody"], "person": 1})
    options = {"unit_column": "person", "max_rows_per_unit": 2, "batch_size": 7}
    store = build(rows, tmp_path / "store", encoder, processor, **options)
    kept = [index for index in range(30) if index % 3 < 2]
    assert len(store) == 20 and store.verify() and store.report["captions"] == len({index % 12 for index in kept})
    expected = states_of(encoder, [CAPTIONS[index % 12] for index in kept])
    for found in (store, pickle.loads(pickle.dumps(store))):
        torch.testing.assert_close(found[np.arange(20)]["text_states"], expected, atol=5e-3, rtol=0)
    assert store[[]]["text_states"].shape == (0, SLOTS, WIDTH)


def test_the_fingerprint_sees_captions(encoder, processor, tmp_path):
    kinds = ([["red"], ["blue"]], [["blue"], ["red"]], [["red"], ["green"]], [["red", "blue"], []], [["red"], ["blue"]])
    prints = [build(rows_with(each), tmp_path / str(i), encoder, processor).fingerprint for i, each in enumerate(kinds)]
    assert len(set(prints)) == 4 and prints[0] == prints[4]


def test_damage_is_noticed(encoder, processor, tmp_path):
    store = build(rows_with([["red"], ["blue"]]), tmp_path / "store", encoder, processor)
    path = tmp_path / "store" / "captions.f16"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert not TokenStore.load(store.folder).verify()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="captions.f16 does not hold 2 states"):
        TokenStore.load(store.folder)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_anything_is_read(encoder, processor, tmp_path):
    def untouched():
        pytest.fail("an image was read")
        yield

    with pytest.raises(ValueError, match="caption_column='captions' and text_width=0"):
        build_token_store(
            untouched(), text_model(text_width=0), processor, tmp_path / "store", caption_column="captions"
        )
    with pytest.raises(ValueError, match="caption_column=None and text_width=8"):
        build_token_store(untouched(), text_model(), processor, tmp_path / "store")
    with pytest.raises(ValueError, match="text_encoder=None"):
        build_token_store(untouched(), text_model(), processor, tmp_path / "store", caption_column="captions")
    with pytest.raises(ValueError, match="caption_column='text' is not a column of the data.*captions"):
        build(Dataset.from_list([{"image": None, "captions": "a"}]), tmp_path / "store", encoder, processor, "text")
    assert not list(tmp_path.iterdir())


def test_a_bad_caption_leaves_nothing_behind(encoder, processor, tmp_path):
    with pytest.raises(ValueError, match="3.5 is no caption"):
        build(rows_with([["red"], 3.5]), tmp_path / "store", encoder, processor)
    assert not list(tmp_path.iterdir())


def test_another_encoder_is_refused(encoder, processor, tmp_path):
    store = build(rows_with([["red"]]), tmp_path / "store", encoder, processor)
    store.captions.check_encoder(*encoder)
    other = text_encoder(tmp_path / "other")
    with torch.no_grad():
        next(other[0].parameters()).add_(1)
    with pytest.raises(ValueError, match="went through text encoder .*build the token store again"):
        store.captions.check_encoder(*other)


def test_caption_files_that_belong_to_nothing_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "text").mkdir()
    pictures(1)[0].save(tmp_path / "images" / "0.png")
    images, text = str(tmp_path / "images"), str(tmp_path / "text")
    with pytest.raises(ValueError, match="captions for none of the 1 images"):
        load_images(images, "train", caption_files=text)
    with pytest.raises(ValueError, match="split='test'.*use 'train'"):
        load_images(images, "test", caption_files=text)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_images(images, "train", caption_files=str(tmp_path / "nowhere"))
    (tmp_path / "images" / "again").mkdir()
    (tmp_path / "text" / "0.txt").write_text("one")
    pictures(1)[0].save(tmp_path / "images" / "again" / "0.png")
    with pytest.raises(ValueError, match="several images in .* are called '0'.*one would show another's"):
        load_images(images, "train", caption_files=text)
    (tmp_path / "images" / "again" / "0.png").unlink()
    (tmp_path / "other.json").write_text('{"captions": []}')
    with pytest.raises(ValueError, match="does not hold COCO's captions.*images"):
        load_images(images, "train", caption_files=str(tmp_path / "other.json"))
