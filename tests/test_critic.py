"""ClassCritic: what it learns privately, from features alone, and what it then says of public images."""

import pytest
import torch
import torch.nn.functional as F
from critic_parts import blobs, network

from hf_spectral_dp import ClassCritic, DPTrainer, DPTrainingArguments
from hf_spectral_dp.critic import draw_by_choice
from hf_spectral_dp.feature_rows import RowsInMemory, critic_arguments
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.trainer import LEDGER


def fitted(features: torch.Tensor, classes: int = 3) -> ClassCritic:
    critic = ClassCritic.on(network(), classes)
    critic.fit(features)
    return critic


def test_whitened_public_features_have_no_preferred_direction():
    features, _ = blobs(4000)
    features[:, 5] = 7.0  # a feature that never varies tells nothing, and must not become a direction of noise
    critic = fitted(features)
    white = (features - critic.mean) @ critic.whitening
    assert white.mean(0).abs().max() < 1e-3
    covariance = white.T @ white / len(white)
    still = covariance.diagonal().argmin()
    assert torch.isfinite(white).all() and covariance[still, still] < 1e-4
    covariance = covariance[torch.arange(6) != still][:, torch.arange(6) != still]
    assert covariance.diagonal().min() > 0.9 and covariance.diagonal().max() < 1.001  # the floor holds the weak ones
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-2


def test_too_few_public_images_are_refused():
    with pytest.raises(ValueError, match=r"5 public images for 6 features; give at least as many"):
        fitted(blobs(5)[0])


def test_the_loss_is_cross_entropy_and_a_row_without_a_class_teaches_nothing():
    features, labels = blobs()
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight)
    rows = rows_of(features, labels)
    rows[:50, 0] = -1
    losses = critic.per_example_loss(rows)
    assert torch.allclose(losses[50:], F.cross_entropy(critic.classify(features[50:]), labels[50:], reduction="none"))
    losses[:50].sum().backward()
    assert losses[:50].eq(0).all() and critic.regression.weight.grad.eq(0).all()


def test_before_training_all_classes_are_alike_and_clipping_scales_all_rows_alike():
    """By hand: the gradient of a row is (p - onehot) times (feature, 1): of length sqrt(2/3) * sqrt(2) for three."""
    features, labels = blobs()
    critic = fitted(features)
    assert critic.classify(features).softmax(1).allclose(torch.tensor(1 / 3))
    clipper = PerExampleClipper(critic, 1.0)
    rows = rows_of(features, labels)
    clipper.add(lambda: critic.per_example_loss(rows), len(rows))
    white = F.normalize((features - critic.mean) @ critic.whitening, dim=1)
    expected = (1 / 3 - F.one_hot(labels, 3).float()).T @ white / (4 / 3) ** 0.5
    assert torch.allclose(clipper.take()["regression.weight"], expected, atol=1e-4)


def test_private_training_tells_the_classes_apart(tmp_path):
    """Twenty noisy full batches at epsilon 2 of 300 rows, on features it was not trained on."""
    features, labels = blobs(300)
    critic = fitted(blobs(2000, seed=1)[0])
    data = RowsInMemory(rows_of(features, labels))
    trainer = DPTrainer(critic, arguments(tmp_path, target_epsilon=2.0), data)
    trainer.train()
    others, truth = blobs(500, seed=2)
    assert (critic.classify(others).argmax(1) == truth).float().mean() > 0.8
    assert 1.98 < trainer.epsilon_spent <= 2 and read_ledger(tmp_path / LEDGER)["charged"] == 20


def test_the_likeliest_images_of_a_class_come_first():
    features, _ = blobs(40)
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight, generator=torch.Generator().manual_seed(0))
    chosen = critic.likeliest(features, 0.1)
    assert chosen.shape == (3, 4)
    shares = critic.classify(features).softmax(1)
    for label in range(3):
        assert shares[chosen[label], label].tolist() == sorted(shares[:, label].tolist(), reverse=True)[:4]
    assert critic.likeliest(features, 0.001).shape == (3, 1)
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"share={share} must be in \(0, 1\]"):
            critic.likeliest(features, share)


def test_a_saved_critic_says_the_same(tmp_path):
    features, _ = blobs()
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight)
    critic.save_pretrained(tmp_path)
    again, images = ClassCritic.from_pretrained(tmp_path), torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.equal(again.classify(features), critic.classify(features))
    assert torch.equal(again(images), critic(images)) and not again.training


def test_the_network_is_a_public_one_and_stays_as_it_is(tmp_path):
    """Its weights and its running statistics, whatever the trainer does; the regression alone is trained."""
    public = network()
    critic = fitted(blobs(2000, seed=1)[0])
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.equal(critic.features(images), public.features(images))
    features, labels = blobs(60)
    trainer = DPTrainer(critic, arguments(tmp_path, target_epsilon=2.0), RowsInMemory(rows_of(features, labels)))
    trainer.train()
    critic.train()
    assert torch.equal(critic.features(images), public.features(images))
    assert trainer.privacy_report()["training"]["trainable_parameters"] == 3 * (6 + 1)


def test_a_critic_has_the_marks_of_its_network():
    public = network()
    assert ClassCritic.on(public, 2).config.private_runs is None
    public.config.private_runs = ["ab"]
    assert ClassCritic.on(public, 2).config.private_runs == ["ab"]


