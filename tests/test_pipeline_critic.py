"""A pipeline with a critic: of several images for a label, the one that the critic finds likeliest to show it."""

import json
import subprocess
import sys

import pytest
import torch
from card_reports import COMPOSED, report
from critic_parts import network
from pipeline_parts import coarse_model, pipeline, seeded
from pipeline_parts import network as super_resolution

from hf_spectral_dp import ClassCritic, MeanCritic, PrivacyCard
from hf_spectral_dp.assessment import draw_images
from hf_spectral_dp.pipeline_spectral import DPSpectralPipeline
from hf_spectral_dp.released_files import hash_released
from hf_spectral_dp.sampling import step
from hf_spectral_dp.super_resolution import upscale


def critic(classes: int = 10) -> ClassCritic:
    """One with opinions of its own."""
    made = ClassCritic.on(network(), classes)
    torch.nn.init.normal_(made.regression.weight, std=5.0, generator=torch.Generator().manual_seed(0))
    return made


def test_an_image_that_the_critic_takes_for_a_class_that_nobody_wants_is_drawn_again():
    """Against a loop over places; the last attempts are for those that still wait, the likeliest image stays there."""
    pipe = pipeline(scales=2, super_resolution=super_resolution(), critic=critic())
    labels = torch.full((40,), 3)
    drawn = pipe(class_labels=labels, attempts=4, generator=seeded(), output_type="latent").images
    generator, waiting, candidates = seeded(), list(range(40)), {place: [] for place in range(40)}
    for _ in range(4):
        coarse = pipe.model.decode(pipe.model.sample(labels[waiting], generator=generator))
        with torch.no_grad():
            likely = pipe.critic(upscale(pipe.super_resolution, coarse)).softmax(1)
        for place, image, row in zip(waiting, coarse, likely, strict=True):
            candidates[place].append((row[labels[place]].item(), row.argmax() == labels[place], image))
        waiting = [place for place in waiting if not candidates[place][-1][1]]
    for place, images in candidates.items():
        likeliest = max(images, key=lambda found: found[0])
        assert torch.equal(drawn[place], images[-1][2] if images[-1][1] else likeliest[2])
    tries = [len(images) for images in candidates.values()]
    assert 0 < len(waiting) < 40 and min(tries) == 1


def test_where_several_classes_are_asked_for_more_images_show_theirs():
    """What the critic takes for another class of the call has its place there; each image is in one place."""
    pipe = pipeline(scales=2, super_resolution=super_resolution(), critic=critic())
    labels = torch.arange(40) % 10

    def shown(asked: torch.Tensor) -> torch.Tensor:
        images = pipe(class_labels=asked, attempts=4, generator=seeded(), output_type="latent").images
        assert len(images.flatten(1).unique(dim=0)) == len(asked)
        with torch.no_grad():
            return pipe.critic(upscale(pipe.super_resolution, images)).argmax(1) == asked

    alone = sum(int(shown(torch.full((4,), label)).sum()) for label in range(10))
    assert shown(labels).sum() > alone


def test_small_batches_a_compiled_step_and_progress_are_for_a_critic_too(monkeypatch):
    """Batches keep their size where another would be compiled anew; the images are as many, each for its label."""
    pipe, sizes = pipeline(scales=2, super_resolution=super_resolution(), critic=critic()), []
    sample = pipe.model.sample

    def recorded(labels, count, **given):
        sizes.append(count)
        return sample(labels, count, **given)

    monkeypatch.setattr(pipe.model, "sample", recorded)
    asked = {"class_labels": torch.arange(10), "attempts": 3, "batch_size": 4, "output_type": "latent"}
    assert len(pipe(**asked, generator=seeded()).images) == 10
    assert sizes[0] == 10 and max(sizes[1:]) == 4 > min(sizes[1:])  # the first checks the inputs
    sizes.clear()
    monkeypatch.setattr(pipe.model, "_compiled_step", step)
    assert len(pipe(**asked, generator=seeded()).images) == 10
    assert set(sizes[1:]) == {4}


