"""The privacy card: `privacy.json`, which a program can recompute, and the `README.md` made from it for people.

The report says what was guaranteed and how; the README is rendered from it and from nothing else. What the card should
say follows "How to DP-fy ML" (arXiv:2303.00654, Section 5.3). A fact that is missing is an error, never a blank.

What a card proves: `verify` shows that the epsilon follows from the recorded mechanism and that the files are those the
card was written for. It cannot show that the training run did what the record says.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.validators import extend
from yaml import YAMLError

from .privacy.budget import PrivacyPlan, accountant_version, event_to_dict

REPORT_NAME = "privacy.json"
README_NAME = "README.md"
SAMPLES_NAME = "samples.png"

_TEMPLATES = Path(__file__).parent / "templates"
_SCHEMA = json.loads((_TEMPLATES / "privacy.schema.json").read_text(encoding="utf-8"))
# Epsilons are recorded with four decimals, rounded up. The transforms inside the accountant differ between processors
# in their last bits, which may move a figure over one such step, never over two.
_LAST_PLACE = 1e-4 + 1e-9


class PrivacyCard:
    """A validated privacy report. Immutable: `report` is a fresh copy, and there is nothing to set.

    Args:
        report: plain JSON values, as `templates/privacy.schema.json` describes them: `DPTrainer.privacy_report()` plus
            `data`, `public_components`, `hyperparameter_tuning`, `outside_guarantee` and `evaluation`, which only the
            publisher knows. `artifacts` may be left out; `save` takes it from the folder.

    Raises:
        ValueError: a field is missing, unknown, out of range, or contradicts another. Names them all.
    """

    __slots__ = ("_text",)

    def __init__(self, report: Mapping[str, Any]):
        problems = _not_plain(report)
        if not problems:
            text = json.dumps(dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            plain = json.loads(text)
            problems = _against_schema(plain) or _against_each_other(plain)
        if problems:
            raise ValueError("privacy report refused:\n" + "\n".join(f"- {problem}." for problem in problems))
        self._text = text

    @property
    def report(self) -> dict[str, Any]:
        """A copy of the report."""
        return json.loads(self._text)

    @property
    def guarantee(self) -> str:
        """The guarantee in one sentence."""
        fields = self.report["guarantee"]
        changes = {
            "add-or-remove-one": f"adding or removing {fields['unit']}",
            "zero-out-one": f"replacing {fields['unit']} by an empty place that contributes nothing",
        }
        return (
            f"Training was (ε = {fields['epsilon']}, δ = {fields['delta']})-differentially private under"
            f" {changes[fields['adjacency']]}."
        )

    @classmethod
    def load(cls, folder: str | Path) -> "PrivacyCard":
        """Reads the card of a saved pipeline.

        Raises:
            FileNotFoundError: the folder holds no card.
            ValueError: the card is not valid, or lists no artifacts.
        """
        path = Path(folder) / REPORT_NAME
        try:
            report = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist; PrivacyCard(report).save(folder) writes it.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no readable JSON ({error}); restore it, or save the card again.") from error
        card = cls(report)
        if "artifacts" not in card.report:
            raise ValueError(f"artifacts is missing in {path}: {_rule(('artifacts',))}.")
        return card

    def save(self, folder: str | Path, license: str | None = None) -> "PrivacyCard":
        """Writes `privacy.json` and `README.md` beside the files of a saved pipeline.

        Both are complete on the disk before the first is replaced, and each is replaced as a whole. Save the pipeline
        first: the card vouches for the files that are there now.

        Args:
            folder: holds the saved pipeline, at least one .safetensors file.
            license: identifier for the Hub, such as "apache-2.0". Left out, a README that is there keeps its own.

        Returns:
            The card as it was saved, with `artifacts`.

        Raises:
            ValueError: there are no weights in the folder.
            OSError: a file cannot be read or written; the files that were there are still whole.
        """
        folder = Path(folder)
        artifacts = _hash_artifacts(folder)
        if not any(name.endswith(".safetensors") for name in artifacts):
            raise ValueError(f"folder={str(folder)!r} holds no .safetensors file; save the pipeline there first.")
        card = PrivacyCard({**self.report, "artifacts": artifacts})
        _replace(folder, {REPORT_NAME: card._text, README_NAME: card._readme_for(folder, license)})
        return card

    def save_readme(self, folder: str | Path, license: str | None = None) -> None:
        """Renders `README.md` again, as `save` does, and touches nothing else: no hash is taken anew."""
        _replace(Path(folder), {README_NAME: self._readme_for(Path(folder), license)})

    def render(self, license: str | None = None, samples: bool = False) -> str:
        """The README: YAML front matter for the Hub, then Markdown. Text of the report cannot become markup.

        Args:
            license: identifier for the Hub, such as "apache-2.0".
            samples: show `samples.png`.
        """
        text = self.report["training"].get("conditioning") == "text"
        data = ModelCardData(
            license=license,
            library_name="diffusers",
            pipeline_tag="text-to-image" if text else "unconditional-image-generation",
            tags=["differential-privacy", "dp-sgd", "wavelet", "hf_spectral_dp"],
        )
        report = self.report
        body = _template().render(
            report,
            sentence=self.guarantee,
            certainty=_certainty(report["guarantee"]["epsilon"]),
            samples=samples,
        )
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).rstrip() + "\n"

    def verify(self, folder: str | Path | None = None) -> list[str]:
        """Recomputes what can be recomputed. Returns the contradictions in plain words; an empty list is good news.

        Args:
            folder: where the pipeline lies; without it, no file is looked at.
        """
        return [contradiction for found in self.checks(folder).values() for contradiction in found]

    def checks(self, folder: str | Path | None = None) -> dict[str, list[str]]:
        """As `verify`, by check: what was checked, and its contradictions."""
        report = self.report
        results = {
            "event agrees with the mechanism": _event_contradictions(report),
            "epsilon covers the recorded mechanism": _epsilon_contradictions(report),
            "ledger agrees with the charged steps": _ledger_contradictions(report),
        }
        if folder is not None:
            results["files are those of the card"] = _file_contradictions(report, Path(folder))
            results["README states this guarantee"] = _readme_contradictions(self.guarantee, Path(folder))
        return results

    def _readme_for(self, folder: Path, license: str | None) -> str:
        return self.render(license or _license_of(folder / README_NAME), samples=(folder / SAMPLES_NAME).exists())


# -- what a report must satisfy --------------------------------------------------------------------------------------

Key = tuple[str | int, ...]  # the way to a value in the report


def _is_integer(checker: TypeChecker, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON Schema takes 300.0, dp_accounting does not


_TYPES = Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
_VALIDATOR = extend(Draft202012Validator, type_checker=_TYPES)(_SCHEMA)


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Everything that is no container, with the way to it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*key, index))
    else:
        yield key, value


def _name(key: Key) -> str:
    """("guarantee", "profile", 0) is guarantee.profile[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".") or "report"


