"""An assessment measures what it says, lists every look at private images, and its figures fit onto the card."""

import dataclasses
import json

import pytest
import torch
from assessment_parts import owners_assessment, real_images, strangers_assessment, tiny_pipeline
from card_reports import changed, report
from PIL import Image

from hf_spectral_dp import (
    PrivacyCard,
    SpectralConfig,
    SpectralImageProcessor,
    SpectralTokenizerForCausalLM,
)
from hf_spectral_dp import assessment as assessment_module
from hf_spectral_dp.assessment import Assessment, assess, for_the_card
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.membership import auroc_limit, auroc_limit_of
from hf_spectral_dp.privacy.budget import event_from_dict
from hf_spectral_dp.privacy.consequences import privacy_pairs
from hf_spectral_dp.real_images import RealImages, read_real_images
from hf_spectral_dp.report import render_report


@pytest.fixture(scope="module")
def owners() -> Assessment:
    return owners_assessment()


@pytest.fixture(scope="module")
def strangers() -> Assessment:
    return strangers_assessment()


def test_everything_is_measured_and_noise_shows_no_copying(owners):
    assert owners.generated == 100 and owners.samples.shape == (60, 1, 12, 12)
    assert len(owners.utility) == 3 and {row["metric"] for row in owners.quality} >= {"kernel_distance", "coverage"}
    assert list(owners.leakage) == ["this model", "without privacy"] and not owners.left_out
    own, twin = owners.leakage.values()
    assert own.membership == twin.membership and own.copying == twin.copying  # the same model, the same seed
    assert not own.copying.flagged and own.copying.training == 120 and own.copying.heldout == 110
    assert all(0.35 < result.auroc < 0.65 for result in own.membership)


def test_the_strip_grows_to_the_image_itself(owners):
    captions = [caption for caption, _ in owners.strips]
    assert captions == ["4 of 8 tokens", "8 of 8 tokens", "detail by super-resolution"]
    assert [images.shape[-1] for _, images in owners.strips] == [6, 6, 12]
    assert len({len(images) for _, images in owners.strips}) == 1


def test_looks_at_private_images_are_listed_and_public_ones_are_none(owners, strangers):
    private = [access["what"] for access in owners.accesses if access["private"]]
    assert len(private) == 4 and all(not access["accounted"] for access in owners.accesses if access["private"])
    assert any("training images" in what for what in private) and any("pictures" in what for what in private)
    assert not any(access["private"] for access in strangers.accesses)
    assert strangers.panel is None and not strangers.leakage and "owner" in strangers.left_out["memorisation"]


def test_a_test_that_misses_copies_gives_no_verdict(owners, strangers):
    leak = owners.leakage["this model"]
    blind = dataclasses.replace(leak, copies_noticed=leak.copying)
    noticed = dataclasses.replace(leak.copying, share_p=1e-9)
    seeing = dataclasses.replace(leak, copies_noticed=noticed)
    copied = dataclasses.replace(blind, copying=noticed)
    assert [some.verdict for some in (blind, seeing, copied)] == ["unknown", "none", "signs"]
    for some, said in ((blind, "no verdict: copies that were put in"), (seeing, "no sign of copying")):
        card = for_the_card(dataclasses.replace(owners, leakage={"this model": some}), report())
        assert said in next(row["note"] for row in card["audit"] if "neighbours" in row["attack"])
    assert "cannot tell" in render_report(dataclasses.replace(owners, leakage={"this model": blind}), report())


def test_figures_are_plain_and_hold_no_picture(owners):
    text = json.dumps(owners.to_dict(), allow_nan=False)
    figures = json.loads(text)
    assert set(figures) >= {"quality", "utility", "leakage", "accesses", "evidence"} and len(text) < 50_000
    assert figures["leakage"]["this model"]["copying"]["flagged"] is False
    assert not {"samples", "strips", "panel"} & set(figures)


def test_the_card_takes_the_figures_with_their_marks(owners, strangers):
    before = report()
    card = PrivacyCard(for_the_card(owners, before)).report
    new = [row for row in card["utility"] if row["dataset"] == "held out"]
    assert len(new) >= 3 + 8 and all(row["private"] and not row["accounted"] for row in new)
    assert {row["dataset"] for row in card["utility"]} == {"held out", before["utility"][0]["dataset"]}
    attacks = [row for row in card["audit"] if row["verdict"] == "evidence only"]
    assert len(attacks) == 1 + 5 and all("not a guarantee" in row["note"] for row in attacks)
    event, claim = event_from_dict(before["accounting"]["event"]), before["claim"]
    limit = auroc_limit_of(privacy_pairs(event, before["adjacency"]["relation"]))  # as the page has it
    limits = [row["claimed"] for row in attacks if row["quantity"] == "AUROC"]
    assert len(limits) == 5 and all(abs(found - limit) < 1e-4 for found in limits)
    assert 0.5 < limit < auroc_limit(claim["epsilon"], claim["delta"])  # one pair says less than all
    persons = for_the_card(owners, changed(before, ("unit", "level"), "person"))
    assert all(row["claimed"] is None for row in persons["audit"] if row["quantity"] == "AUROC")  # these are of rows
    looks = [access["what"] for access in card["data_accesses"] if not access["accounted"]]
    assert sum("held out" in what for what in looks) == 2 and not any("pictures" in what for what in looks)
    assert PrivacyCard(for_the_card(owners, card)).report == card  # once more changes nothing
    public = PrivacyCard(for_the_card(strangers, before)).report
    measured = [row for row in public["utility"] if row["dataset"] == "public"]
    assert measured and all(not row["private"] and row["accounted"] for row in measured)
    assert public["data_accesses"] == before["data_accesses"] and public["audit"] == before["audit"]


