"""The card as a record of the OpenDP deployments registry, at its most detailed tier.

The record holds what the card says, in the registry's fields, and the few facts that only the publisher knows. It must
satisfy the registry's own schema, which `templates/opendp_deployments.schema.yaml` is a copy of (MIT licence,
github.com/opendp/deployments-registry-data, schemas/deployments-schema.yaml, commit 3e9c812a).
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

from .card import PrivacyCard

_SCHEMA = Path(__file__).parent / "templates" / "opendp_deployments.schema.yaml"
_MARKS = re.compile(r"[\\`*_{}\[\]<>#$|~]")  # the registry shows text as Markdown with formulas


def registry_record(
    card: PrivacyCard,
    *,
    curators: Sequence[str],
    intended_use: str,
    region: str,
    publication_date: str,
    authors: Sequence[str],
    sector: str | None = None,
    sources: str | None = None,
) -> dict[str, Any]:
    """A tier 3 record of the registry, status "Draft".

    Args:
        card: what is described.
        curators: who publishes the model.
        intended_use: what the model is for.
        region: where the data come from, or whose law holds.
        publication_date: YYYY-MM-DD.
        authors: who wrote this record.
        sector: one of the registry's sectors, such as "Healthcare".
        sources: where the model and its description can be found.

    Raises:
        ValueError: the record would not satisfy the registry's schema; names every field.
    """
    report = card.report
    claim, mechanism, sampling, accounting = (report[name] for name in ("claim", "mechanism", "sampling", "accounting"))
    tuning, data, adversary = report["hyperparameter_tuning"], report["data"], report["trust"]["adversary"]
    unaccounted = [access["what"] for access in report["data_accesses"] if not access["accounted"]]
    basic = {
        "name": f"Differentially private image generator: {data['name']}",
        "data_curators": list(curators),
        "description": f"{claim['statement']} {data['description']}",
        "intended_use": intended_use,
        "data_product_type": "Machine learning model",
        "data_product_region": region,
        "publication_date": publication_date,
        **({"data_product_sector": sector} if sector else {}),
    }
    groups = ", ".join(f"{group['epsilon']} for {group['units']}" for group in claim["groups"])
    profile = ", ".join(f"{entry['epsilon']} at delta {entry['delta']}" for entry in claim["profile"])
    record = {
        "url_slug": re.sub(r"[^a-z0-9]+", "_", f"dp_image_generator_{data['name']}".lower()).strip("_"),
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": basic,
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"All finite collections of images with their labels or captions. {data['description']}",
                "unprotected_quantities": _sentences(
                    [f"the number of units, {report['adjacency']['num_units']}", *report["not_covered"], *unaccounted]
                ),
            },
            "privacy_loss": {
                "privacy_unit": report["unit"]["definition"],
                "privacy_unit_details": f"{report['adjacency']['relation']}. {claim['statement']}"
                f" {report['unit']['related_units']}. Epsilon of several units together: {groups}.",
                "privacy_parameters": {"epsilon": claim["epsilon"], "delta": claim["delta"]},
                "privacy_parameters_details": f"Rounded up. Epsilon of the same mechanism: {profile}. Without"
                f" amplification by sampling: {claim['epsilon_without_amplification']};"
                f" {claim['gaussian_dp']['mu']}-Gaussian DP.",
            },
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": _sentences(
                    f"{actor['name']} sees {actor['sees']}, trusted for {actor['trusted_for']}"
                    for actor in report["trust"]["actors"]
                ),
                "actors": _sentences(
                    [f"the claim holds against somebody with {adversary['access']}"]
                    + [actor["name"] for actor in report["trust"]["actors"]]
                ),
                "release_type": "One release",
                "release_type_details": "One model. Any number of images may be drawn from it: post-processing.",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
                "access_type_details": "The weights are released; nobody queries the data.",
            },
            "accounting": {
                "post_processing": _sentences(
                    f"{stage['name']} ({stage['note']})" for stage in report["stages"] if not stage["private"]
                ),
                "composition": f"{accounting['composition']}, by privacy loss distributions ({accounting['library']}"
                f" {accounting['version']}); {mechanism['charged_steps']} of {mechanism['planned_steps']} steps"
                " charged, all of them counted"
                + "".join(
                    f"; {run['steps']} steps of an earlier run, {run['sampling']} at rate {run['rate']}, noise"
                    f" multiplier {run['noise_multiplier']}, clipping norm {run['clipping_norm']}"
                    for run in mechanism["earlier_runs"]
                ),
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": f"{tuning['statement']} Looked at: {tuning['data']} data;"
                f" accounted: {'yes' if tuning['accounted'] else 'no'}.",
                "mechanisms": f"{mechanism['name']}; noise multiplier {mechanism['noise_multiplier']}, clipping norm"
                f" {mechanism['clipping_norm']} ({mechanism['clipping']}), sampling {sampling['used']} at rate"
                f" {sampling['rate']}; {mechanism['normalisation']}. Noise from {report['randomness']['generator']};"
                f" {report['randomness']['arithmetic']}. {report['randomness']['known_limit']}. Software: "
                + ", ".join(f"{package['name']} {package['version']}" for package in report["software"])
                + ".",
                "justification": _sentences(report["limitations"]),
            },
            "administrative": {
                "registry_authors": list(authors),
                "notes": f"Made from privacy.json, SHA-256 {card.sha256}; check: {report['reproduce']['verify']}.",
                **({"sources": sources} if sources else {}),
            },
        },
    }
    record = _escaped(record)
    validator = Draft7Validator(_schema(), format_checker=Draft7Validator.FORMAT_CHECKER)
    problems = [
        f"- {'.'.join(str(part) for part in error.path) or 'record'}: {error.message}"
        for error in validator.iter_errors(record)
    ]
    empty = [f"- {name} must be given" for name, value in (("curators", curators), ("authors", authors),
             ("intended_use", intended_use), ("region", region)) if not value]  # fmt: skip
    if problems or empty:
        raise ValueError("\n".join(["the registry would refuse this record:", *empty, *problems]))
    return record


def registry_yaml(record: Mapping[str, Any]) -> str:
    """The record as the registry's own checks want it: no folded text."""
    return yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=10**6)


@cache
def _schema() -> dict[str, Any]:
    return yaml.safe_load(_SCHEMA.read_text(encoding="utf-8"))


def _sentences(parts: Any) -> str:
    return " ".join(f"{str(part)[:1].upper()}{str(part)[1:].rstrip('.')}." for part in parts)


def _escaped(value: Any, name: str = "") -> Any:
    """Text in which nothing is Markdown or a formula; the registry's own words stay as they are."""
    if isinstance(value, dict):
        return {key: _escaped(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item, name) for item in value]
    fixed = name in ("url_slug", "status", "publication_date", "data_product_sector") or not isinstance(value, str)
    return value if fixed else _MARKS.sub(_harmless, " ".join(value.split()))


def _harmless(mark: re.Match[str]) -> str:
    return "&#92;" if mark[0] == "\\" else f"\\{mark[0]}"


__all__ = ["registry_record", "registry_yaml"]