def _short(text: object) -> str:
    return shown if len(shown := str(text)) <= 100 else shown[:97] + "..."


def _rule(key: Key) -> str:
    """The description in the schema that is nearest to a field: its rule, and where its value comes from."""
    node, rule = _SCHEMA, _SCHEMA["description"]
    for part in key:
        node = node.get("properties", {}).get(part) or node.get("items") or node.get("additionalProperties") or {}
        rule = node.get("description", rule)
    return rule


def _not_plain(report: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in _leaves(report):
        if not all(isinstance(part, str | int) for part in key):
            problems.append(f"{_name(key)} has a key that is no text; JSON keys are")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{_name(key)}={value} must be finite; {_rule(key)}")
        elif not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            problems.append(f"{_name(key)}={_short(repr(value))} is a {kind}, not a plain JSON value; convert it")
    return problems


def _against_schema(report: dict[str, Any]) -> list[str]:
    problems = []
    for error in _VALIDATOR.iter_errors(report):
        key = tuple(error.absolute_path)
        if error.validator == "required":
            missing = [(*key, name) for name in error.validator_value if name not in error.instance]
            problems += [f"{_name(field)} is missing, and nothing fills it in: {_rule(field)}" for field in missing]
        else:
            value = repr(error.instance)
            broken = error.message.removeprefix(value).strip()  # most messages repeat the value
            problems.append(f"{_name(key)}={_short(value)}: {_short(broken)}; {_rule(key)}")
    return sorted(set(problems))


def _plan_of(report: dict[str, Any]) -> PrivacyPlan:
    """The plan that the recorded mechanism followed.

    Raises:
        ValueError: there is no such plan.
    """
    guarantee, mechanism = report["guarantee"], report["mechanism"]
    return PrivacyPlan(
        num_examples=mechanism["num_examples"],
        sampling_rate=mechanism["sampling_rate"],
        steps=mechanism["planned_steps"],
        noise_multiplier=mechanism["noise_multiplier"],
        target_epsilon=guarantee["epsilon"],
        delta=guarantee["delta"],
        sampling=mechanism["sampling"],
        max_batch_size=mechanism["max_batch_size"],
    )


def _against_each_other(report: dict[str, Any]) -> list[str]:
    guarantee, mechanism = report["guarantee"], report["mechanism"]
    delta, num_examples = guarantee["delta"], mechanism["num_examples"]
    planned, charged = mechanism["planned_steps"], mechanism["charged_steps"]
    size, expected = mechanism["expected_batch_size"], mechanism["sampling_rate"] * num_examples
    problems = []
    if not delta < 1 / num_examples:
        problems.append(
            f"guarantee.delta={delta} must be below 1/num_examples = {1 / num_examples:.3g}; state epsilon at a smaller"
            " delta, such as privacy.budget.default_delta(num_examples)"
        )
    if charged > planned:
        problems.append(
            f"mechanism.charged_steps={charged} must not exceed planned_steps={planned}; the ledger refuses such steps,"
            " so take both from DPTrainer.privacy_report()"
        )
    if not math.isclose(size, expected, rel_tol=1e-9):  # one product of two floats, whatever its rounding
        problems.append(
            f"mechanism.expected_batch_size={size} must be sampling_rate * num_examples = {expected}; batches of a size"
            " that depends on the data are another mechanism"
        )
    try:
        adjacency = _plan_of(report).adjacency
    except ValueError as error:
        problems.append(f"mechanism: {str(error).removesuffix('.')}")
    else:
        if guarantee["adjacency"] != adjacency:
            problems.append(
                f"guarantee.adjacency={guarantee['adjacency']!r} must be {adjacency!r}, the relation that"
                f" sampling={mechanism['sampling']!r} is accounted under; take both from DPTrainer.privacy_report()"
            )
    return problems


# -- what can be recomputed ------------------------------------------------------------------------------------------


def _event_contradictions(report: dict[str, Any]) -> list[str]:
    mechanism = report["mechanism"]
    recorded = dict(_leaves(mechanism["event"]))
    implied = dict(_leaves(event_to_dict(_plan_of(report).event(mechanism["charged_steps"]))))
    return [
        f"mechanism.event.{_name(key)}={recorded.get(key)}, but the mechanism's other facts imply {implied.get(key)}."
        for key in sorted(recorded.keys() | implied.keys(), key=_name)
        if recorded.get(key) != implied.get(key)
    ]


def _epsilon_contradictions(report: dict[str, Any]) -> list[str]:
    guarantee, charged, plan = report["guarantee"], report["mechanism"]["charged_steps"], _plan_of(report)
    claims = [("epsilon", guarantee["epsilon"], plan.epsilon(charged))]
    for index, entry in enumerate(guarantee["profile"]):
        (recomputed,) = plan.profile(charged, [entry["delta"]])
        claims.append((f"profile[{index}].epsilon", entry["epsilon"], recomputed["epsilon"]))
    unamplified = guarantee["epsilon_without_amplification"]
    claims.append(("epsilon_without_amplification", unamplified, plan.epsilon_without_amplification(charged)))
    return [
        f"guarantee.{name}={recorded} is below {recomputed}, which the recorded mechanism costs (recorded with"
        f" {guarantee['accountant_version']}, recomputed with {accountant_version()})."
        for name, recorded, recomputed in claims
        if recorded < recomputed - _LAST_PLACE
    ]


def _ledger_contradictions(report: dict[str, Any]) -> list[str]:
    records, charged = report["ledger"]["records"], report["mechanism"]["charged_steps"]
    return [] if records == charged else [f"ledger.records={records}, but mechanism.charged_steps={charged}."]


def _file_contradictions(report: dict[str, Any], folder: Path) -> list[str]:
    recorded, found = report.get("artifacts", {}), _hash_artifacts(folder)
    problems = [f"{name} is on the card, but not in {folder}." for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{name} is in {folder}, but not on the card." for name in sorted(found.keys() - recorded.keys())]
    for name in sorted(recorded.keys() & found.keys()):
        if recorded[name] != found[name]:
            problems.append(f"{name} changed: SHA-256 {found[name]}, on the card {recorded[name]}.")
    return problems


def _readme_contradictions(guarantee: str, folder: Path) -> list[str]:
    readme = folder / README_NAME
    if readme.exists() and _as_text(guarantee) in readme.read_text(encoding="utf-8", errors="replace"):
        return []
    return [f"{README_NAME} does not say: {guarantee} `hf-spectral-dp card` writes it again from {REPORT_NAME}."]


# -- files -----------------------------------------------------------------------------------------------------------


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys, two readers may believe different ones."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(name for name, _ in pairs)}")
    return found


def _hash_artifacts(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight and configuration file in the folder; hidden files are those of git and of the Hub."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix in (".safetensors", ".json") and path.is_file() and not hidden and name != Path(REPORT_NAME):
            with path.open("rb") as file:
                hashes[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _license_of(readme: Path) -> str | None:
    """The license in the front matter of a README, if there is one."""
    try:
        return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError):
        return None


def _replace(folder: Path, texts: Mapping[str, str]) -> None:
    """Replaces files of a folder; none before all are on the disk."""
    contents = {folder / name: text.encode() for name, text in texts.items()}
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in contents:
            temporary[path].unlink(missing_ok=True)


# -- the README ------------------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    # Not ModelCard.from_template, which prints an undefined value as nothing.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        finalize=_as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("README.md.jinja")


# A backslash where Markdown knows it; entities where HTML or formulas come first.
_HARMLESS = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\\": "&#92;", **{mark: "\\" + mark for mark in "`*_[]|~#"}}
)


def _certainty(epsilon: float) -> str:
    """How sure of a fact somebody can become who held it for as likely as not: 1 / (1 + exp(-epsilon)), in percent."""
    return f"{math.ceil(1e4 / (1 + math.exp(-epsilon))) / 100:g} %"


def _as_text(value: Any) -> str:
    """What an expression of the template prints: one line on which nothing is HTML, Markdown or a formula."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    # Line breaks would start a new block; control characters could reverse the reading direction.
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    text = text.translate(_HARMLESS)
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)  # would begin a list, a rule or a heading


__all__ = ["PrivacyCard"]
