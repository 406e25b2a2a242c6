"""What can be recomputed of a privacy card: the event, every figure of the claim, the ledger, the files.

Each function returns contradictions in plain words; an empty list is good news. What none of them can show is that the
training did what the record says. Figures are held against a fresh computation from the recorded event; one that
claims more privacy than that is a contradiction, one that claims less is not.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .privacy.budget import event_from_dict, event_to_dict
from .privacy.consequences import attack_bounds, gaussian_dp, group_epsilons
from .privacy.ledger import LedgerError, read_ledger
from .released_files import hash_released
from .report_rules import leaves, name_of, plan_of
from .safe_loading import check_shards

# Figures are recorded with four decimals, rounded up. The transforms inside the accountant differ between processors
# in their last bits, which may move a figure over one such step, never over two.
_LAST_PLACE = 1e-4 + 1e-9


def event_contradictions(report: Mapping[str, Any]) -> list[str]:
    """The recorded event against the one that the plan implies."""
    plan = plan_of(report)
    recorded = dict(leaves(report["accounting"]["event"]))
    implied = dict(leaves(event_to_dict(plan.event(plan.claimed(report["mechanism"]["charged_steps"])))))
    found = [
        f"accounting.event.{name_of(key)}={recorded.get(key)}, but the mechanism's other facts imply"
        f" {implied.get(key)}."
        for key in sorted(recorded.keys() | implied.keys(), key=name_of)
        if recorded.get(key) != implied.get(key)
    ]
    return found or _unreadable(report)


def _unreadable(report: Mapping[str, Any]) -> list[str]:
    try:
        event_from_dict(report["accounting"]["event"])
    except ValueError as error:
        return [f"accounting.event is none that dp-accounting knows: {error}"]
    return []


def claim_contradictions(report: Mapping[str, Any]) -> list[str]:
    """Every figure of the claim against a fresh computation."""
    claim, plan = report["claim"], plan_of(report)
    claimed = plan.claimed(report["mechanism"]["charged_steps"])
    figures = [("epsilon", claim["epsilon"], plan.epsilon(claimed))]
    for index, entry in enumerate(claim["profile"]):
        (again,) = plan.profile(claimed, [entry["delta"]])
        figures.append((f"profile[{index}].epsilon", entry["epsilon"], again["epsilon"]))
    unamplified = plan.epsilon_without_amplification(claimed)
    figures.append(("epsilon_without_amplification", claim["epsilon_without_amplification"], unamplified))
    figures.append(("gaussian_dp.mu", claim["gaussian_dp"]["mu"], gaussian_dp(plan, claimed)))
    bounds = attack_bounds(plan, claimed)
    figures.append(("attack.advantage", claim["attack"]["advantage"], bounds["advantage"]))
    rates = {entry["false_positive_rate"]: entry["true_positive_rate"] for entry in bounds["true_positive_rates"]}
    for index, entry in enumerate(claim["attack"]["true_positive_rates"]):
        name, again = f"attack.true_positive_rates[{index}]", rates[entry["false_positive_rate"]]
        figures.append((f"{name}.true_positive_rate", entry["true_positive_rate"], again))
    groups = {entry["units"]: entry["epsilon"] for entry in group_epsilons(plan, claimed)}
    for index, entry in enumerate(claim["groups"]):
        figures.append((f"groups[{index}].epsilon", entry["epsilon"], groups[entry["units"]]))
    accounting = report["accounting"]
    return [
        f"claim.{name}={recorded} is below {recomputed}, which the recorded mechanism costs (recorded with"
        f" {accounting['library']} {accounting['version']}, recomputed with {metadata.version('dp-accounting')})."
        for name, recorded, recomputed in figures
        if recorded < recomputed - _LAST_PLACE
    ]


def ledger_contradictions(report: Mapping[str, Any], path: str | Path | None = None) -> list[str]:
    """The ledger's section against the charged steps and, if a ledger is at hand, against every byte of it."""
    recorded, charged = report["accounting"]["ledger"], report["mechanism"]["charged_steps"]
    records, head = recorded["records"], recorded["head"]
    found = []
    if records != charged:
        found.append(f"accounting.ledger.records={records}, but mechanism.charged_steps={charged}.")
    if path is None:
        return found
    try:
        ledger = read_ledger(path)
    except (LedgerError, OSError) as error:
        return [*found, str(error)]
    if ledger["head"] != head:
        found.append(f"{path} ends at {ledger['head']}, but the card says {head}: it is not the ledger of this card.")
    if ledger["charged"] != charged:
        found.append(f"{path} holds {ledger['charged']} charges, but mechanism.charged_steps={charged}.")
    mechanism = report["mechanism"]
    implied = _spent(
        {
            "plan": plan_of(report).to_dict(),
            "clipping_norm": mechanism["clipping_norm"],
            "earlier_runs": mechanism["earlier_runs"],
        }
    )
    header = _spent(ledger["header"])
    for name in sorted(implied):
        if header.get(name) != implied[name]:
            found.append(f"{path} was opened for {name}={header.get(name)}, but the card says {implied[name]}.")
    runs = [ledger["header"], *ledger["header"].get("earlier_runs", [])]
    if any(run.get("log_private_loss") for run in runs) and not report["training"]["private_loss_logged"]:
        found.append(f"{path} says that the loss of private rows was logged, but training.private_loss_logged=False.")
    level = "person" if ledger["header"].get("persons") else "row"
    if report["unit"]["level"] != level:
        found.append(f"{path} was opened for units of level {level!r}, but unit.level={report['unit']['level']!r}.")
    generator = report["randomness"]["generator"]
    if any(run.get("noise") == "philox" for run in runs) and "Philox" not in generator:
        found.append(f"{path} says that Philox drew the noise, but randomness.generator={generator!r}.")
    return found


