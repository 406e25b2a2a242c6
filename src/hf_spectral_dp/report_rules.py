"""What `privacy.json` must satisfy before anybody may read it: its schema, and the facts agreeing with each other."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.validators import extend

from .privacy.budget import PrivacyPlan
from .privacy_report import statement

SCHEMA = json.loads((Path(__file__).parent / "templates" / "privacy.schema.json").read_text(encoding="utf-8"))

Key = tuple[str | int, ...]  # the way to a value in the report


def _is_integer(checker: TypeChecker, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON Schema takes 300.0, dp_accounting does not


_TYPES = Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
_VALIDATOR = extend(Draft202012Validator, type_checker=_TYPES)(SCHEMA)


def canonical(report: Mapping[str, Any]) -> str:
    """The one text of a report.

    Raises:
        ValueError: the report breaks a rule; names every one.
    """
    problems = _not_plain(report)
    if not problems:
        text = json.dumps(dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        plain = json.loads(text)
        problems = _against_schema(plain) or _against_each_other(plain)
    if problems:
        raise ValueError("privacy report refused:\n" + "\n".join(f"- {problem}." for problem in problems))
    return text


def parse(text: bytes) -> dict[str, Any]:
    """JSON without double keys, of which two readers may believe different ones.

    Raises:
        ValueError: the text is no JSON, or holds a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(name for name, _ in pairs)}")
    return found


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Everything that is no container, with the way to it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*key, name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*key, index))
    else:
        yield key, value


