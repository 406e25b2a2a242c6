"""What one DP step costs: our clipper beside training without privacy and beside the rivals, on the same batches.

Every method computes the sum of clipped per-example gradients of the same Llama-style model on the same token rows (the
first, "non-private", the ordinary gradient): forward, backward, clip, sum; no noise, no optimizer. `time_ratio` is the
median over interleaved rounds of (seconds of the method / seconds of the non-private step of the same round);
`memory_ratio` compares the peaks of resident memory during a step, weights included, each the median of five steps for
these two (one for rivals). `rounds` says how many there were: a rival that takes twice as long as the ordinary step
gets two, the others as many as ours. `max_relative_error` is the largest distance, over parameters, to the sum from a
loop over single examples, relative to that sum's norm.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import write_report
from hf_spectral_dp.privacy.clipping import PerExampleClipper

CLIPPING_NORM = 0.1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Sums = dict[str, Tensor]


def build(d: int, tied: bool, adapter: str, layers: int, device: str) -> nn.Module:
    """A causal language model of width d over 1,024 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=d, intermediate_size=round(d * 8 / 3 / 32) * 32, num_hidden_layers=layers,
        num_attention_heads=d // 64, max_position_embeddings=1024, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide half of the gradient
                nn.init.normal_(parameter, std=0.02)
    return model.to(device).train()


