"""How fast images are drawn: `sample`, plain and compiled, against the bare `generate` of transformers, static cache.

All draw from the same model the same number of tokens, from the whole distribution. `ratio` is to "generate, static
cache" of the same model, batch, guidance and `dtype`; `ratio_to_float32` to that in float32. `generate` guides by a
second pass of its own; ours by one doubled batch. The rows "bfloat16 against float32" say what the precision changes:
the mean Kullback-Leibler divergence per token, in nats, of the distributions that tokens are drawn from, beside their
mean entropy. Timings and ratios are medians of interleaved rounds. `floor_share` is what the hardware would need at
least, over what it needed: the larger of the arithmetic at the speed of a large matrix product and the reading of the
weights at the speed of a large copy, both measured here. "digits" is the model in the package; "wide" has ten times as
many weights, random ones. Further rows give the share of a pipeline's time that passes outside of its models, and the
seconds from the start of a fresh interpreter to the first image of the shipped checkpoint, in wall and processor time.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from benchmarks.bundled import digits_pipeline
from benchmarks.report import write_report
from benchmarks.timing import interleaved, seconds
from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM, bundled_model

BARE = "generate, static cache"


def models(device: str) -> dict[str, SpectralTokenizerForCausalLM]:
    """The shipped model and a wider one with random weights."""
    wide = SpectralConfig(
        image_size=64,
        num_channels=3,
        levels=3,
        patch_sizes=[2, 2, 4],
        codebook_sizes=[512, 512, 1024],
        num_classes=10,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
    )
    torch.manual_seed(0)
    found = {
        "digits": SpectralTokenizerForCausalLM.from_pretrained(bundled_model("digits")),
        "wide": SpectralTokenizerForCausalLM(wide),
    }
    return {name: model.eval().to(device) for name, model in found.items()}


def ratio(bare: list[float], taken: list[float]) -> float:
    """How often faster: the median over the rounds, whose methods met the same load of the machine."""
    return round(statistics.median(one / other for one, other in zip(bare, taken, strict=True)), 2)


def hardware(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine does at best: operations per second of matrix products, and bytes read per second."""
    square = torch.randn(1024, 1024, device=device, dtype=dtype)
    large = torch.randn(2**25, device=device)  # 128 MiB: outside of every cache
    target = torch.empty_like(large)
    product = min(seconds(lambda: square @ square, device) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(large), device) for _ in range(5))
    return 2 * 1024**3 / product, 2 * 4 * large.numel() / copy


def floor(model: SpectralTokenizerForCausalLM, rows: int, speed: tuple[float, float]) -> float:
    """Seconds that `rows` sequences need at least: weights of the layers and of the codes that may follow."""
    layers = sum(weight.numel() for weight in model.model.layers.parameters())
    total = 0.0
    for scale in model.config.layout.scales:
        weights = layers + scale.codes * model.config.hidden_size
        size = model.lm_head.weight.element_size()
        total += scale.tokens * max(2 * weights * rows / speed[0], size * weights / speed[1])
    return total


def methods(
    model: SpectralTokenizerForCausalLM, batch: int, guidance: float, compiled: bool
) -> dict[str, Callable[[], object]]:
    """Every way to draw `batch` images from one model."""
    device = model.device.type
    labels = torch.arange(batch, device=device) % 10
    start = model.start_tokens(labels)[:, None]
    null = torch.full_like(start, model.config.null_token_id)
    guided = {"guidance_scale": guidance, "negative_prompt_ids": null} if guidance != 1.0 else {}

    def generate() -> torch.Tensor:
        options = {"cache_implementation": "static", "do_sample": True, "top_k": 0, "disable_compile": device == "cpu"}
        return model.generate(start, **options, **guided)

    def sample() -> torch.Tensor:
        model._compiled_step = None
        return model.sample(labels, guidance_scale=guidance)

    found: dict[str, Callable[[], object]] = {BARE: generate, "ours": sample}
    if compiled:
        model.compile_sampling()
        step = model._compiled_step

        def sample_compiled() -> torch.Tensor:
            model._compiled_step = step
            return model.sample(labels, guidance_scale=guidance)

        found["ours, compiled"] = sample_compiled
    return found


def speed_rows(
    name: str, models: dict[torch.dtype, SpectralTokenizerForCausalLM], batch: int, guidance: float, compiled: bool,
    rounds: int, speeds: dict[torch.dtype, tuple[float, float]],
) -> list[dict]:  # fmt: skip
    """Images per second of every method and precision for one model and batch, all in the same rounds."""
    torch.compiler.reset()  # it keeps eight compiled forms of a function; beyond, a step would not be compiled
    device = models[torch.float32].device.type
    ways = {(dtype, method): call for dtype, model in models.items()
            for method, call in methods(model, batch, guidance, compiled).items()}  # fmt: skip
    times = interleaved(ways, rounds, device)
    least = {dtype: floor(model, batch * (1 + (guidance != 1.0)), speeds[dtype]) for dtype, model in models.items()}
    return [
        {
            "method": method,
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "guidance": guidance,
            "images_per_second": round(batch / statistics.median(taken), 2),
            "tokens_per_second": round(batch * models[dtype].config.layout.length / statistics.median(taken), 1),
            "ratio": ratio(times[dtype, BARE], taken),
            "ratio_to_float32": ratio(times[torch.float32, BARE], taken),
            "floor_share": round(least[dtype] / statistics.median(taken), 3),
        }
        for (dtype, method), taken in times.items()
    ]


