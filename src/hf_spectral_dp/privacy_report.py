"""What a training run says of itself: the plan and what became of it, as the sections of `privacy.json`.

The figures come from the accountant, the sentences are fixed and each holds for every run of this package. What only
the publisher knows (the data, the public parts, other looks at the data, figures of quality) is added for the card;
see `templates/privacy.schema.json`.
"""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from .privacy.budget import PrivacyPlan, event_to_dict
from .privacy.consequences import attack_bounds, gaussian_dp, group_epsilons
from .privacy.noise import describe_randomness

SCHEMA_VERSION = 3

_MECHANISMS = {
    "poisson": "DP-SGD (Poisson-subsampled Gaussian mechanism)",
    "truncated_poisson": "DP-SGD (Gaussian mechanism on truncated Poisson batches)",
    "single_pass": "DP-SGD (Gaussian mechanism, each row in one batch of a pass)",
}
_INDICES = {
    "poisson": "all units; each enters each batch independently",
    "truncated_poisson": "all units; each enters each batch independently, then a uniform subset of the largest size",
    "single_pass": "a stream in its order; every place is in one batch of each pass",
}
_COMPOSITIONS = {
    "poisson": "adaptive sequential composition of all charged steps",
    "truncated_poisson": "adaptive sequential composition of all charged steps",
    "single_pass": "parallel composition within a pass, sequential composition of the passes",
}
_SOFTWARE = ("hf_spectral_dp", "torch", "transformers", "dp-accounting", "randomgen", "peft")
_CHANGES = {
    "add-or-remove-one": "adding or removing {}",
    "zero-out-one": "replacing {} by an empty place that contributes nothing",
}


def statement(report: Mapping[str, Any]) -> str:
    """The guarantee in one sentence, from the other fields of a report."""
    claim, unit = report["claim"], report["unit"]["definition"]
    change = _CHANGES[report["adjacency"]["relation"]].format(unit)
    earlier = len(report["mechanism"]["earlier_runs"])
    runs = f", together with {earlier} earlier private run{'s' * (earlier > 1)} on the same data," if earlier else ""
    return f"Training{runs} was (ε = {claim['epsilon']}, δ = {claim['delta']})-differentially private under {change}."


