"""The privacy card: `privacy.json`, which a program can recompute, and the `README.md` made from it for people.

The report says what was guaranteed and how; the README is rendered from it and from nothing else. What the card should
say follows "How to DP-fy ML" (arXiv:2303.00654, Section 5.3). A fact that is missing is an error, never a blank.

What a card proves: `verify` shows that the claim follows from the recorded mechanism and that the files are those the
card was written for. It cannot show that the training run did what the record says.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from .released_files import README_NAME, REPORT_NAME, SAMPLES_NAME, check_own_folder, hash_released
from .report_rules import canonical, parse, rule
from .verification import (
    claim_contradictions,
    event_contradictions,
    file_contradictions,
    ledger_contradictions,
    network_contradictions,
    text_contradictions,
)
from .whole_files import replace_files

_TEMPLATES = Path(__file__).parent / "templates"


class PrivacyCard:
    """A validated privacy report. Immutable: `report` is a fresh copy, and there is nothing to set.

    Args:
        report: plain JSON values, as `templates/privacy.schema.json` describes them: `DPTrainer.privacy_report()` plus
            `data`, `public_data`, `hyperparameter_tuning`, `audit`, `utility`, `reproduce`, `license` and `contact`,
            which only the publisher knows; more may be added to `data_accesses`, `not_covered` and the other lists.
            `released` may be left out; `save` takes it from the folder.

    Raises:
        ValueError: a field is missing, unknown, out of range, or contradicts another. Names them all.
    """

    __slots__ = ("_text",)

    def __init__(self, report: Mapping[str, Any]):
        self._text = canonical(report)

    @property
    def report(self) -> dict[str, Any]:
        """A copy of the report."""
        return json.loads(self._text)

    @property
    def guarantee(self) -> str:
        """The guarantee in one sentence."""
        return self.report["claim"]["statement"]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of `privacy.json`; the README states it."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "PrivacyCard":
        """Reads the card of a saved pipeline or model.

        Raises:
            FileNotFoundError: the folder holds no card.
            ValueError: the card is not valid, or lists no files.
        """
        path = Path(folder) / REPORT_NAME
        try:
            report = parse(path.read_bytes())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} does not exist, so nothing says what was guaranteed; name a folder with a privacy card, as"
                " examples/train.py and PrivacyCard(report).save(folder) write it."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is no readable JSON ({error}); restore it, or save the card again.") from error
        if not isinstance(report, dict):
            kind = type(report).__name__
            raise ValueError(f"{path} holds a {kind}, not a report; restore it, or save the card again.")
        card = cls(report)
        if "released" not in report:
            raise ValueError(f"released is missing in {path}: {rule(('released',))}.")
        return card

    def save(self, folder: str | Path) -> "PrivacyCard":
        """Writes `privacy.json` and `README.md` beside the files of a saved pipeline, or of a model alone.

        Both are complete on the disk before the first is replaced, and each is replaced as a whole. Save the pipeline
        first: the card vouches for the files that are there now.

        Args:
            folder: holds the saved pipeline, at least one .safetensors file, and nothing that is no part of it.

        Returns:
            The card as it was saved, with `released`.

        Raises:
            ValueError: there are no weights in the folder, other files than those of a pipeline, or a network of a
                private run that the report does not count.
            OSError: a file cannot be read or written; the files that were there are still whole.
        """
        folder = Path(folder)
        released = hash_released(folder)
        if not any(str(entry["path"]).endswith(".safetensors") for entry in released):
            raise ValueError(f"folder={str(folder)!r} holds no .safetensors file; save the pipeline there first.")
        check_own_folder(folder)
        card = PrivacyCard({**self.report, "released": released})
        if problems := network_contradictions(card.report, folder):
            raise ValueError(" ".join(problems))
        replace_files({folder / REPORT_NAME: card._text.encode(), folder / README_NAME: card.render().encode()})
        return card

    def save_readme(self, folder: str | Path) -> None:
        """Renders `README.md` again, as `save` does, and touches nothing else: no hash is taken anew."""
        replace_files({Path(folder) / README_NAME: self.render().encode()})

    def render(self) -> str:
        """The README: YAML front matter for the Hub, then Markdown. Text of the report cannot become markup."""
        report = self.report
        names = [entry["path"] for entry in report.get("released", [])]
        prompted = report["training"]["conditioning"] == "text"
        whole = not names or "model_index.json" in names
        task = "text-to-image" if prompted else "unconditional-image-generation"
        data = ModelCardData(
            license=report["license"],
            library_name="diffusers" if whole else "transformers",
            pipeline_tag=task,
            model_name=_one_line(report["data"]["name"]) or "unnamed",
            eval_results=[_eval_result(task, row) for row in report["utility"]] or None,
            tags=["differential-privacy", "dp-sgd", "wavelet", "hf_spectral_dp"],
        )
        body = _template().render(
            report,
            certainty=_certainty(report["claim"]["epsilon"]),
            samples=SAMPLES_NAME in names,
            pipeline=whole,
            sha256=self.sha256,
        )
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).rstrip() + "\n"

    def verify(self, folder: str | Path | None = None, ledger: str | Path | None = None) -> list[str]:
        """Recomputes what can be recomputed. Returns the contradictions in plain words; an empty list is good news.

        Args:
            folder: where the pipeline lies; without it, no file is looked at.
            ledger: the ledger of the run, where it is at hand; it stays with the curator.
        """
        return [contradiction for found in self.checks(folder, ledger).values() for contradiction in found]

    def raise_contradictions(self, folder: str | Path) -> None:
        """Raises ValueError if `verify` contradicts that the folder is what the card says; names all contradictions."""
        if contradictions := self.verify(folder):
            raise ValueError(f"{str(folder)!r} is not what its card says: {' '.join(contradictions)}")

    def checks(self, folder: str | Path | None = None, ledger: str | Path | None = None) -> dict[str, list[str]]:
        """As `verify`, by check: what was checked, and its contradictions."""
        report = self.report
        results = {
            "event agrees with the mechanism": event_contradictions(report),
            "claim follows from the recorded event": claim_contradictions(report),
            "ledger agrees with the charged steps": ledger_contradictions(report, ledger),
        }
        if folder is not None:
            folder, again = Path(folder), f"`hf-spectral-dp card` renders it from {REPORT_NAME}"
            results["files are those of the card"] = file_contradictions(report, folder)
            results["networks are public or counted"] = network_contradictions(report, folder)
            results[f"{REPORT_NAME} is the card"] = text_contradictions(
                REPORT_NAME, self._text, folder / REPORT_NAME, "restore it, or save the card again"
            )
            results["README is the card's"] = text_contradictions(
                README_NAME, self.render(), folder / README_NAME, again
            )
        return results


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
    environment.filters |= {"percent": _percent, "code": _as_code}
    return environment.get_template("README.md.jinja")


# A backslash where Markdown knows it; entities where HTML or formulas come first.
_HARMLESS = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\\": "&#92;", **{mark: "\\" + mark for mark in "`*_[]|~#"}}
)


def _eval_result(task: str, row: Mapping[str, Any]) -> EvalResult:
    """A figure as the Hub shows it beside a model."""
    return EvalResult(
        task_type=task,
        dataset_type=_slug(row["dataset"]),
        dataset_name=_one_line(row["dataset"]),
        metric_type=_slug(row["metric"]),
        metric_name=_one_line(row["metric"]),
        metric_value=row["value"],
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _certainty(epsilon: float) -> str:
    """How sure of a fact somebody can become who held it for as likely as not: 1 / (1 + exp(-epsilon)), in percent."""
    return _percent(1 / (1 + math.exp(-epsilon)))


def _percent(share: float) -> str:
    """A share in percent with two decimals, rounded up."""
    return f"{math.ceil(1e4 * share - 1e-9) / 100:g} %"


def _as_code(text: str) -> Markup:
    """Text inside a fenced block: one line, in which nothing ends the block."""
    return Markup(_one_line(text).replace("`", "'").replace("~~~", "~"))


def _one_line(text: str) -> str:
    """Text without line breaks, which would start a new block, and control characters, which could turn it around."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _as_text(value: Any) -> str:
    """What an expression of the template prints: one line on which nothing is HTML, Markdown or a formula."""
    if isinstance(value, Markup):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    text = _one_line(text).translate(_HARMLESS)
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)  # would begin a list, a rule or a heading


__all__ = ["PrivacyCard"]
