"""Which private runs a network came out of, as its config says: what it cost must be counted where it goes.

`DPTrainer` marks what it trains, from the first charge on, and what is made with marked networks is marked by all of
their runs. A run is named by the head of its ledger, as a card names it.
"""

from collections.abc import Collection
from typing import Any

UNRECORDED = "no ledger"
"""The mark of what private images shaped without a ledger, such as a twin: no card counts it."""


def configured(network: Any) -> list[Any]:
    """Where a network can be marked, the outermost parts with a config: itself, or what a wrapper without one holds."""
    if getattr(network, "config", None) is not None:
        return [network]
    children = network.children() if hasattr(network, "children") else ()
    return [part for child in children for part in configured(child)]


def marks(*networks: Any) -> list[str]:
    """The runs that the configs of some networks, and of whatever lies inside, name, each once.

    A config around a marked part is no reason to pass over it: it may know nothing of runs.
    """
    parts = (part for network in networks for part in (network.modules() if hasattr(network, "modules") else [network]))
    named = (getattr(getattr(part, "config", None), "private_runs", None) or [] for part in parts)
    return list(dict.fromkeys(run for runs in named for run in runs))


def mark(part: Any, runs: list[str]) -> None:
    """Writes runs into the config of a part that has one, so that they are saved with it."""
    if hasattr(part, "register_to_config"):  # of diffusers, whose configs cannot be written to
        part.register_to_config(private_runs=runs)
    else:
        part.config.private_runs = runs


def refuse_uncounted(name: str, network: Any, counted: Collection[str] = ()) -> None:
    """Raises ValueError if a network came out of a private run that is not among `counted`, heads of ledgers."""
    for run in marks(network):
        if run not in counted:
            raise ValueError(
                f"{name} came out of the private run {run[:12]!r}, and nothing here would count it; take public"
                " weights, or name its ledger in the earlier_ledgers of the training."
            )


__all__ = ["UNRECORDED", "configured", "mark", "marks", "refuse_uncounted"]