def name_of(key: Key) -> str:
    """("claim", "profile", 0) is claim.profile[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".") or "report"


def rule(key: Key) -> str:
    """The description in the schema that is nearest to a field: its rule, and where its value comes from."""
    node, found = SCHEMA, SCHEMA["description"]
    for part in key:
        node = node.get("properties", {}).get(part) or node.get("items") or {}
        found = node.get("description", found)
    return found


def plan_of(report: Mapping[str, Any]) -> PrivacyPlan:
    """The plan that the recorded mechanism followed.

    Raises:
        ValueError: there is no such plan.
    """
    claim, mechanism, sampling = report["claim"], report["mechanism"], report["sampling"]
    common = {
        "num_examples": report["adjacency"]["num_units"],
        "target_epsilon": claim["epsilon"],
        "delta": claim["delta"],
    }
    return PrivacyPlan(
        **common,
        sampling_rate=sampling["rate"],
        steps=mechanism["planned_steps"],
        noise_multiplier=mechanism["noise_multiplier"],
        sampling=sampling["used"],
        max_batch_size=sampling["max_batch_size"],
        earlier=tuple(
            PrivacyPlan(
                **common,
                sampling_rate=run["rate"],
                steps=run["steps"],
                noise_multiplier=run["noise_multiplier"],
                sampling=run["sampling"],
                max_batch_size=run["max_batch_size"],
            )
            for run in mechanism["earlier_runs"]
        ),
    )


def _short(text: object) -> str:
    return shown if len(shown := str(text)) <= 100 else shown[:97] + "..."


def _not_plain(report: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in leaves(report):
        if not all(isinstance(part, str | int) for part in key):
            problems.append(f"{name_of(key)} has a key that is no text; JSON keys are")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name_of(key)}={value} must be finite; {rule(key)}")
        elif not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            problems.append(f"{name_of(key)}={_short(repr(value))} is a {kind}, not a plain JSON value; convert it")
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                problems.append(f"{name_of(key)} holds half of a character pair, which no file can hold; mend the text")
    return problems


def check_words(words: Mapping[str, Any]) -> None:
    """Refuses parts of a report that a publisher writes, before there is a run to report.

    Args:
        words: some of the report's fields, by name.

    Raises:
        ValueError: one that no report could hold, naming the field, its value and the rule.
    """
    schema = {"$defs": SCHEMA["$defs"], "properties": {name: SCHEMA["properties"][name] for name in words}}
    plain = dict(words)
    if problems := _not_plain(plain) or _against_schema(plain, _VALIDATOR.evolve(schema=schema)):
        raise ValueError(f"no privacy report could say that: {'; '.join(problems)}.")


def _against_schema(report: dict[str, Any], validator: Any = _VALIDATOR) -> list[str]:
    problems = []
    for error in validator.iter_errors(report):
        key = tuple(error.absolute_path)
        if error.validator == "required":
            missing = [(*key, name) for name in error.validator_value if name not in error.instance]
            problems += [f"{name_of(field)} is missing, and nothing fills it in: {rule(field)}" for field in missing]
        else:
            value = repr(error.instance)
            broken = error.message.removeprefix(value).strip()  # most messages repeat the value
            problems.append(f"{name_of(key)}={_short(value)}: {_short(broken)}; {rule(key)}")
    return sorted(set(problems))


def _against_each_other(report: dict[str, Any]) -> list[str]:
    claim, mechanism, sampling = report["claim"], report["mechanism"], report["sampling"]
    delta, num_units = claim["delta"], report["adjacency"]["num_units"]
    planned, charged = mechanism["planned_steps"], mechanism["charged_steps"]
    size, expected = sampling["expected_batch_size"], sampling["rate"] * num_units
    problems = []
    if sampling["assumed"] != sampling["used"]:
        problems.append(
            f"sampling.assumed={sampling['assumed']!r} must equal used={sampling['used']!r}: an epsilon computed for"
            " other batches than were drawn says nothing; account for the batches that were used"
        )
    if not delta < 1 / num_units:
        problems.append(
            f"claim.delta={delta} must be below 1/num_units = {1 / num_units:.3g}; state epsilon at a smaller delta,"
            " such as privacy.budget.default_delta(num_units)"
        )
    if charged > planned:
        problems.append(
            f"mechanism.charged_steps={charged} must not exceed planned_steps={planned}; the ledger refuses such steps,"
            " so take both from DPTrainer.privacy_report()"
        )
    # One product of two floats, whatever its rounding.
    if not math.isclose(size, expected, rel_tol=1e-9):
        problems.append(
            f"sampling.expected_batch_size={size} must be rate * num_units = {expected}; batches of a size that depends"
            " on the data are another mechanism"
        )
    if mechanism["divisor"] != size:
        problems.append(
            f"mechanism.divisor={mechanism['divisor']} must be sampling.expected_batch_size={size}, a public constant;"
            " another one was not what ran"
        )
    deviation = mechanism["noise_multiplier"] * mechanism["clipping_norm"]
    if not math.isclose(mechanism["noise_standard_deviation"], deviation, rel_tol=1e-9):
        problems.append(
            f"mechanism.noise_standard_deviation={mechanism['noise_standard_deviation']} must be noise_multiplier *"
            f" clipping_norm = {deviation}"
        )
    logged = report["training"]["private_loss_logged"]
    if logged and all(access["accounted"] for access in report["data_accesses"]):
        problems.append(
            "training.private_loss_logged=True, but data_accesses lists no look that the claim does not cover; take"
            " both from DPTrainer.privacy_report()"
        )
    if report["trust"]["adversary"]["sees_logs"] == logged:
        problems.append(
            f"trust.adversary.sees_logs={not logged} would be true with training.private_loss_logged={logged}, not"
            f" {logged}; take both from DPTrainer.privacy_report()"
        )
    tuning = report["hyperparameter_tuning"]
    if tuning["accounted"] and tuning["data"] == "private":
        problems.append(
            "hyperparameter_tuning.accounted=True with data='private': no plan of this package pays for such a choice;"
            " say false"
        )
    for index, row in enumerate(report["utility"]):
        if row["private"] and row["accounted"]:
            problems.append(
                f"utility[{index}].accounted=True with private=True: no plan of this package pays for a measurement on"
                " private images; say false"
            )
    heads = [run["ledger_head"] for run in mechanism["earlier_runs"]] + [report["accounting"]["ledger"]["head"]]
    if repeated := sorted({head for head in heads if heads.count(head) > 1}):
        problems.append(f"mechanism.earlier_runs: {', '.join(repeated)} ends more than one run; list every run once")
    paths = [entry["path"] for entry in report.get("released", [])]
    if repeated := sorted({path for path in paths if paths.count(path) > 1}):
        problems.append(f"released lists {', '.join(repeated)} more than once; a file has one hash")
    if any(path.startswith("critic/") for path in paths) and not mechanism["earlier_runs"]:
        problems.append(
            "released lists a critic, which private training made, but mechanism.earlier_runs=[] counts no such run;"
            " train the model with the critic's ledger in earlier_ledgers, or save the pipeline without the critic"
        )
    try:
        adjacency = plan_of(report).adjacency
    except ValueError as error:
        problems.append(f"mechanism: {str(error).removesuffix('.')}")
    else:
        if report["adjacency"]["relation"] != adjacency:
            problems.append(
                f"adjacency.relation={report['adjacency']['relation']!r} must be {adjacency!r}, the relation that"
                f" sampling={sampling['used']!r} is accounted under; take both from DPTrainer.privacy_report()"
            )
        elif report["claim"]["statement"] != statement(report):
            problems.append(
                f"claim.statement={_short(report['claim']['statement'])!r} must be what the other fields say:"
                f" {statement(report)}"
            )
    return problems


__all__ = ["SCHEMA", "canonical", "check_words", "leaves", "name_of", "parse", "plan_of", "rule"]