@torch.no_grad()
def precision_row(name: str, models: dict[torch.dtype, SpectralTokenizerForCausalLM], number: int) -> dict:
    """How far the distributions of the next token are apart, along `number` sequences drawn in float32."""
    exact = models[torch.float32]
    labels = torch.arange(number, device=exact.device) % 10
    rows = torch.cat([exact.start_tokens(labels)[:, None], exact.sample(labels)], 1)[:, :-1]
    first, second = (model(rows).logits.float().log_softmax(-1) for model in models.values())
    entropy = -(first.exp() * first).sum(-1)
    divergence = (first.exp() * (first - second)).sum(-1)
    return {
        "method": "bfloat16 against float32",
        "model": name,
        "divergence": float(f"{divergence.mean():.2g}"),
        "largest_divergence": float(f"{divergence.max():.2g}"),
        "entropy": round(float(entropy.mean()), 3),
    }


def overhead_rows(device: str, rounds: int) -> list[dict]:
    """The share of a call of the shipped pipeline that is neither sampling, decoding nor super-resolution."""
    pipe = digits_pipeline().to(device)
    inside = 0.0

    def watch(owner: PreTrainedModel, name: str) -> None:
        method = getattr(owner, name)

        def timed(*arguments, **options):
            nonlocal inside
            result = None

            def call():
                nonlocal result
                result = method(*arguments, **options)

            inside += seconds(call, device)
            return result

        setattr(owner, name, timed)

    watch(pipe.model, "sample")
    watch(pipe.model, "decode")
    watch(pipe.super_resolution, "forward")
    rows = []
    for number in (64, 512):
        shares, whole = [], []
        for index in range(rounds + 1):
            inside = 0.0
            taken = seconds(lambda number=number: pipe(class_labels=range(8), num_images=number // 8), device)
            if index:
                shares.append(1 - inside / taken)
                whole.append(taken)
        rows.append(
            {
                "method": "pipeline, to PIL images",
                "model": "digits with super-resolution",
                "batch": 64,
                "images": number,
                "images_per_second": round(number / statistics.median(whole), 2),
                "outside_models": round(statistics.median(shares), 4),
            }
        )
    return rows


FIRST_IMAGE = """
import sys
from hf_spectral_dp import DPSpectralPipeline
DPSpectralPipeline.from_pretrained(sys.argv[1])(class_labels=3).images[0].save(sys.argv[2])
"""


def first_image_row(rounds: int) -> dict:
    """Fresh processes that load the shipped generator from a folder and save one image, medians."""
    wall, processor = [], []
    with tempfile.TemporaryDirectory() as folder:
        digits_pipeline().save_pretrained(f"{folder}/pipeline")
        for _ in range(rounds):
            before, start = os.times(), time.perf_counter()
            command = [sys.executable, "-c", FIRST_IMAGE, f"{folder}/pipeline", f"{folder}/three.png"]
            subprocess.run(command, check=True, capture_output=True)
            wall.append(time.perf_counter() - start)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            processor.append(used)
    return {
        "method": "start of Python to the first image",
        "model": "digits with super-resolution",
        "batch": 1,
        "seconds": round(statistics.median(wall), 2),
        "processor_seconds": round(statistics.median(processor), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds; within 50 seconds on two cores")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16)
    speeds = {dtype: hardware(arguments.device, dtype) for dtype in dtypes}
    rows: list[dict] = []
    cases = [("digits", 64, 1.0), ("digits", 64, 2.0), ("wide", 64, 1.0)]
    if not arguments.quick:
        cases += [("wide", 64, 2.0), ("wide", 8, 1.0), ("wide", 1, 1.0), ("digits", 1, 1.0)]
    exact = models(arguments.device)
    loaded = {name: {dtype: copy.deepcopy(model).to(dtype) for dtype in dtypes} for name, model in exact.items()}
    for name, batch, guidance in cases:
        compiled = not arguments.quick or (name, guidance) == ("digits", 1.0)
        rounds = 3 if arguments.quick else 5
        rows += speed_rows(name, loaded[name], batch, guidance, compiled, rounds, speeds)
    rows += [precision_row(name, pair, 200) for name, pair in loaded.items()]
    rows += overhead_rows(arguments.device, 5 if arguments.quick else 9)
    rows.append(first_image_row(1 if arguments.quick else 5))
    rows += [
        {
            "method": "the hardware at its best",
            "dtype": str(dtype).removeprefix("torch."),
            "gflop_per_second": round(speed[0] / 1e9, 1),
            "gigabyte_per_second": round(speed[1] / 1e9, 1),
        }
        for dtype, speed in speeds.items()
    ]
    options = " --quick" * arguments.quick + f" --device {arguments.device}" * (arguments.device != "cpu")
    write_report("python -m benchmarks.generate" + options, rows, arguments.out)


if __name__ == "__main__":
    main()
