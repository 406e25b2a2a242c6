"""Exact clipped gradients of any transformers model, without our trainer: DP-SGD on GPT-2-sized text by hand.

    python examples/clip_any_model.py

The engine gives the clipped sum and adds the noise; drawing Poisson batches and counting steps is then yours to do.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hf_spectral_dp.privacy.budget import PrivacyBudget
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.noise import GaussianNoise
from hf_spectral_dp.privacy.sampling import PoissonSampler

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # 124 million weights, tied
# No dropout, or all of it inside privacy.noise.secret_coins(): masks must not follow a seed that others know.
texts = torch.randint(50257, (64, 33))  # your private token rows
plan = PrivacyBudget(epsilon=8.0).calibrate(num_examples=len(texts), sampling_rate=0.1, steps=2)
sampler, clipper = PoissonSampler(len(texts), plan.sampling_rate), PerExampleClipper(model, clipping_norm=1.0)
noise = GaussianNoise(plan.noise_multiplier * clipper.sensitivity)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(plan.steps):
    for rows in texts[sampler.next_batch()].split(4):  # micro-batches: any size gives the same sum

        def losses(rows=rows):
            logits = model(input_ids=rows[:, :-1].contiguous(), use_cache=False).logits
            return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)  # one per example

        clipper.add(losses, len(rows))
    sums = clipper.take()
    noise.add_(sums.values())
    for name, parameter in clipper.parameters.items():
        parameter.grad = sums[name] / plan.expected_batch_size  # a public constant, not len(rows)
    optimizer.step()
    print(f"step {step + 1}: epsilon {plan.epsilon(step + 1):.4f} at delta {plan.delta:.2g}")
