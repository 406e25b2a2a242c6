"""Token store: rows equal direct encoding, broken images cost one row each, all or nothing on disk."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.hostile_images import run as run_hostile
from hf_spectral_dp import image_decoding
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.views import Views


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture
def processor() -> SpectralImageProcessor:
    return SpectralImageProcessor(image_size=16)


@pytest.fixture
def rows(random_images) -> list[dict]:
    return [{"image": Image.fromarray(image), "label": i % 10} for i, image in enumerate(random_images)]


def build(dataset, model, processor, folder, **options) -> TokenStore:
    return build_token_store(dataset, model, processor, folder, progress=False, **options)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_rows_equal_direct_encoding(rows, grey_model, processor, tmp_path, batch_size):
    store = build(rows, grey_model, processor, tmp_path / "store", label_column="label", batch_size=batch_size)
    ids = store[np.arange(40)]["input_ids"]
    tokens = grey_model.codec.encode(processor([row["image"] for row in rows])["pixel_values"])
    assert ids.dtype == torch.int64
    torch.testing.assert_close(ids[:, 1:], tokens)
    assert ids[:, 0].tolist() == [grey_model.config.class_token_ids[row["label"]] for row in rows]
    assert store.report == {"images": 40, "undecodable": 0, "unlabelled": 0} and len(store) == 40


def test_every_kind_of_dataset_gives_the_same_rows(random_images, grey_model, processor, tmp_path):
    columns = {
        "image": [{"bytes": encoded(image), "path": None} for image in random_images],
        "label": [i % 10 for i in range(40)],
        "note": ["unused"] * 40,
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10), "note": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    plain = [{"image": image, "label": i % 10} for i, image in enumerate(random_images)]
    sources = {"table": table, "stream": table.to_iterable_dataset(), "list": plain, "generator": iter(plain)}
    prints = {
        build(source, grey_model, processor, tmp_path / name, label_column="label").fingerprint
        for name, source in sources.items()
    }
    assert len(prints) == 1


def test_indexing(rows, grey_model, processor, tmp_path):
    store = build(rows, grey_model, processor, tmp_path / "store", label_column="label")
    everything = store[np.arange(40)]["input_ids"]
    wanted = np.array([3, 3, 39, 0])
    torch.testing.assert_close(store[wanted]["input_ids"], everything[[3, 3, 39, 0]])
    torch.testing.assert_close(store[5]["input_ids"], everything[5])
    assert store[np.array([], dtype=np.int64)]["input_ids"].shape == (0, store.row_length)
    assert store[[]]["input_ids"].shape == (0, store.row_length)
    for wrong in ([40], [-1]):
        with pytest.raises(IndexError):
            store[wrong]
    with pytest.raises(TypeError, match="nonzero"):
        store[np.ones(40, dtype=bool)]


def test_rows_cross_chunks(grey_model, processor, tmp_path, monkeypatch, random_images):
    monkeypatch.setattr("hf_spectral_dp.row_file.ROWS_PER_CHUNK", 16)
    rows = [{"image": image} for image in random_images]
    small = build(rows, grey_model, processor, tmp_path / "small", batch_size=7)
    monkeypatch.undo()
    large = build(rows, grey_model, processor, tmp_path / "large")
    assert [len(chunk) for chunk in small._chunks] == [16, 16, 8] and [len(chunk) for chunk in large._chunks] == [40]
    assert small.fingerprint == large.fingerprint and small.verify()
    torch.testing.assert_close(small[np.arange(40)], large[np.arange(40)])


def test_a_broken_image_costs_one_row(random_images, grey_model, processor, tmp_path, caplog):
    caplog.set_level("INFO", "hf_spectral_dp.token_store")
    good = [{"image": encoded(image), "label": 1} for image in random_images]
    bad = [b"", b"junk", None, good[0]["image"][:60], np.full((4, 4), np.nan), np.zeros((0, 3), np.uint8)]
    mixed = [*good[:10], *({"image": image, "label": 1} for image in bad), *good[10:]]
    store = build(mixed, grey_model, processor, tmp_path / "mixed", label_column="label")
    clean = build(good, grey_model, processor, tmp_path / "clean", label_column="label")
    assert store.report == {"images": 40, "undecodable": len(bad), "unlabelled": 0}
    assert store.fingerprint == clean.fingerprint
    with_broken, without = (record.getMessage() for record in caplog.records)
    assert with_broken == without and "images that cannot be decoded" in without  # whether there are any is private


@pytest.mark.slow
def test_hostile_images_cost_neither_a_row_nor_the_machine():
    """The short form of `python -m benchmarks.hostile_images`: 300 images in a process of its own."""
    row = run_hostile(300)
    assert row["failed"] == 0, row
    assert row["tried"] == 300 and 150 < row["kept"] < 250


def test_no_two_large_images_are_in_memory_at_once(grey_model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "_PIXELS_AT_ONCE", 1000)
    sizes, largest = [30, 10, 40, 10, 10, 10, 50], []
    original = processor.preprocess
    monkeypatch.setattr(
        processor, "preprocess", lambda images, **options: (largest.append(len(images)), original(images, **options))[1]
    )
    images = [{"image": np.full((side, side), side, np.uint8)} for side in sizes]
    store = build(images, grey_model, processor, tmp_path / "store")
    assert largest == [3, 4]  # at most 1000 pixels, and one image more
    monkeypatch.undo()
    assert store.fingerprint == build(images, grey_model, processor, tmp_path / "plain").fingerprint


def test_not_one_decodable_image_is_an_error_and_leaves_nothing(grey_model, processor, tmp_path):
    with pytest.raises(ValueError, match="not one image.*2 were tried"):
        build([{"image": b"junk"}] * 2, grey_model, processor, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_row_are_said_to_have_none(grey_model, processor, tmp_path):
    with pytest.raises(ValueError, match=r"0 were tried\. Check image_column and the source"):
        build([], grey_model, processor, tmp_path / "store")


def test_class_names_that_no_image_has_are_refused_and_leave_nothing(rows, grey_model, processor, tmp_path):
    """A typing error would spend a whole budget on a model that learns no class."""
    named = [row | {"label": ["benign", "malignant"][row["label"] % 2]} for row in rows]
    (tmp_path / ".store-incomplete").mkdir()
    (tmp_path / ".store-incomplete" / "tokens.arrow").write_bytes(b"of a process that was killed")
    with pytest.raises(ValueError, match=r"not one image has a class: label_column='label' holds none of .*'Benign'"):
        build(named, grey_model, processor, tmp_path / "store", label_column="label", class_names=["Benign", "Malign"])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_label_gives_the_null_token(random_images, grey_model, processor, tmp_path):
    labels = [None, -1, 3.0]  # numbers as a column of CSV with an empty cell gives them
    rows = [{"image": image, "label": label} for image, label in zip(random_images, labels, strict=False)]
    store = build(rows, grey_model, processor, tmp_path / "store", label_column="label")
    null, third = grey_model.config.null_token_id, grey_model.config.class_token_ids[3]
    assert store[np.arange(3)]["input_ids"][:, 0].tolist() == [null, null, third]
    assert store.report["unlabelled"] == 2


@pytest.mark.parametrize("label", [10, -2, "cat", 1.5])
def test_a_label_outside_the_classes_is_an_error(random_images, grey_model, processor, tmp_path, label):
    rows = [{"image": random_images[0], "label": label}]
    with pytest.raises(ValueError, match="0..9"):
        build(rows, grey_model, processor, tmp_path / "store", label_column="label")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streaming", [True, False])
def test_the_numbers_of_classes_do_not_follow_the_folders_that_there_are(
    random_images, grey_model, processor, tmp_path, streaming
):
    """One image of a class of its own is left out: all other rows must stay what they are."""
    for index, image in enumerate(random_images[:7]):
        folder = tmp_path / "images" / ("anthrax" if index == 0 else "benign" if index < 4 else "unlisted")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    kept = []
    for run in range(2):
        rows = load_images(str(tmp_path / "images"), "train", streaming=streaming)
        with pytest.raises(ValueError, match="sub-folders.*give class_names, the public list"):
            build(rows, grey_model, processor, tmp_path / "none", label_column="label")
        named = {"label_column": "label", "class_names": ["healthy", "anthrax", "benign"]}
        store = build(rows, grey_model, processor, tmp_path / f"{run}", **named)
        kept.append(store[np.arange(len(store))]["input_ids"])
        shutil.rmtree(tmp_path / "images" / "anthrax", ignore_errors=True)
    classes, null = grey_model.config.class_token_ids, grey_model.config.null_token_id
    assert kept[0][:, 0].tolist() == [classes[1], *[classes[2]] * 3, *[null] * 3]
    assert torch.equal(kept[0][1:], kept[1])


def test_classes_that_are_text_are_numbered_by_the_list(random_images, grey_model, processor, tmp_path):
    rows = [{"image": random_images[index], "what": what} for index, what in enumerate(["b", "a", None, "c"])]
    store = build(rows, grey_model, processor, tmp_path / "store", label_column="what", class_names=["a", "b"])
    classes, null = grey_model.config.class_token_ids, grey_model.config.null_token_id
    assert store[np.arange(4)]["input_ids"][:, 0].tolist() == [classes[1], classes[0], null, null]
    with pytest.raises(ValueError, match="label 1 is a number without a name; leave out class_names"):
        build([rows[0] | {"what": 1}], grey_model, processor, tmp_path / "no", label_column="what", class_names=["a"])


class Unread:
    """A source that must not be touched."""

    features = datasets.Features(
        {
            "image": datasets.Image(), "many": datasets.ClassLabel(num_classes=11), "text": datasets.Value("string"),
            "number": datasets.Value("int64"),
        }  # fmt: skip
    )

    def __iter__(self):
        raise AssertionError("data were read")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_column": "img"}, "image_column='img'.*'image'"),
        ({"label_column": "age"}, "label_column='age'"),
        ({"label_column": "many"}, "11 classes.*num_classes=10"),
        ({"label_column": "text"}, "label_column='text' holds text; give class_names"),
        ({"label_column": "text", "class_names": ["a", "a"]}, "a list of different names"),
        ({"label_column": "text", "class_names": list("abcdefghijk")}, "at most the model's num_classes=10"),
        ({"class_names": ["a"]}, "label_column=None: give a list"),
        ({"label_column": "number", "class_names": ["a"]}, "label_column='number' holds numbers without names"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_work_fails_before_reading(grey_model, processor, tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        build(Unread(), grey_model, processor, tmp_path / "store", **options)


def test_model_and_processor_must_fit(grey_model, colour_model, processor, tmp_path):
    with pytest.raises(ValueError, match="image_size=8"):
        build(Unread(), grey_model, SpectralImageProcessor(image_size=8), tmp_path / "store")
    with pytest.raises(ValueError, match="num_channels=1"):
        build(Unread(), colour_model, processor, tmp_path / "store")
    with pytest.raises(ValueError, match="num_classes=0"):
        colour = SpectralImageProcessor(image_size=16, num_channels=3)
        build(Unread(), colour_model, colour, tmp_path / "store", label_column="many")


def test_a_store_is_never_overwritten_unasked(rows, grey_model, processor, tmp_path):
    first = build(rows, grey_model, processor, tmp_path / "store")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        build(Unread(), grey_model, processor, tmp_path / "store")
    second = build(rows[:5], grey_model, processor, tmp_path / "store", overwrite=True)
    assert len(first) == 40 and len(second) == 5 and len(TokenStore.load(tmp_path / "store")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        build(Unread(), grey_model, processor, tmp_path / "other", overwrite=True)


def test_an_interrupted_build_leaves_nothing(rows, grey_model, processor, tmp_path):
    def interrupted():
        yield from rows[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(interrupted(), grey_model, processor, tmp_path / "store", batch_size=4)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_sees_pixels_labels_and_order(rows, grey_model, processor, tmp_path):
    variants = [rows, rows[::-1], rows[:39], [{**rows[0], "label": 9}, *rows[1:]]]
    prints = [
        build(variant, grey_model, processor, tmp_path / str(i), label_column="label").fingerprint
        for i, variant in enumerate(variants)
    ]
    assert len(set(prints)) == 4


def test_the_codec_is_checked(rows, grey_model, processor, tmp_path):
    store = build(rows, grey_model, processor, tmp_path / "store")
    store.check_codec(grey_model)
    other = type(grey_model)(grey_model.config)
    with pytest.raises(ValueError, match="build the store again"):
        store.check_codec(other)


def test_damage_is_noticed(rows, grey_model, processor, tmp_path):
    store = build(rows, grey_model, processor, tmp_path / "store")
    assert store.verify()
    tokens = tmp_path / "store" / "tokens.arrow"
    content = bytearray(tokens.read_bytes())
    content[-100] ^= 1
    del store
    tokens.write_bytes(content)
    assert not TokenStore.load(tmp_path / "store").verify()
    facts = json.loads((tmp_path / "store" / "store.json").read_text())
    facts["report"]["images"] = 41
    (tmp_path / "store" / "store.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="holds 40 rows, not 41"):
        TokenStore.load(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="build_token_store"):
        TokenStore.load(tmp_path / "nothing")


def test_a_store_travels_to_workers_by_its_path(rows, grey_model, processor, tmp_path):
    store = build(rows, grey_model, processor, tmp_path / "store")
    content = pickle.dumps(store)
    assert len(content) < 500
    torch.testing.assert_close(pickle.loads(content)[[7]], store[[7]])


def test_a_failing_build_does_not_hang_the_exit(tmp_path, random_images):
    """Even on a stream that `datasets` itself opened and that is left half read by an error."""
    images = [{"bytes": encoded(image), "path": None} for image in random_images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images * 20, "label": [99] * 800}, features=features)
    table.to_parquet(tmp_path / "train.parquet", batch_size=50)
    code = f"""
