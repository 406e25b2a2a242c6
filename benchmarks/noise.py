"""What the noise costs: drawing it, as a share of a whole step of the demo's model at the demo's batch size.

A step here is what the mechanism does: clipped per-example gradients of one expected batch, micro-batch by micro-batch,
and the noise on their sum (the optimizer comes on top and would make the share smaller). Both ciphers, and the path of
GPUs where there is one; medians of interleaved rounds, so that a slow moment of the machine hits all.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.report import write_report
from benchmarks.timing import interleaved
from hf_spectral_dp import bundled_model
from hf_spectral_dp.privacy import noise
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.noise import GaussianNoise, describe_randomness
from hf_spectral_dp.self_audit import random_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ends within 50 seconds on two cores")
    parser.add_argument("--out", help="file for the JSON report")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with open("examples/configs/demo.yaml", encoding="utf-8") as file:
        training = yaml.safe_load(file)["training"]
    batch, micro = training["expected_batch_size"], training["micro_batch_size"]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = AutoModelForCausalLM.from_pretrained(bundled_model("digits")).train().to(device)
    rows = random_rows(model.config, batch).to(device)
    clipper = PerExampleClipper(model, training["clipping_norm"])
    sums = clipper.take()

    def step() -> None:
        for part in rows.split(micro):
            clipper.add(lambda part=part: model.per_example_loss(part), len(part))
        clipper.take()

    methods: dict[str, Callable[[], object]] = {"step": step}
    fastest = noise._cipher()
    for cipher in (noise._AesCounter, noise._ChaCha20):
        noise._cipher = lambda cipher=cipher: cipher
        mechanism = GaussianNoise(1.0, device, secure_mode=True)
        name = describe_randomness(mechanism.source)["generator"]
        name += " (default)" if cipher is fastest and device == "cpu" else ""
        methods[name] = partial(mechanism.add_, sums.values())
    if device == "cuda":
        mechanism = GaussianNoise(1.0, device)
        name = f"{describe_randomness(mechanism.source)['generator']} (default)"
        methods[name] = partial(mechanism.add_, sums.values())

    times = interleaved(methods, 3 if arguments.quick else 21, device)
    whole = statistics.median(times.pop("step"))
    report = [
        {
            "method": name,
            "parameters": sum(total.numel() for total in sums.values()),
            "batch": batch,
            "noise_ms": round(1e3 * statistics.median(taken), 2),
            "clipped_sum_ms": round(1e3 * whole, 1),
            "share_of_step": round(statistics.median(taken) / (whole + statistics.median(taken)), 4),
        }
        for name, taken in times.items()
    ]
    write_report("python -m benchmarks.noise" + " --quick" * arguments.quick, report, arguments.out)


if __name__ == "__main__":
    main()
