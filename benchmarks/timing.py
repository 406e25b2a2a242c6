"""Wall times of things that are compared: in rounds, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(methods: dict[Any, Callable[[], object]], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each method in each round, after one call of each that is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in methods}
    for call in methods.values():
        call()
    for _ in range(rounds):
        for name, call in methods.items():
            times[name].append(seconds(call, device))
    return times