def run_report(
    plan: PrivacyPlan,
    charged: int,
    ledger_head: str,
    *,
    clipping_norm: float,
    unit: str,
    person: bool,
    noise_source: Any,
    training: Mapping[str, Any],
    post_processing: Sequence[str] = (),
    earlier_runs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The sections of `privacy.json` that a run knows; plain JSON values.

    Args:
        plan: the mechanism that ran.
        charged: steps in the ledger; the claim is of all planned ones, see `PrivacyPlan.claimed`.
        ledger_head: hash of the ledger's last record.
        clipping_norm: largest norm of one unit's gradient.
        unit: the privacy unit in words, such as "one image".
        person: whether a column named the person whose row it is, so that the unit is a person.
        noise_source: `GaussianNoise.source`.
        training: the section `training` of the schema.
        post_processing: what was computed from the noisy steps, in words.
        earlier_runs: {"clipping_norm", "ledger_head"} of every run of `plan.earlier`, in its order; the report is as
            loose as the loosest of all runs, where "log_private_loss" or "noise" say so.
    """
    logged = bool(training["private_loss_logged"]) or any(run.get("log_private_loss") for run in earlier_runs)
    claimed = plan.claimed(charged)
    noise_source = next((run["noise"] for run in earlier_runs if "noise" in run), noise_source)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "claim": {
            "variant": "approximate-dp",
            "epsilon": plan.epsilon(claimed),
            "delta": plan.delta,
            "rounding": "up",
            "profile": plan.profile(claimed),
            "epsilon_without_amplification": plan.epsilon_without_amplification(claimed),
            "gaussian_dp": {"mu": gaussian_dp(plan, claimed), "amplified": False},
            "attack": attack_bounds(plan, claimed),
            "groups": group_epsilons(plan, claimed),
        },
        "unit": {
            "level": "person" if person else "row",
            "definition": unit,
            "max_rows_per_step": 1,
            "related_units": "units that belong together, such as copies of one image or relatives, share no protection"
            " of one; claim.groups says what holds for 2, 5 and 10 of them",
        },
        "adjacency": {"relation": plan.adjacency, "num_units": plan.num_examples, "num_units_released": "public"},
        "trust": {
            "model": "central",
            "actors": [
                {"name": "curator, who trained", "sees": "all private data",
                 "trusted_for": "running this code unchanged and keeping data, token rows and machine closed"},
                {"name": "anyone else", "sees": "the released files and any number of generated images",
                 "trusted_for": "nothing"},
            ],
            "adversary": {
                "access": "the weights, this card, any number of images, and all private data but one unit",
                "sees_checkpoints": True,
                "sees_logs": not logged,
                "sees_training": False,
            },
        },
        "mechanism": {
            "name": _MECHANISMS[plan.sampling],
            "noise_multiplier": plan.noise_multiplier,
            "clipping_norm": clipping_norm,
            "clipping": "flat, per example",
            "noise_standard_deviation": plan.noise_multiplier * clipping_norm,
            "normalisation": "noisy clipped sum divided by the public expected batch size",
            "divisor": plan.expected_batch_size,
            "nonfinite_rows": "a gradient that is not finite contributes zero",
            "empty_batches": "noise is added and the step charged, as for any other batch",
            "planned_steps": plan.steps,
            "charged_steps": charged,
            "earlier_runs": [
                {
                    "sampling": run.sampling,
                    "rate": run.sampling_rate,
                    "max_batch_size": run.max_batch_size,
                    "noise_multiplier": run.noise_multiplier,
                    "steps": run.steps,
                    "clipping_norm": sealed["clipping_norm"],
                    "ledger_head": sealed["ledger_head"],
                }
                for run, sealed in zip(plan.earlier, earlier_runs, strict=True)
            ],
        },
        "sampling": {
            "assumed": plan.sampling,
            "used": plan.sampling,
            "rate": plan.sampling_rate,
            "expected_batch_size": plan.expected_batch_size,
            "max_batch_size": plan.max_batch_size,
            "index": _INDICES[plan.sampling],
        },
        "accounting": {
            "accountant": "PLD",
            "library": "dp-accounting",
            "version": metadata.version("dp-accounting"),
            "grid": 1e-4,
            "pessimistic": True,
            "composition": _COMPOSITIONS[plan.sampling]
            + ("; adaptive sequential composition with the earlier runs on the same data" if plan.earlier else ""),
            "event": event_to_dict(plan.event(claimed)),
            "ledger": {"records": charged, "head": ledger_head},
        },
        "randomness": describe_randomness(noise_source),
        "training": {**training, "private_loss_logged": logged},
        "stages": [
            {"name": "start from public weights" + " or those of an earlier run" * bool(plan.earlier), "private": False,
             "note": "see public data"},
            *({"name": f"earlier private run {number} on the same data", "private": True,
               "note": "costs a part of the claim; see the mechanism"} for number in range(1, 1 + len(plan.earlier))),
            {"name": "fine-tuning on the private data", "private": True,
             "note": f"costs the {'rest of the' if plan.earlier else 'whole'} claim; the weights of all steps are"
             " covered, so optimizer, schedule and checkpoints are post-processing"},
            *({"name": step, "private": False, "note": "post-processing of the steps"} for step in post_processing),
            {"name": "sampling and super-resolution", "private": False,
             "note": "post-processing: any number of images, at no further cost"},
        ],
        "data_accesses": [
            *({"what": f"earlier private run {number}, by clipped and noisy sums only", "accounted": True,
               "released": True} for number in range(1, 1 + len(plan.earlier))),
            {"what": "fine-tuning, by clipped and noisy sums only", "accounted": True, "released": True},
            *([{"what": "the loss on private rows was logged during training", "accounted": False, "released": True}]
              if logged else []),
        ],
        "not_released": [
            "images and token rows",
            "ledger (only the hash of its last record)",
            "optimizer states and checkpoints",
            "keys of the random generators, which were never saved",
            *([] if logged else ["loss, gradient norms and batch sizes, which were never computed for a log"]),
        ],
        "not_covered": [
            "that the data set exists, and how many units it has: both are treated as public",
            "what is true of the data as a whole: that is learned on purpose",
            "whatever else is released from the same data: its cost adds to this one",
            "the public data that other parts were made from",
            "who watches the machine, its clock or its logs while it trains",
            *(["prompts that users type: they are no part of the private data, and whoever runs the model sees them",
               "a private caption used as a prompt: who sees the prompt, or an image beside it, sees what it says"]
              if training["conditioning"] == "text" else []),
        ],
        "limitations": [
            "The guarantee is that of real-valued Gaussian noise; computers add floating-point numbers.",
            "A card can be recomputed, but nobody can recompute from it that the training did what the record says.",
        ],
        "software": [{"name": name, "version": installed_version(name)} for name in _SOFTWARE],
    }  # fmt: skip
    report["claim"] = {"statement": statement(report), **report["claim"]}
    return report


def installed_version(package: str) -> str:
    """The version of an installed package; "not installed" for code that runs from its source folder.

    That is no reason to lose the report of a run whose budget is spent.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


__all__ = ["SCHEMA_VERSION", "installed_version", "run_report", "statement"]
