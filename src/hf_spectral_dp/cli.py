"""`hf-spectral-dp generate`, `verify`, `card`, `registry` and `audit`: images, and the claim behind them."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .card import PrivacyCard
from .generation import GENERATE, add_arguments, check_device, generate_files
from .privacy_report import installed_version
from .publication import fetch, strangers
from .registry import registry_record, registry_yaml
from .self_audit import AuditRow, audit_installation

_VERIFY = """\
Check a privacy card against everything that is at hand:

  every figure of the claim, recomputed from the recorded event      (epsilon, profile, attacks, groups)
  every file of the folder or repository                             (hashes, nothing missing, nothing more)
  every network that came out of a private run                       (the card counts that run)
  privacy.json and README.md                                         (byte for byte what the card says)
  the run's ledger, with --ledger                                    (chain, head, plan, number of charges)

It cannot show that the training did what the record says, and nobody but the curator has the ledger."""

_AUDIT = """\
Attack the code that this installation trains with, and see whether its privacy claim survives.

  one release            clip, sum, noise, divide, with and without a canary; and the law of the noise
  one training run       canaries that fair coins put in; guess the coins from the trained weights
                         (Steinke, Nasr and Jagielski, arXiv:2305.08846)
  membership inference   tell rows that were trained on from others by the probabilities of their tokens

Each figure is a LOWER bound on what leaks. One above the claim refutes the claim. One below it proves nothing: the
proof is in the mechanism, an attack can only fail to find a hole. So every attack is also run on a broken twin,
which it must catch. No private data is used: the rows are random and made on the spot."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name (default: those of the process).

    Returns:
        Exit code: 0; or 1 if the card is missing, not valid, or contradicted, or an audit refutes the claim.
    """
    parser = argparse.ArgumentParser(
        prog="hf-spectral-dp",
        description="Draw images from a differentially private generator, check its claims, render its card.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="Draw images from a saved pipeline into a folder.",
        description=GENERATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Sampling options that are not given take the values saved with the pipeline. Exit code: 0; 1 if the"
        " pipeline or an option is no good.",
    )
    add_arguments(generate)
    generate.set_defaults(run=_generate)
    verify = commands.add_parser(
        "verify",
        help="Recompute the claim from privacy.json; compare files and README with it.",
        description=_VERIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0; 1 if the card is missing, not valid, or contradicted by anything.",
    )
    verify.add_argument("where", metavar="FOLDER_OR_HUB_ID", help="a saved pipeline or model, or owner/name on the Hub")
    verify.add_argument("--revision", help="branch, tag or commit of a Hub id; a full commit hash cannot move")
    verify.add_argument("--ledger", type=Path, metavar="FILE", help="the run's privacy_ledger.jsonl, if it is at hand")
    verify.set_defaults(run=_verify)
    card = commands.add_parser(
        "card",
        help="Render README.md again from privacy.json.",
        description="Render README.md again from privacy.json. Hashes stay as they are recorded.",
    )
    card.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a saved pipeline with privacy.json")
    card.set_defaults(run=_card)
    registry = commands.add_parser(
        "registry",
        help="Print the card as a record of the OpenDP deployments registry.",
        description="Print the card as a tier 3 record (YAML) of the OpenDP deployments registry.",
    )
    registry.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a saved pipeline with privacy.json")
    registry.add_argument("--curator", action="append", required=True, help="who publishes the model; may be repeated")
    registry.add_argument("--intended_use", required=True, help="what the model is for")
    registry.add_argument("--region", required=True, help="where the data come from, or whose law holds")
    registry.add_argument("--publication_date", required=True, metavar="YYYY-MM-DD")
    registry.add_argument("--author", action="append", required=True, help="who wrote this record; may be repeated")
    registry.add_argument("--sector", help="such as Healthcare or Education")
    registry.add_argument("--sources", help="where the model and its description can be found")
    registry.set_defaults(run=_registry)
    audit = commands.add_parser(
        "audit",
        help="Attack the code that this installation trains with; needs no model and no data.",
        description=_AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0; 1 if a claim is refuted, or a broken twin was not caught. Takes about two minutes.",
    )
    audit.add_argument("--quick", action="store_true", help="fewer trials, one training run; about half a minute")
    audit.add_argument("--device", default="cpu", help="where to train: cpu (default) or cuda")
    audit.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON, too")
    audit.set_defaults(run=_audit)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"hf-spectral-dp: {error}", file=sys.stderr)
        return 1


def _generate(arguments: argparse.Namespace) -> int:
    """Says where the images are."""
    *images, grid = generate_files(arguments)
    print(f"{len(images)} images in {grid.parent}; {grid} shows them all")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Prints the guarantee and every check. 1 on any contradiction."""
    folder, strange = Path(arguments.where), None
    if not folder.is_dir():
        if arguments.where.count("/") != 1 or folder.exists():
            raise FileNotFoundError(
                f"{arguments.where} does not exist as a folder and is no Hub id (owner/name); name one of these."
            )
        folder = Path(fetch(arguments.where, revision=arguments.revision, with_code=True))
        try:
            strange = strangers(arguments.where, folder, revision=arguments.revision)
        except ConnectionError as error:  # as HF_HUB_OFFLINE=1 has it, where the rest lies in the cache
            print(f"not checked, what else the repository holds: {error}", file=sys.stderr)
    elif arguments.revision is not None:
        raise ValueError(f"--revision {arguments.revision} is for a Hub id, but {arguments.where} is a folder.")
    card = PrivacyCard.load(folder)
    checks = card.checks(folder, arguments.ledger)
    if strange is not None:
        checks["repository holds nothing else"] = [f"{name} is not on the card." for name in strange]
    print(card.guarantee)
    for name, contradictions in checks.items():
        print(f"[{'FAILED' if contradictions else 'ok'}] {name}")
        for contradiction in contradictions:
            print(f"    {contradiction}")
    return int(any(checks.values()))


