"""The record for the OpenDP registry satisfies the registry's schema, says what the card says, and holds no markup."""

import re

import pytest
import yaml
from card_reports import COMPOSED, PLANS, changed, report
from jsonschema import Draft7Validator

from hf_spectral_dp import registry
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.registry import registry_record, registry_yaml

GIVEN = {
    "curators": ["A hospital"], "intended_use": "teaching", "region": "Utopia", "publication_date": "2026-11-24",
    "authors": ["somebody"],
}  # fmt: skip


def fields_of_tier(node: dict, path: tuple = ()) -> list[tuple]:
    """The fields that the schema asks for, with their tier."""
    found = [(path, node["tier"])] if "tier" in node and path else []
    for name, below in node.get("properties", {}).items():
        found += fields_of_tier(below, (*path, name)) if isinstance(below, dict) else []
    return found


@pytest.mark.parametrize("plan", [*PLANS, COMPOSED], ids=["poisson", "truncated", "single_pass", "composed"])
def test_the_record_is_a_whole_tier_3_record(plan):
    record = yaml.safe_load(registry_yaml(registry_record(PrivacyCard(report(plan)), **GIVEN)))
    schema = registry._schema()
    Draft7Validator(schema, format_checker=Draft7Validator.FORMAT_CHECKER).validate(record)
    assert record["tier"] == 3 and record["status"] == "Draft" and re.fullmatch(r"[a-z0-9_]+", record["url_slug"])
    optional = {"data_product_sector", "rho", "sources", "data_source_type_details"}
    for path, _ in fields_of_tier(schema["properties"]["deployment"]):
        node = record["deployment"]
        if path[-1] in optional:
            continue
        for part in path:
            node = node[part]
        assert node
    loss = record["deployment"]["privacy_loss"]
    assert loss["privacy_parameters"] == {"epsilon": plan.epsilon(), "delta": plan.delta}
    assert plan.adjacency in loss["privacy_unit_details"]
    composition = record["deployment"]["accounting"]["composition"]
    assert composition.count("steps of an earlier run") == len(plan.earlier)
    assert "private test split" in record["deployment"]["dp_variant"]["unprotected_quantities"]


def test_no_text_of_the_card_becomes_markup():
    hostile = "<script>a</script> [x](y) $z$ \\(w\\) `c` **b**"
    text = registry_yaml(registry_record(PrivacyCard(changed(report(), ("data", "description"), hostile)), **GIVEN))
    description = yaml.safe_load(text)["deployment"]["basic"]["description"]
    assert r"\<script\>" in description and r"\[x\](y) \$z\$ &#92;(w&#92;) \`c\` \*\*b\*\*" in description
    assert not re.search(r"\\\\[^()]", yaml.safe_load(text)["deployment"]["basic"]["description"])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("publication_date", "24.11.2026", "publication_date: '24.11.2026' is not a 'date'"),
        ("sector", "Magic", "data_product_sector: 'Magic' is not one of"),
        ("curators", [], "curators must be given"),
        ("intended_use", "", "intended_use must be given"),
    ],
)
def test_what_the_registry_would_refuse_is_refused_here(name, value, message):
    with pytest.raises(ValueError, match=message):
        registry_record(PrivacyCard(report()), **{**GIVEN, name: value})