@pytest.mark.parametrize("given", [{"attempts": 1, "class_labels": [1, 2]}, {"num_images": 2}])
def test_where_there_is_nothing_to_choose_a_critic_changes_nothing(given):
    """One attempt, or no label, where a saved number of attempts does not count."""
    with_critic, without = pipeline(critic=critic(), attempts=3), pipeline()
    first = with_critic(**given, generator=seeded(), output_type="latent").images
    assert torch.equal(first, without(**given, generator=seeded(), output_type="latent").images)


def mean_critic() -> MeanCritic:
    made = MeanCritic.on(network())
    torch.nn.init.normal_(made.exponent, std=5.0, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3, 4, 5]])
def test_a_critic_that_knows_no_classes_chooses_with_labels_and_without(tmp_path, labels):
    pipe = pipeline(scales=2, super_resolution=super_resolution(), critic=mean_critic(), attempts=4)
    asked = {"num_images": 6} if labels is None else {"class_labels": labels}
    drawn = pipe(**asked, generator=seeded(), output_type="latent").images
    classes = None if labels is None else torch.tensor(labels)
    generator, candidates, scores = seeded(), [], []
    for _ in range(4):
        candidates.append(pipe.model.decode(pipe.model.sample(classes, 6, generator=generator)))
        scores.append(pipe.critic.judge(upscale(pipe.super_resolution, candidates[-1]), classes, generator)[0])
    best = torch.stack(scores, 1).argmax(1)
    assert torch.equal(drawn, torch.stack([candidates[attempt][row] for row, attempt in enumerate(best.tolist())]))
    assert len(set(best.tolist())) > 1
    pipe.save_pretrained(tmp_path)
    again = DPSpectralPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(**asked, generator=seeded(), output_type="latent").images, drawn)
    assert len(pipe(**asked, num_scales=1).images) == 6  # the saved number holds for whole images only


def test_attempts_need_labels_with_a_critic_too():
    with pytest.raises(ValueError, match="attempts=3 need class_labels"):
        pipeline(scales=3, critic=critic())(num_images=2, attempts=3)


def test_a_critic_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"num_classes=3 in the critic but 10 in the model"):
        pipeline(critic=critic(3))


def test_a_critic_is_saved_released_and_loaded(tmp_path):
    pipe = pipeline(critic=critic(), attempts=3)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["critic"] == ["hf_spectral_dp.critic", "ClassCritic"]
    again = DPSpectralPipeline.from_pretrained(tmp_path)
    images = [some(class_labels=[4, 5], generator=seeded(), output_type="latent").images for some in (pipe, again)]
    assert torch.equal(*images)
    assert "critic/model.safetensors" in {entry["path"] for entry in hash_released(tmp_path)}


def test_a_critic_needs_a_card_that_counts_its_run(tmp_path):
    """Private training made it: beside a card of one run alone its cost would be nowhere."""
    with pytest.raises(ValueError, match=r"released lists a critic.*earlier_runs=\[\] counts no such run"):
        PrivacyCard(report() | {"released": [{"path": "critic/x", "bytes": 1, "sha256": "0" * 64}]})
    counted = report(COMPOSED)["mechanism"]["earlier_runs"][1]["ledger_head"]
    for run, problem in ((None, "'None'"), ("f" * 64, "'ffffffffffff'"), (counted, None)):
        pipe = pipeline(critic=critic(), attempts=3)
        pipe.critic.config.private_runs = run and [run]
        pipe.save_pretrained(tmp_path / str(run))
        if problem is None:
            assert PrivacyCard(report(COMPOSED)).save(tmp_path / str(run)).verify(tmp_path / str(run)) == []
        else:
            with pytest.raises(ValueError, match=f"critic/config.json names the private run {problem}, which the card"):
                PrivacyCard(report(COMPOSED)).save(tmp_path / str(run))
            assert not (tmp_path / str(run) / "privacy.json").exists()