import datasets
from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.token_store import build_token_store
model = SpectralTokenizerForCausalLM(SpectralConfig(num_classes=10))
stream = datasets.load_dataset({str(tmp_path)!r}, split="train", streaming=True)
build_token_store(stream, model, SpectralImageProcessor(), {str(tmp_path / "store")!r}, label_column="label")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "label 99" in done.stderr, done.stderr


def test_a_store_knows_whose_rows_it_holds(random_images, grey_model, processor, tmp_path):
    """Ten persons in turn, three images of each at most; a broken image takes nobody's place."""
    rows = [{"image": image, "who": f"p{i % 10}"} for i, image in enumerate(random_images)]
    rows.insert(0, {"image": b"junk", "who": "p0"})
    store = build(rows, grey_model, processor, tmp_path / "store", unit_column="who", max_rows_per_unit=3, batch_size=7)
    assert store.report == {"images": 30, "undecodable": 1, "unlabelled": 30, "units": 10, "beyond_limit": 10}
    assert store.units.tolist() == [i % 10 for i in range(30)] and store.verify()
    assert store.unit == "all rows with one value of 'who' (a person; at most 3 images of each are used)"
    plain = build(rows[1:31], grey_model, processor, tmp_path / "plain")
    torch.testing.assert_close(store[np.arange(30)], plain[np.arange(30)])
    assert plain.units is None and "one image" in plain.unit
    moved = [{**row, "who": "p0"} if i == 5 else row for i, row in enumerate(rows)]
    other = build(moved, grey_model, processor, tmp_path / "other", unit_column="who", max_rows_per_unit=4)
    assert other.fingerprint != store.fingerprint != plain.fingerprint


