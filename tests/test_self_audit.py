"""The audit of the installation: canaries are what they are said to be, the twin is caught."""

import torch

from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.self_audit import _WithCanaries, one_run_audit, random_rows, tiny_model


def test_a_canary_is_the_clipping_norm_in_a_coordinate_of_its_own():
    model = tiny_model()
    audited = _WithCanaries(model, 5)
    rows = random_rows(model.config, 3)
    canaries = torch.zeros(2, rows.shape[1], dtype=torch.long)
    canaries[:, 0] = torch.tensor([-1 - 3, -1 - 5])  # canary 3, and one that was left out
    clipper = PerExampleClipper(audited, 0.5)

    def total(batch):
        clipper.add(lambda: audited.per_example_loss(batch), len(batch))
        return clipper.take()

    alone, with_canaries = total(rows), total(torch.cat([rows, canaries]))
    expected = torch.zeros(6, 1)
    expected[3] = 0.5
    torch.testing.assert_close(with_canaries.pop("table.weight"), expected)
    assert not alone.pop("table.weight").any()
    for name, value in alone.items():
        torch.testing.assert_close(with_canaries[name], value)


def test_one_run_below_the_claim_and_the_twin_above():
    private, twin = one_run_audit(1.0), one_run_audit(1.0, noise=False)
    assert private.claimed <= 1.0 and not private.refuted
    assert twin.lower_bound >= 3 and twin.refuted and twin.accuracy > 0.95