@pytest.mark.parametrize("part", ["model", "super_resolution"])
def test_a_network_of_a_private_run_needs_a_card_that_counts_that_run(tmp_path, part):
    """Also without the critic beside it: what it knows cost as much."""
    pipe = pipeline(super_resolution=super_resolution())
    getattr(pipe, part).config.private_runs = [report(COMPOSED)["mechanism"]["earlier_runs"][0]["ledger_head"]]
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{part}/config.json names the private run '000.*does not count"):
        PrivacyCard(report()).save(tmp_path)
    assert not (tmp_path / "privacy.json").exists()
    card = PrivacyCard(report(COMPOSED)).save(tmp_path)
    assert card.verify(tmp_path) == []
    alone = PrivacyCard({**report(), "released": card.report["released"]})
    assert alone.checks(tmp_path)["networks are public or counted"] != []
    with pytest.raises(ValueError, match="came out of the private run '000.*publication.publish"):
        getattr(pipe, part).push_to_hub("owner/name")
    with pytest.raises(ValueError, match="came out of the private run '000.*publication.publish"):
        getattr(pipe, part).save_pretrained(tmp_path / "alone", push_to_hub=True)
    assert not (tmp_path / "alone").exists()


def test_in_half_precision_the_critic_judges_in_full(tmp_path):
    pipeline(super_resolution=super_resolution(), critic=critic(), attempts=3).save_pretrained(tmp_path)
    half = DPSpectralPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert {value.dtype for value in half.critic.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert half(class_labels=[3, 4], generator=seeded()).images[0].size == (16, 16)


def test_a_critic_judges_the_private_model_and_no_control():
    """It is private: images of a public model that it had chosen from would be no floor. Its attempts go with it."""
    pipe = pipeline(scales=3, critic=critic(), attempts=3)
    other = coarse_model(scales=3)
    ours, _ = draw_images(pipe, pipe.model, 20, seed=0, batch_size=20)
    labels = torch.arange(10).repeat_interleave(2)
    expected = pipe(class_labels=labels, generator=seeded(), output_type="pt", batch_size=20).images * 2 - 1
    assert torch.equal(ours, expected)
    control, _ = draw_images(pipe, other, 20, seed=0, batch_size=20)
    alone = pipeline(scales=3)
    expected = alone(class_labels=labels, generator=seeded(), output_type="pt", batch_size=20).images * 2 - 1
    assert torch.equal(control, expected)


@pytest.mark.parametrize("kind", ["ClassCritic", "MeanCritic"])
def test_a_saved_pipeline_finds_its_critic_in_a_new_process(tmp_path, kind):
    """diffusers loads a part only if its module was imported; a user imports the pipeline alone."""
    made = critic() if kind == "ClassCritic" else MeanCritic.on(network())
    pipeline(super_resolution=super_resolution(), critic=made, attempts=2).save_pretrained(tmp_path / "saved")
    code = (
        "from hf_spectral_dp import DPSpectralPipeline;"
        f"pipe = DPSpectralPipeline.from_pretrained({str(tmp_path / 'saved')!r});"
        "print(type(pipe.critic).__name__, len(pipe(class_labels=[1, 2]).images))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout.split() == [kind, "2"], ran.stderr[-2000:]


@pytest.mark.parametrize("kind", ["classes", "mean"])
def test_a_pipeline_that_is_cast_chooses_nearly_as_before(kind):
    made = critic() if kind == "classes" else MeanCritic.on(network())
    torch.nn.init.normal_(made.regression.weight if kind == "classes" else made.exponent)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = made(images)
        cast = pipeline(super_resolution=super_resolution(), critic=made, attempts=2).to(torch.bfloat16)
        assert torch.allclose(cast.critic(images).float(), before, atol=0.1 * float(before.std()) + 0.05)
    assert len(cast(class_labels=[1, 2]).images) == 2


def test_what_is_no_critic_is_refused():
    with pytest.raises(ValueError, match="critic is a Linear; use a ClassCritic or a MeanCritic"):
        pipeline(critic=torch.nn.Linear(1, 1))
