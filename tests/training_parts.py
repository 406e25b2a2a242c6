"""A small private run that several test files share: rows for a tiny model, and the arguments of a few steps."""

import torch
from conftest import tiny_model

from hf_spectral_dp import DPTrainingArguments
from hf_spectral_dp.feature_rows import RowsInMemory
from hf_spectral_dp.self_audit import random_rows


class Rows(RowsInMemory):
    """Random legal token rows for a `tiny_model`."""

    def __init__(self, count: int = 60, seed: int = 0):
        super().__init__(random_rows(tiny_model().config, count, torch.Generator().manual_seed(seed)))


def arguments(folder, **changes) -> DPTrainingArguments:
    chosen = {
        "target_epsilon": 8.0, "expected_batch_size": 12, "max_steps": 6, "micro_batch_size": 5, "learning_rate": 1e-2,
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 2,
        "save_strategy": "no",
    }  # fmt: skip
    return DPTrainingArguments(**{**chosen, **changes})