class Eager:
    """Images are numbers: a score, and above 0.8 the class of all places. Keeps what it was shown."""

    def __init__(self, drawn: torch.Tensor):
        self.drawn, self.asked, self.settled = drawn, [], []

    def draw(self, places: torch.Tensor, attempt: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((attempt, places.tolist()))
        numbers = self.drawn[places, attempt]
        return torch.stack([numbers, places.double()], 1), numbers

    def judge(self, shown, labels, generator):
        return shown, (shown <= 0.8).long()

    def kept(self, **changes) -> list[list[float]]:
        count, attempts = self.drawn.shape
        labels = torch.zeros(count, dtype=torch.long)
        given = {"labels": labels, "count": count, "attempts": attempts, "batch_size": 7} | changes
        return draw_by_choice(self, self.draw, **given, on_kept=self.settled.append).tolist()


def test_in_every_place_the_first_good_image_stays_or_the_best():
    """Against an explicit loop; no place is drawn for after it is settled, and no batch is larger than asked."""
    drawn = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    critic, expected, shown = Eager(drawn), [], 0
    for place, row in enumerate(drawn.tolist()):
        good = next((number for number in row if number > 0.8), None)
        shown += 4 if good is None else row.index(good) + 1
        expected.append([max(row) if good is None else good, place])
    assert critic.kept() == expected
    assert sum(len(places) for _, places in critic.asked) == shown < drawn.numel()
    assert max(len(places) for _, places in critic.asked) == 7 and [a for a, _ in critic.asked][-1] == 3
    assert sum(critic.settled) == 40
    assert critic.kept(attempts=1) == [[row[0], place] for place, row in enumerate(drawn.tolist())]


def test_a_good_image_stays_though_a_worse_one_scored_higher_and_a_score_that_is_no_number_is_kept_once():
    class Odd(Eager):
        def judge(self, shown, labels, generator):
            scores = torch.where(shown == 0.5, 9.0, torch.where(shown == 0.1, torch.nan, shown))
            return scores, (shown <= 0.8).long()

    assert Odd(torch.tensor([[0.5, 0.9], [0.1, 0.1], [0.1, 0.2], [0.7, 0.6]], dtype=torch.double)).kept() == [
        [0.9, 0], [0.1, 1], [0.1, 2], [0.7, 3]
    ]  # fmt: skip


class Sorter(Eager):
    """Images are numbers in [0, 4): a class before the point, a score after it; of 3 and above it tells nothing."""

    def draw(self, places: torch.Tensor, attempt: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((attempt, places.tolist()))
        return self.drawn[places, attempt], self.drawn[places, attempt]

    def judge(self, shown, labels, generator):
        return shown % 1, torch.where(shown < 3, shown.long(), -1)


def by_hand(critic: Sorter, labels: list[int], batch_size: int) -> tuple[list[float], int]:
    """The images that stay, by an explicit loop over places, and how many were drawn."""
    count, attempts = critic.drawn.shape
    stays: list = [None] * count
    settled, drawn = set(), 0
    for attempt in range(attempts):
        waiting = [place for place in range(count) if place not in settled]
        while waiting := [place for place in waiting if place not in settled]:
            places, waiting = waiting[:batch_size], waiting[batch_size:]
            images = [critic.drawn[place, attempt].item() for place in places]
            drawn += len(images)
            for place, image in zip(places, images, strict=True):
                if int(image) == labels[place]:
                    stays[place] = image
                    settled.add(place)
            own, left = set(settled), []
            for label in range(3):
                for place, image in zip(places, images, strict=True):
                    if place in own or int(image) != label or (attempt + 1 == attempts and stays[place] is None):
                        continue
                    vacant = [other for other in range(count) if labels[other] == label and other not in settled]
                    if vacant:
                        settled.add(vacant[0])
                        left.append((vacant[0], image))
            gone = {image for _, image in left}
            for place, image in zip(places, images, strict=True):
                if place in settled or image in gone:
                    continue
                if stays[place] is None or image % 1 > stays[place] % 1:
                    stays[place] = image
            for place, image in left:
                stays[place] = image
    return stays, drawn


@pytest.mark.parametrize("attempts", [1, 2, 6])
@pytest.mark.parametrize("seed", range(5))
def test_what_shows_another_class_goes_to_a_place_that_waits_for_it(seed, attempts):
    """Against an explicit loop; no image stays twice, every place has one, and fewer are drawn than without."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(50, attempts, generator=generator, dtype=torch.double) * 4
    labels = torch.randint(3, (50,), generator=generator)
    critic = Sorter(drawn)
    kept = critic.kept(labels=labels)
    expected, shown = by_hand(critic, labels.tolist(), 7)
    assert kept == expected and len(set(kept)) == 50
    assert sum(len(places) for _, places in critic.asked) == shown
    assert all(len(places) <= 7 for _, places in critic.asked) and sum(critic.settled) == 50
    right = sum(int(image) == label for image, label in zip(kept, labels.tolist(), strict=True))
    alone = sum((drawn[place].long() == label).any().item() for place, label in enumerate(labels.tolist()))
    assert right > alone if attempts == 2 else right >= alone  # one attempt leaves nothing to give


def test_a_class_is_shown_where_no_other_is_likelier():
    features, _ = blobs()
    critic = fitted(features)
    torch.nn.init.normal_(critic.regression.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.arange(60) % 3
    scores, shown = critic.judge(images, labels)
    likely = critic(images).softmax(1)
    assert torch.allclose(scores.exp(), likely[torch.arange(60), labels])
    assert (likely[torch.arange(60), shown, None] >= likely).all()
    assert 0 < (shown == labels).sum() < 60


def rows_of(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels[:, None].float(), features], 1)


def arguments(folder, **changes) -> DPTrainingArguments:
    chosen = {"target_epsilon": 2.0, "target_delta": None, "learning_rate": 5.0, "use_cpu": True, "disable_tqdm": True}
    return critic_arguments(str(folder), **chosen | changes)
