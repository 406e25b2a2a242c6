"""Which private runs a network came out of, as its config says: what it cost must be counted where it goes.

`DPTrainer` marks what it trains, from the first charge on, and what is made with marked networks is marked by all of
their runs. A run is named by the head of its ledger, as a card names it.
"""

from collections.abc import Collection
from typing import Any

UNRECORDED = "no ledger"
"""The mark of what private images shaped without a ledger, such as a twin: no card counts it."""


def marks(*networks: Any) -> list[str]:
    """The runs that the configs of some networks name, each once; networks without a config name none."""
    named = (getattr(getattr(network, "config", None), "private_runs", None) or [] for network in networks)
    return list(dict.fromkeys(run for runs in named for run in runs))


def refuse_uncounted(name: str, network: Any, counted: Collection[str] = ()) -> None:
    """Raises ValueError if a network came out of a private run that is not among `counted`, heads of ledgers."""
    for run in marks(network):
        if run not in counted:
            raise ValueError(
                f"{name} came out of the private run {run[:12]!r}, and nothing here would count it; take public"
                " weights, or name its ledger in the earlier_ledgers of the training."
            )


__all__ = ["UNRECORDED", "marks", "refuse_uncounted"]
