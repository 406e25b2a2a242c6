"""On a GPU: the same guarantee, tokens and images as on a CPU. Skipped where there is none."""

import copy
import math

import pytest
import torch
from conftest import sequences, tiny_model, wild
from training_parts import Rows, arguments

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, SpectralImageProcessor
from hf_spectral_dp.privacy.audit import mechanism_audit
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.noise import secret_coins

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def explicit(model, rows: torch.Tensor, clipping_norm: float) -> list[torch.Tensor]:
    """Clipped gradient of each row by a loop in float64 on the CPU: one flat vector per row."""
    exact, found = copy.deepcopy(model).cpu().double(), []
    for row in rows.cpu():
        gradients = torch.autograd.grad(exact.per_example_loss(row[None]).sum(), list(exact.parameters()))
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        found.append(flat * min(1.0, clipping_norm / float(flat.norm())))
    return found


def flat(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([total.flatten() for total in sums.values()]).double().cpu()


def test_what_a_model_draws_there_is_secret_and_leaves_the_seeded_generator_alone():
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        with secret_coins("cuda"):
            drawn.append(torch.rand(2000, device="cuda"))
        after = torch.rand(3, device="cuda")
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3, device="cuda"), after)
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 6 / 2000**0.5


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_sums_are_those_of_a_loop_and_no_share_exceeds_the_norm(precision, scale):
    """Also where products of float32 may be taken in TensorFloat-32."""
    model = wild(tiny_model()).cuda().train()
    rows, bound = sequences(model, 12).cuda(), scale
    clipper, before = PerExampleClipper(model, bound), torch.get_float32_matmul_precision()
    expected = explicit(model, rows, bound)
    torch.set_float32_matmul_precision(precision)
    try:
        clipper.add(lambda: model.per_example_loss(rows), len(rows))
        together = flat(clipper.take())
        for row in rows:
            clipper.add(lambda row=row: model.per_example_loss(row[None]), 1)
            assert flat(clipper.take()).norm() <= clipper.sensitivity
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = torch.stack(expected).sum(0)
    assert (together - wanted).norm() / wanted.norm() < (1e-4 if precision == "highest" else 2e-2)


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"tf32": True}, {"lora_rank": 2}, {"secure_mode": True}])
def test_a_run_spends_its_budget(tmp_path, changes):
    chosen = {"use_cpu": False, "ema_decay": 0.5, "save_strategy": "steps", "save_steps": 3} | changes
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, **chosen), Rows())
    trainer.train()
    report = trainer.privacy_report()
    assert 0.99 * 8 < report["claim"]["epsilon"] == trainer.epsilon_spent <= 8
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    again = DPTrainer(tiny_model(), arguments(tmp_path, **chosen), Rows())  # the averaged weights come back, too
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3 and again.privacy_report()["mechanism"]["charged_steps"] == 6


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_release_withstands_the_audit_and_one_with_less_noise_does_not(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        audit = mechanism_audit(1.0, 1.0, 5_000, 20, device="cuda")
        assert [finding for finding in audit.findings if finding.refuted] == []
        assert mechanism_audit(0.9, 1.0, 5_000, 20, device="cuda").refuted
    finally:
        torch.set_float32_matmul_precision(before)


def test_tokens_and_images_are_those_of_a_cpu():
    model = wild(tiny_model())
    images = torch.rand(50, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens, there = model.codec.encode(images), copy.deepcopy(model).cuda()
    same = there.codec.encode(images.cuda()).cpu() == tokens
    assert same.float().mean() > 0.999  # a patch in the middle between two code words may go to either
    torch.testing.assert_close(there.decode(tokens.cuda()).cpu(), model.decode(tokens), rtol=0, atol=1e-5)
    rows = sequences(model, 6)
    torch.testing.assert_close(
        there.per_example_loss(rows.cuda()).cpu(), model.per_example_loss(rows), rtol=1e-3, atol=1e-3
    )


def test_sampling_on_the_gpu_follows_the_distribution_of_the_model():
    model = wild(tiny_model(), 0.2).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    count = 20000
    first = model.sample(torch.zeros(count, dtype=torch.long), generator=generator, num_tokens=1)[:, 0].cpu()
    start = model.start_tokens(torch.zeros(1, dtype=torch.long))
    chances = model(start[:, None], use_cache=False).logits[0, -1].softmax(0).detach().cpu()
    for code in range(16):
        share, chance = float((first == code).float().mean()), float(chances[code])
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / count) + 1e-4


def test_a_pipeline_draws_the_same_images_from_the_same_seed_on_the_gpu():
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    pipe = DPSpectralPipeline(wild(tiny_model()), processor).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    first, second = (
        pipe(
            class_labels=[1, 2], num_images=2, generator=torch.Generator("cuda").manual_seed(3), output_type="pt"
        ).images
        for _ in range(2)
    )
    assert torch.equal(first, second) and first.shape[0] == 4