def losses_of(model: Callable, rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood per row (B, T + 1)."""
    logits = model(input_ids=rows[:, :-1].contiguous(), attention_mask=mask).logits
    targets = rows[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


# -- the methods: each takes a model and returns a function of rows that gives the sums by parameter name --------------


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(parameters: dict[str, nn.Parameter]) -> Sums:
    sums = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return sums  # type: ignore[return-value]


def non_private(model: nn.Module) -> Callable[[Tensor], Sums]:
    def step(rows: Tensor) -> Sums:
        losses_of(model, rows).sum().backward()
        return gradients_of(trainable(model))

    return step


def ours(model: nn.Module) -> Callable[[Tensor], Sums]:
    clipper = PerExampleClipper(model, CLIPPING_NORM)

    def step(rows: Tensor) -> Sums:
        clipper.add(lambda: losses_of(model, rows), len(rows))
        return clipper.take()

    return step


def loop(model: nn.Module) -> Callable[[Tensor], Sums]:
    """One example at a time: the definition, and what needs the least memory."""
    parameters = trainable(model)

    def step(rows: Tensor) -> Sums:
        sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for row in rows.split(1):
            losses_of(model, row).sum().backward()
            each = gradients_of(parameters)
            # Row by row: one float32 sum over a whole matrix is wrong by a few millionths.
            squares = [torch.linalg.vector_norm(g, dim=-1).double().square().sum() for g in each.values()]
            coefficient = CLIPPING_NORM / max(CLIPPING_NORM, float(torch.stack(squares).sum().sqrt()))
            for name, g in each.items():
                sums[name].add_(g, alpha=coefficient)
        return sums

    return step


def opacus_hooks(model: nn.Module) -> Callable[[Tensor], Sums]:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    parameters = trainable(model)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIPPING_NORM,
        expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip

    def step(rows: Tensor) -> Sums:
        losses_of(wrapped, rows).sum().backward()
        optimizer.clip_and_accumulate()
        sums = {name: parameter.summed_grad for name, parameter in parameters.items()}  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        return sums

    return step


def opacus_ghost(model: nn.Module) -> Callable[[Tensor], Sums]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    parameters = trainable(model)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIPPING_NORM, loss_reduction="sum")
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters.values(), lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIPPING_NORM,
        expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip

    def step(rows: Tensor) -> Sums:
        DPTensorFastGradientClipping(wrapped, optimizer, losses_of(wrapped, rows), "sum").backward()
        sums = gradients_of(parameters)
        optimizer.zero_grad(set_to_none=True)
        return sums

    return step


def chunk_size(length: int) -> int:
    """Rows that the functional rivals take at a time: about 512 tokens, where they are quickest on a CPU."""
    return max(4, 512 // length)


def chunked_vmap(model: nn.Module) -> Callable[[Tensor], Sums]:
    from torch.func import functional_call, grad, vmap

    model.set_attn_implementation("eager")  # the fused attention has no batching rule: vmap would run it row by row
    parameters = trainable(model)
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(values: Sums, row: Tensor, mask: Tensor) -> Tensor:
        # The mask is made outside: building one is not possible under vmap.
        return losses_of(lambda **inputs: functional_call(model, values, (), inputs), row[None], mask).sum()

    per_example = vmap(grad(loss), in_dims=(None, 0, None))

    def step(rows: Tensor) -> Sums:
        sums = {name: torch.zeros_like(value) for name, value in values.items()}
        length = rows.shape[1] - 1
        mask = torch.full((length, length), float("-inf"), device=rows.device).triu(1)[None, None]
        for some in rows.split(chunk_size(length)):
            each = per_example(values, some, mask)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
            weights = CLIPPING_NORM / norms.clamp_min(CLIPPING_NORM)
            for name, g in each.items():
                sums[name] += torch.tensordot(weights, g, dims=1)
        return sums

    return step


def opake(model: nn.Module) -> Callable[[Tensor], Sums]:
    """JetBrains opake, functional throughout; measured where it is installed."""
    from opake.dpsgd.clipping import clipped_grad
    from torch.func import functional_call

    parameters = trainable(model)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    frozen = {name: parameter for name, parameter in model.named_parameters() if name not in values}

    def loss(values: Sums, row: Tensor, mask: Tensor) -> Tensor:
        weights = {**frozen, **values}
        return losses_of(lambda **inputs: functional_call(model, weights, (), inputs), row[None], mask).sum()

    def step(rows: Tensor) -> Sums:
        length = rows.shape[1] - 1
        mask = torch.full((length, length), float("-inf"), device=rows.device).triu(1)[None, None]
        chunk = chunk_size(length)
        gradients, state = clipped_grad(loss, clipping_norm=CLIPPING_NORM, microbatch_size=chunk)
        return gradients(values, rows, mask, state=state)[0].pytree

    return step


METHODS: dict[str, Callable[[nn.Module], Callable[[Tensor], Sums]]] = {
    "non-private": non_private,
    "ours": ours,
    "opacus hooks": opacus_hooks,
    "opacus ghost": opacus_ghost,
    "chunked vmap": chunked_vmap,
    "opake": opake,
    "one-example loop": loop,
}
OURS_AND_PLAIN = ("non-private", "ours")


# -- measuring -------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory now, after free memory went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_during(action: Callable[[], object], device: str) -> int:
    """Bytes at the highest point of `action`, above what was there when it began; 0 where nobody can tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        action()
        return 0
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    action()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before


def _into(found: Sums, step: Callable[[Tensor], Sums], rows: Tensor) -> None:
    found.update(step(rows))


class Effort(NamedTuple):
    """How much is measured."""

    tokens: int  # per batch
    rounds: int  # of ours, of the ordinary step, and of rivals that are not settled
    least: int  # rounds of a rival
    patience: float  # seconds for all rounds of one rival
    peaks: int  # of ours and of the ordinary step; the median counts
    layers: int = 2


FULL = Effort(tokens=2048, rounds=9, least=2, patience=60, peaks=5)
QUICK = Effort(tokens=1536, rounds=7, least=1, patience=0.3, peaks=1)


def settled(mine: list[float], plain: list[float], effort: Effort) -> bool:
    """Whether a rival needs no more rounds: it took twice as long as the ordinary step in all of them, or too long."""
    if len(mine) < effort.least:
        return False
    slow = min(a / b for a, b in zip(mine, plain, strict=False)) > 2
    return sum(mine) > (0.3 if slow else effort.patience)


def measure(case: dict, effort: Effort, device: str) -> list[dict]:
    """One row per method that can run the case."""
    reference = build(case["d"], case["tied"], case["adapter"], effort.layers, device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in reference.parameters())
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1024, (max(1, effort.tokens // case["T"]), case["T"] + 1), generator=generator).to(device)
    expected = loop(reference)(rows)
    steps: dict[str, Callable[[Tensor], Sums]] = {}
    errors, peaks, failures = {}, {}, {}
    for method, prepare in METHODS.items():
        try:
            step = prepare(copy.deepcopy(reference))
            close = method in OURS_AND_PLAIN
            if close:
                step(rows)  # warms up, for the memory's sake; a rival's peak is warm-up enough
            found: Sums = {}
            # A process's peak varies by a tenth with the holes that its memory happens to have.
            times = effort.peaks if close else 1
            measured = [peak_during(partial(_into, found, step, rows), device) for _ in range(times)]
            peaks[method] = weights + statistics.median(measured)
        except Exception as error:  # a rival that cannot run a case is a result, too
            failures[method] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        steps[method] = step
        if method != "non-private":
            errors[method] = max(
                float((mine - theirs).norm() / theirs.norm())
                for mine, theirs in zip(found.values(), expected.values(), strict=True)
            )
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(effort.rounds):
        for method, step in list(steps.items())[:: -1 if number % 2 else 1]:  # neighbours change
            if method not in OURS_AND_PLAIN and settled(seconds[method], seconds["non-private"], effort):
                continue
            start = time.perf_counter()
            step(rows)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[method].append(time.perf_counter() - start)
    results = []
    for method in METHODS:
        if method in failures:
            results.append({**case, "method": method, "cannot_run": failures[method]})
            continue
        ratios = sorted(a / b for a, b in zip(seconds[method], seconds["non-private"], strict=False))
        row = {
            **case,
            "method": method,
            "time_ratio": round(statistics.median(ratios), 3),
            "time_ratio_low": round(ratios[len(ratios) // 4], 3),
            "time_ratio_high": round(ratios[-1 - len(ratios) // 4], 3),
            "memory_ratio": round(peaks[method] / peaks["non-private"], 3),
            "seconds": round(statistics.median(seconds[method]), 4),
            "batch": len(rows),
            "rounds": len(ratios),
        }
        if method in errors:
            row["max_relative_error"] = float(f"{errors[method]:.2e}")
        results.append(row)
    return results


def cases(quick: bool, device: str) -> list[dict]:
    if quick:
        plan = [(256, T, False, "none") for T in (16, 64, 256)]
        plan += [(256, 64, True, "none"), (256, 64, False, "lora")]
    else:
        widths = (256, 512, 1024) if device == "cuda" else (256, 512)
        plan = [(d, T, tied, "none") for d in widths for T in (16, 64, 256, 1024) for tied in (False, True)]
        plan += [(d, T, False, "lora") for d in widths for T in (16, 64, 256, 1024)]
    return [dict(zip(("d", "T", "tied", "adapter"), values, strict=True)) for values in plan]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="d = 256, small batches; within 50 seconds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for case in cases(arguments.quick, arguments.device):
        rows += measure(case, QUICK if arguments.quick else FULL, arguments.device)
        if not arguments.quick:
            print(*rows[-len(METHODS) :], sep="\n", flush=True)
    options = " --quick" * arguments.quick + " --device cuda" * (arguments.device == "cuda")
    write_report("python -m benchmarks.engine" + options, rows, arguments.out)


if __name__ == "__main__":
    main()