def test_a_choice_on_private_images_is_accounted_but_not_by_the_claim():
    assessment = assess(
        tiny_pipeline(), real_images(60, 0, "public", public=True), private_validation=real_images(50, 2, "validation"),
        selection_epsilon=1.0, num_images=60, seeds=1, steps=4,
    )  # fmt: skip
    (look,) = [access for access in assessment.accesses if access["private"]]
    assert look["accounted"] and "epsilon 1, on top of the claim" in look["what"]
    card = PrivacyCard(for_the_card(assessment, report())).report
    spent = {"what": look["what"], "accounted": False, "released": True}
    assert card["data_accesses"].count(spent) == 1
    again = PrivacyCard(for_the_card(assessment, card)).report
    assert again["data_accesses"].count(spent) == 2  # every choice is paid for
    accuracies = [row for row in card["utility"] if "classifier" in row["metric"] and row["dataset"] == "public"]
    assert accuracies and all(row["private"] for row in accuracies)


def test_images_of_all_sizes_are_read_and_broken_ones_left_out():
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    rows = [{"image": Image.new("L", (8 + n, 30), n), "label": n} for n in range(5)]
    rows.append({"image": b"no image", "label": 1})
    with pytest.warns(UserWarning, match="1 images could not be read"):
        found = read_real_images(rows, processor, "mixed", label_column="label")
    assert found.pixels.shape == (5, 1, 16, 16) and found.labels.tolist() == [0, 1, 2, 3, 4] and found.unreadable == 1
    assert found.resized == 5
    assert len(read_real_images(rows[:5], processor, "mixed", limit=3).pixels) == 3
    with pytest.raises(ValueError, match="no column 'picture'; it has image, label"):
        read_real_images(rows, processor, "mixed", image_column="picture")
    with pytest.raises(ValueError, match="no image that can be read"):
        read_real_images(rows[5:], processor, "broken")
    with pytest.raises(ValueError, match="label 'cat' in row 0"):
        read_real_images([{"image": rows[0]["image"], "label": "cat"}], processor, "named", label_column="label")


def test_classes_with_names_are_numbered_as_in_training(tmp_path):
    """Sub-folders are numbered by the alphabet, and by those that exist; the model by the list it was trained with."""
    for name, level in (("malignant", 200), ("benign", 40)):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("L", (12, 12), level).save(tmp_path / "test" / name / "0.png")
    processor, names = SpectralImageProcessor(image_size=16, num_channels=1, pad=2), ["malignant", "healthy", "benign"]

    def read(**given) -> RealImages:
        return read_real_images(load_images(str(tmp_path), "test"), processor, "x", label_column="label", **given)

    found = read(class_names=names)
    bright = found.pixels[:, :, 8, 8].flatten() > 0
    assert dict(zip(found.labels.tolist(), bright.tolist(), strict=True)) == {0: True, 2: False}
    assert sorted(read().labels.tolist()) == [0, 1]
    with pytest.warns(UserWarning, match="none of the 2 images read is of class 1;"):
        found.check_fits(SpectralConfig(num_classes=3, class_names=names))
    with pytest.raises(ValueError, match="label 'benign' in row .* is none of the model's class_names"):
        read(class_names=["malignant"])


def test_a_choice_that_cannot_be_made_is_refused_before_an_image_is_drawn(monkeypatch):
    monkeypatch.setattr(assessment_module, "draw_images", lambda *args: pytest.fail("images were drawn"))
    private = real_images(50, 2, "validation")
    unlabelled = RealImages("validation", private.pixels, None, False, 0)
    cases = ((private, None, "give both"), (None, 1.0, "give both"), (unlabelled, 1.0, "no labels"))
    for given, epsilon, message in cases:
        with pytest.raises(ValueError, match=message):
            assess(tiny_pipeline(), real_images(60, 0), private_validation=given, selection_epsilon=epsilon)


def test_what_cannot_be_measured_is_said():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="give training"):
        assess(pipeline, real_images(100, 0), show_private=True)
    with pytest.raises(ValueError, match="give training"):
        assess(pipeline, real_images(100, 0), twin=pipeline.model)
    other = SpectralConfig(image_size=16, num_channels=1, levels=2, patch_sizes=[2, 2], codebook_sizes=[8, 8])
    for twin in (torch.nn.Linear(1, 1), SpectralTokenizerForCausalLM(other)):
        with pytest.raises(ValueError, match="of other tokens than the model"):
            assess(pipeline, real_images(100, 0), training=real_images(100, 1), twin=twin)
    with pytest.raises(ValueError, match="num_images=49"):
        assess(pipeline, real_images(100, 0), num_images=49)
    unlabelled = RealImages("noise", real_images(99, 0).pixels, None, False, 0)
    found = assess(pipeline, unlabelled, training=real_images(120, 1), num_images=50, steps=1, seeds=1)
    assert "labels" in found.left_out["utility"] and "99 held-out" in found.left_out["memorisation"]
