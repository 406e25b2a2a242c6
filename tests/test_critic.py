"""ClassCritic: what it learns privately, from features alone, and what it then says of public images."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from hf_spectral_dp import DPTrainer, DPTrainingArguments
from hf_spectral_dp.critic import ClassCritic, ClassCriticConfig, FeatureRows, features_of
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.token_store import build_token_store
from hf_spectral_dp.trainer import LEDGER


def blobs(rows: int = 300, dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one of three means, with directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    stretch = torch.logspace(-0.5, 0.5, dim)
    features = torch.randn(rows, dim, generator=generator) + 3 * torch.eye(3, dim)[labels]
    return features * stretch + 5, labels


def fitted(features: torch.Tensor, classes: int = 3) -> ClassCritic:
    critic = ClassCritic(ClassCriticConfig(features.shape[1], classes))
    critic.fit(features)
    return critic


def test_whitened_public_features_have_no_preferred_direction():
    features, _ = blobs(4000)
    critic = fitted(features)
    white = (features - critic.mean) @ critic.whitening
    assert white.mean(0).abs().max() < 1e-3
    covariance = white.T @ white / len(white)
    assert covariance.diagonal().min() > 0.9 and covariance.diagonal().max() < 1.001  # the floor holds the weak ones
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-2


def test_too_few_public_images_are_refused():
    with pytest.raises(ValueError, match=r"5 public images for 6 features; give at least as many"):
        fitted(blobs(5)[0])


def test_the_loss_is_cross_entropy_and_a_row_without_a_class_teaches_nothing():
    features, labels = blobs()
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight)
    rows = torch.cat([labels[:, None].float(), features], 1)
    rows[:50, 0] = -1
    losses = critic.per_example_loss(rows)
    assert torch.allclose(losses[50:], F.cross_entropy(critic(features[50:]), labels[50:], reduction="none"))
    losses[:50].sum().backward()
    assert losses[:50].eq(0).all() and critic.regression.weight.grad.eq(0).all()


def test_before_training_all_classes_are_alike_and_clipping_scales_all_rows_alike():
    """By hand: the gradient of a row is (p - onehot) times (feature, 1): of length sqrt(2/3) * sqrt(2) for three."""
    features, labels = blobs()
    critic = fitted(features)
    assert critic(features).softmax(1).allclose(torch.tensor(1 / 3))
    clipper = PerExampleClipper(critic, 1.0)
    rows = torch.cat([labels[:, None].float(), features], 1)
    clipper.add(lambda: critic.per_example_loss(rows), len(rows))
    white = F.normalize((features - critic.mean) @ critic.whitening, dim=1)
    expected = (1 / 3 - F.one_hot(labels, 3).float()).T @ white / (4 / 3) ** 0.5
    assert torch.allclose(clipper.take()["regression.weight"], expected, atol=1e-4)


def test_private_training_tells_the_classes_apart(tmp_path):
    """Twenty noisy full batches at epsilon 2 of 300 rows, on features it was not trained on."""
    features, labels = blobs(300)
    critic = fitted(blobs(2000, seed=1)[0])
    data = RowsInMemory(torch.cat([labels[:, None].float(), features], 1))
    trainer = DPTrainer(critic, arguments(tmp_path, target_epsilon=2.0), data)
    trainer.train()
    others, truth = blobs(500, seed=2)
    assert (critic(others).argmax(1) == truth).float().mean() > 0.8
    assert 1.98 < trainer.epsilon_spent <= 2 and read_ledger(tmp_path / LEDGER)["charged"] == 20


def test_the_likeliest_images_of_a_class_come_first():
    features, _ = blobs(40)
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight, generator=torch.Generator().manual_seed(0))
    chosen = critic.likeliest(features, 0.1)
    assert chosen.shape == (3, 4)
    shares = critic(features).softmax(1)
    for label in range(3):
        assert shares[chosen[label], label].tolist() == sorted(shares[:, label].tolist(), reverse=True)[:4]
    assert critic.likeliest(features, 0.001).shape == (3, 1)
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"share={share} must be in \(0, 1\]"):
            critic.likeliest(features, share)


def test_feature_rows_see_what_the_generator_would_show(tmp_path):
    """Labels, units and features of a store; the features of decoded tokens, not of the images themselves."""
    model, processor = tiny_model().eval(), SpectralImageProcessor(image_size=16, num_channels=1)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (16, 16), generator=generator, dtype=torch.uint8).numpy() for _ in range(7)]
    listed = [
        {"image": image, "label": None if index == 3 else index % 3, "who": f"p{index // 2}"}
        for index, image in enumerate(images)
    ]
    store = build_token_store(
        iter(listed), model, processor, tmp_path / "store", label_column="label", unit_column="who", max_rows_per_unit=2
    )
    seen = []

    def extractor(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown)
        return shown.flatten(1)[:, :5]

    rows = FeatureRows(store, model, features_of(model, None, extractor))
    assert len(rows) == 7 and rows.units.tolist() == [0, 0, 1, 1, 2, 2, 3] and "who" in rows.unit
    assert rows[torch.arange(7)]["input_ids"][:, 0].tolist() == [0, 1, 2, -1, 1, 2, 0]
    tokens = store[torch.arange(7)]["input_ids"][:, 1:]
    assert torch.equal(torch.cat(seen), model.decode(tokens))
    assert torch.equal(rows[[2, 5]]["input_ids"][:, 1:], model.decode(tokens[[2, 5]]).flatten(1)[:, :5])
    assert rows.fingerprint != FeatureRows(store, model, features_of(model, None, lambda x: -extractor(x))).fingerprint


def test_a_saved_critic_says_the_same(tmp_path):
    features, _ = blobs()
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight)
    critic.save_pretrained(tmp_path)
    assert torch.equal(ClassCritic.from_pretrained(tmp_path)(features), critic(features))


class RowsInMemory:
    fingerprint = "blobs"

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[torch.as_tensor(indices)]}


def arguments(folder, **changes) -> DPTrainingArguments:
    chosen = {
        "sampling_rate": 1.0, "max_steps": 20, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 5.0,
        "lr_scheduler_type": "constant", "output_dir": str(folder), "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return DPTrainingArguments(**{**chosen, **changes})
