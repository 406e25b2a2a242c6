"""The README made from the card: it says what a reader must know, and no text of the report becomes markup."""

import re
from functools import cache
from pathlib import Path

import jinja2
import pytest
from card_reports import (
    PLAN,
    PLANS,
    PUBLISHED,
    SINGLE_PASS,
    TRUNCATED,
    body,
    changed,
    fields_of,
    report,
    save_pipeline,
    value_at,
)
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_spectral_dp import card as module
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.privacy.budget import round_up
from hf_spectral_dp.privacy_report import run_report, statement


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


def test_the_readme_has_front_matter_for_the_hub(folder):
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.tags == ["differential-privacy", "dp-sgd", "wavelet", "hf_spectral_dp"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_type, result.metric_type) == ("digits, test", "digits-test", "accuracy")
    assert result.metric_value == 0.83 and "!!python" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("readme", ["---\nlicense: [\n---\n", "---\n- 1\n---\n", "no front matter", b"\xff"])
def test_a_readme_that_nobody_can_read_is_replaced(folder, readme):
    (folder / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    PrivacyCard.load(folder).save_readme(folder)
    assert PrivacyCard.load(folder).verify(folder) == []


def test_the_readme_says_what_a_reader_must_know():
    text = PrivacyCard(report()).render()
    epsilon = PLAN.epsilon()
    assert f"Training was (ε = {epsilon}, δ = 2e-05)-differentially private under adding or removing one row" in text
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    assert headings == [
        "What this means", "What this does NOT mean", "How to use it", "How to check it", "The claim in full", "Data",
        "Stages", "Mechanism", "Trust", "Quality", "Audit", "Training", "Files", "Limits",
    ]  # fmt: skip
    for phrase in ("all checkpoints", "any number of generated images", "super-resolution", "DPSpectralPipeline"):
        assert phrase in text
    for fact in ("| 5.0 |", "| poisson, rate 0.05 |", "| 250.0 |", "| 4 of 4 |", "drawn glyphs", "private test split"):
        assert fact in text
    assert "| digits, test | accuracy | 0.83 (0.82 to 0.85) | 1000 | yes | no | one seed |" in text
    assert "| one-run audit | epsilon | 0.01 | 1.0 | 0.95 | 500 | not refuted | no noise: 3.5, noticed |" in text
    for entry in PLAN.profile():
        mark = " (the claim)" if entry["delta"] == PLAN.delta else ""
        assert f"| {entry['delta']} | {entry['epsilon']}{mark} |" in text


@pytest.mark.parametrize("plan", [TRUNCATED, SINGLE_PASS], ids=lambda plan: plan.sampling)
def test_another_relation_is_said_in_words(plan):
    text = PrivacyCard(report(plan)).render()
    assert "differentially private under replacing one row of" in text and "by an empty place that contributes" in text
    assert "adding or removing" not in text and "added or removed" not in text and "zeroed out" in text
    assert f"| {plan.sampling}, rate 0.05 |".replace("_", "\\_") in text
    assert ("| Largest batch | 300 |" in text) == (plan is TRUNCATED)


def test_what_prompts_do_not_protect_is_said_of_a_model_that_takes_them():
    training = {**report()["training"], "conditioning": "text"}
    run = run_report(
        PLAN, PLAN.steps, "ab" * 32, clipping_norm=1.0, unit="one image with its captions", person=False,
        noise_source="cipher", training=training,
    )  # fmt: skip
    text = PrivacyCard({**run, **PUBLISHED}).render()
    assert ModelCard(text).data.pipeline_tag == "text-to-image" and "pipeline(prompt=" in text
    assert "- Not covered: prompts that users type" in text
    assert "- Not covered: a private caption used as a prompt" in text
    assert "prompt" not in PrivacyCard(report()).render()


def test_nothing_to_list_is_said_in_words():
    fields = {**report(), "public_data": [], "audit": [], "utility": []}
    fields["training"]["adapter"] = None
    text = PrivacyCard(fields).render()
    assert "**Public data**\n\nNone.\n" in text
    assert "No figures were recorded." in text and "No attack was tried on this model." in text
    assert "| Adapter | none |" in text


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.sampling)
def test_a_stranger_recomputes_epsilon_with_the_snippet(plan):
    text = PrivacyCard(report(plan)).render()
    (snippet,) = re.findall(r"```python\n(import dp_accounting.*?)```", text, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 9
    names: dict = {}
    exec(snippet, names)
    assert round_up(names["epsilon"]) == plan.epsilon()  # the same library at the same grid: not a digit apart


def test_how_sure_one_can_become():
    assert module._certainty(0.0) == "50 %"
    assert module._certainty(1.0986122) == "75 %"  # odds of 3 to 1; ln 3 is a little more
    assert module._certainty(8.0) == "99.97 %"
    assert module._certainty(1e4) == "100 %"


def test_samples_are_shown_if_there_are_any(folder):
    assert "samples.png" not in (folder / "README.md").read_text()
    (folder / "samples.png").write_bytes(b"")
    PrivacyCard.load(folder).save(folder)
    assert "](samples.png)" in (folder / "README.md").read_text()
    assert PrivacyCard.load(folder).verify(folder) == []


# -- no text becomes markup ------------------------------------------------------------------------------------------

HOSTILE = [
    "# Heading", "- item", "1. item", "2) item", "+ item", "---", "===", "> quote", "    code", "``` \ncode", "`code`",
    "<script>alert(1)</script>", "<!-- hidden", "<b>", "&lt;b&gt;", "[link](http://e)", "![image](b)", "[1]: http://e",
    "<http://e>", "**bold**", "_italic_", "__bold__", "~~struck~~", "a | b | c |", "\n\n# Heading\n\n", "a\\\nb", "\\",
    "\\|", "\\`", "\n---\nlicense: x\n---\n", "{{ 7*7 }}", "{% raw %}", "{# x #}", "$$x$$", "\\(x\\)", "*", "___",
]  # fmt: skip

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shape(readme: str) -> list:
    """The README as a parser sees it, without the words."""
    return [
        (token.type, token.level, [child.type for child in token.children or [] if not child.type.startswith("text")])
        for token in PARSER.parse(body(readme))
    ]


def words(readme: str) -> str:
    inline = [child for token in PARSER.parse(body(readme)) for child in token.children or []]
    return "".join(child.content if child.type.startswith("text") else "\n" for child in inline)


@cache
def free_text() -> list[tuple]:
    """The paths of all fields that take any text."""
    fields = report()
    paths = [path for path in fields_of(fields) if isinstance(value_at(fields, path), str)]
    paths += [("not_covered", 0), ("not_released", 0), ("limitations", 0)]
    return [path for path in paths if is_valid(changed(fields, path, "any text"))]


def is_valid(fields: dict) -> bool:
    try:
        PrivacyCard(fields)
    except ValueError:
        return False
    return True


def filled(texts: list[str]) -> str:
    """The README of a report whose every free field holds one of the texts, by turns."""
    fields = report()
    for index, path in enumerate(free_text()):
        node = value_at(fields, path[:-1])
        node[path[-1]] = texts[index % len(texts)]
    fields["claim"]["statement"] = statement(fields)  # made from the unit's definition
    return PrivacyCard(fields).render()


def test_no_text_of_the_report_becomes_markup():
    assert len(free_text()) >= 50
    plain = shape(filled(["plain"]))
    for turn in range(len(HOSTILE)):  # every text meets every field
        rendered = filled(HOSTILE[turn:] + HOSTILE[:turn])
        assert shape(rendered) == plain, turn
        assert ModelCard(rendered).data.license == "apache-2.0"
    for text in HOSTILE:
        assert words(filled([text])).count(" ".join(text.split())) >= 50, text  # and it is still readable


def test_formulas_and_control_characters_are_defused():
    text = PrivacyCard(changed(report(), ("data", "name"), "a\u202eb\x00c $x$ \\(y\\)")).render()
    assert "a b c &#36;x&#36; &#92;(y&#92;)" in text
    assert not re.search("[\u202e\x00$\\\\](?![*_|~#`\\[\\]])", body(text))


def test_a_command_stays_in_its_block():
    for text in ("```\n# Heading", "~~~\n<script>", "a\n```\n<b>", "`x`", "{{ 7*7 }}"):
        rendered = PrivacyCard(changed(report(), ("reproduce", "train"), text)).render()
        assert shape(rendered) == shape(PrivacyCard(report()).render()), text


def test_a_missing_value_stops_the_readme(monkeypatch):
    monkeypatch.setattr(module, "_certainty", lambda epsilon: jinja2.StrictUndefined(name="certainty"))
    with pytest.raises(jinja2.UndefinedError, match="certainty"):
        PrivacyCard(report()).render()


def test_every_fact_of_the_report_is_on_the_page():
    """Change any one fact: the page changes, beyond the hash that it states."""
    fields = report()
    before = PrivacyCard(fields).render().replace(PrivacyCard(fields).sha256, "")
    unseen = []
    for path in free_text():
        card = PrivacyCard(changed(fields, path, "other words"))
        if card.render().replace(card.sha256, "") == before:
            unseen.append(path)
    assert unseen == []