def test_units_cross_chunks(grey_model, processor, tmp_path, monkeypatch, random_images):
    monkeypatch.setattr("hf_spectral_dp.row_file.ROWS_PER_CHUNK", 16)
    rows = [{"image": image, "who": i // 2} for i, image in enumerate(random_images)]
    store = build(rows, grey_model, processor, tmp_path / "s", batch_size=7, unit_column="who", max_rows_per_unit=2)
    assert store.units.tolist() == [i // 2 for i in range(40)] and store.verify()
    assert pickle.loads(pickle.dumps(store)).units.tolist() == store.units.tolist()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"unit_column": "who"}, "unit_column='who' and max_rows_per_unit=None"),
        ({"max_rows_per_unit": 2}, "unit_column=None and max_rows_per_unit=2"),
        ({"unit_column": "who", "max_rows_per_unit": 2}, "unit_column='who' is not a column"),
    ],
)
def test_units_that_cannot_work_fail_before_reading(grey_model, processor, tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        build(Unread(), grey_model, processor, tmp_path / "store", **options)


def test_an_image_without_a_person_leaves_nothing(random_images, grey_model, processor, tmp_path):
    rows = [{"image": random_images[0], "who": "a"}, {"image": random_images[1], "who": None}]
    with pytest.raises(ValueError, match="who=None names no person"):
        build(rows, grey_model, processor, tmp_path / "store", unit_column="who", max_rows_per_unit=2)
    assert list(tmp_path.iterdir()) == []


def test_a_row_shows_one_of_its_views_at_a_time(rows, grey_model, processor, tmp_path, monkeypatch):
    """Every row shown is the label and the tokens of one view of its own image; in the long run all views are shown."""
    monkeypatch.setattr("hf_spectral_dp.row_file.ROWS_PER_CHUNK", 16)
    views = Views(count=3, rotation=20, shift=0.1)
    store = build(rows, grey_model, processor, tmp_path / "s", label_column="label", views=views, batch_size=7)
    assert len(store) == 40 and store.views == 3 and store.verify() and store.units is None
    assert store.report == {"images": 40, "undecodable": 0, "unlabelled": 0}
    pixels = processor([row["image"] for row in rows])["pixel_values"]
    tokens = torch.stack([grey_model.codec.encode(view) for view in views.of(pixels)], 1)  # (40, 3, T)
    shown = torch.stack([store[np.arange(40)]["input_ids"] for _ in range(200)], 1)
    assert (shown[:, 0, 0] == torch.tensor([grey_model.config.class_token_ids[i % 10] for i in range(40)])).all()
    same = (shown[:, :, None, 1:] == tokens[:, None]).all(-1)  # (40, 200, 3)
    assert same.any(2).all()
    distinct = [index for index in range(40) if len(tokens[index].unique(dim=0)) == 3]
    counts = same[distinct].sum(1)
    assert len(distinct) > 30 and counts.min() > 30 and abs(counts.float().mean() - 200 / 3) < 0.1
    seen = same[distinct].float().argmax(2)
    assert (seen[0] != seen[1]).float().mean() == pytest.approx(2 / 3, abs=0.15)  # each by a coin of its own
    plain = build(rows, grey_model, processor, tmp_path / "plain", label_column="label")
    assert plain.views == 1 and plain.fingerprint != store.fingerprint
    assert pickle.loads(pickle.dumps(store))[5]["input_ids"].shape == (store.row_length,)