def _card(arguments: argparse.Namespace) -> int:
    """Writes README.md and nothing else."""
    PrivacyCard.load(arguments.folder).save_readme(arguments.folder)
    return 0


def _registry(arguments: argparse.Namespace) -> int:
    """Prints the record of a card that nothing contradicts."""
    card = PrivacyCard.load(arguments.folder)
    card.raise_contradictions(arguments.folder)
    record = registry_record(
        card,
        curators=arguments.curator,
        intended_use=arguments.intended_use,
        region=arguments.region,
        publication_date=arguments.publication_date,
        authors=arguments.author,
        sector=arguments.sector,
        sources=arguments.sources,
    )
    print(registry_yaml(record), end="")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    """Prints one line per audit, with its control below. 1 if a claim is refuted or an attack is blind."""
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"--out {arguments.out}: its folder does not exist; create it first.")
    check_device(arguments.device)
    rows: list[AuditRow] = []
    epsilons = (2.0,) if arguments.quick else (1.0, 2.0, 4.0)
    for row in audit_installation(epsilons, arguments.quick, arguments.device):
        rows.append(row)
        verdict = "REFUTED" if row.refuted else "not refuted"
        print(f"[{verdict}] {row.audit}: {row.quantity} >= {row.shown:.3f}, claimed {row.claimed:.3f}", flush=True)
        for found in row.found:
            print(f"    {found}")
        caught = "caught" if row.control_caught else "NOT CAUGHT, so this audit proves nothing"
        print(f"    control, {row.control}: {row.quantity} >= {row.control_shown:.3f}, {caught}", flush=True)
    if arguments.out is not None:
        report = {
            "hf_spectral_dp": installed_version("hf_spectral_dp"),
            "torch": installed_version("torch"),
            "rows": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(row.refuted or not row.control_caught for row in rows))


__all__ = ["main"]