def _spent(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the header of a ledger says of its charges, and not of what was asked for."""
    plan = header.get("plan", {})
    asked = ("target_epsilon", "delta")
    earlier = [{name: run[name] for name in run if name not in asked} for run in plan.get("earlier", [])]
    return {
        **{name: plan[name] for name in plan if name != "target_epsilon"},
        "clipping_norm": header.get("clipping_norm"),
        "earlier": earlier,
        # A card keeps the marks of looser runs elsewhere, under training and randomness.
        "earlier_runs": [
            {name: run.get(name) for name in ("clipping_norm", "ledger_head")} for run in header.get("earlier_runs", [])
        ],
    }


def file_contradictions(report: Mapping[str, Any], folder: Path) -> list[str]:
    """The folder against the list of released files: nothing changed, nothing missing, nothing more."""
    recorded = {entry["path"]: entry for entry in report.get("released", [])}
    found = {str(entry["path"]): entry for entry in hash_released(folder)}
    try:
        check_shards(folder)
        problems = []
    except ValueError as error:
        problems = [str(error)]
    problems += [f"{name} is on the card, but not in {folder}." for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{name} is in {folder}, but not on the card." for name in sorted(found.keys() - recorded.keys())]
    for name in sorted(recorded.keys() & found.keys()):
        before, now = recorded[name], found[name]
        if before["sha256"] != now["sha256"]:
            problems.append(f"{name} changed: SHA-256 {now['sha256']}, on the card {before['sha256']}.")
        elif before["bytes"] != now["bytes"]:
            problems.append(f"{name} has {now['bytes']} bytes, on the card {before['bytes']}.")
    return problems


def private_runs(folder: Path) -> dict[str, list[str]]:
    """Which private runs each network of a folder names, in its config, by heads of ledgers; none for public ones.

    Returns:
        By the path of the config in the folder. A critic that names no run is there, too: private training made it.
    """
    found = {}
    for path in sorted(folder.rglob("config.json")):
        try:
            runs = json.loads(path.read_bytes()).get("private_runs")
        except (OSError, ValueError, AttributeError):  # none that can be loaded
            continue
        if runs or path.parent.name == "critic":
            named = runs if isinstance(runs, list) and runs else [runs]
            found[path.relative_to(folder).as_posix()] = [str(run) for run in named]
    return found


def network_contradictions(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Networks that name private runs, in their configs, against the runs that the card counts."""
    counted = {run["ledger_head"] for run in report["mechanism"]["earlier_runs"]}
    counted.add(report["accounting"]["ledger"]["head"])
    return [
        f"{path} names the private run {run[:12]!r}, which the card does not count; train the model with that run's"
        " ledger in earlier_ledgers, or take a public network."
        for path, runs in private_runs(folder).items()
        for run in runs
        if run not in counted
    ]


def text_contradictions(name: str, expected: str, path: Path, remedy: str) -> list[str]:
    """A file against the text that it must hold, byte for byte."""
    try:
        found = path.read_bytes()
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror}); {remedy}."]
    if found == expected.encode():
        return []
    ours, theirs = expected.splitlines(), found.decode(errors="replace").splitlines()
    for number in range(max(len(ours), len(theirs))):
        wanted = ours[number] if number < len(ours) else "nothing"
        there = theirs[number] if number < len(theirs) else "nothing"
        if wanted != there:
            return [f"{name}, line {number + 1}, says {there[:100]!r}, not {wanted[:100]!r}; {remedy}."]
    return [f"{name} differs in its line ends; {remedy}."]


__all__ = [
    "claim_contradictions",
    "event_contradictions",
    "file_contradictions",
    "ledger_contradictions",
    "network_contradictions",
    "private_runs",
    "text_contradictions",
]
