"""The README made from the card: it says what a reader must know, and no text of the report becomes markup."""

import random
import re
from pathlib import Path

import pytest
from card_reports import PLAN, PLANS, SINGLE_PASS, TRUNCATED, body, changed, fields_of, report, save_pipeline, value_at
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_spectral_dp import card as module
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.privacy.budget import round_up


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


def test_the_readme_has_front_matter_for_the_hub(folder):
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.tags == ["differential-privacy", "dp-sgd", "wavelet", "hf_spectral_dp"]
    assert ModelCard(PrivacyCard(report()).render()).data.license is None


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
        "How to use it", "What the guarantee covers", "What this does NOT mean", "Mechanism", "Privacy profile",
        "How to recompute ε", "Public components", "Hyper-parameter tuning", "Accesses outside the guarantee",
        "Evaluation", "Training", "Limits",
    ]  # fmt: skip
    for phrase in ("all checkpoints", "any number of generated images", "super-resolution", "DPSpectralPipeline"):
        assert phrase in text
    for fact in ("| 5.0 |", "| poisson, rate 0.05 |", "| 250.0 |", "| 4 of 4 |", "drawn glyphs", "private test split"):
        assert fact in text
    assert "| digits, test | accuracy | 0.83 | 1000 | one seed |" in text
    for entry in PLAN.profile():
        assert f"| {entry['delta']} | {entry['epsilon']} |" in text


@pytest.mark.parametrize("plan", [TRUNCATED, SINGLE_PASS], ids=lambda plan: plan.sampling)
def test_another_relation_is_said_in_words(plan):
    text = PrivacyCard(report(plan)).render()
    assert "differentially private under replacing one row of" in text and "by an empty place that contributes" in text
    assert "adding or removing" not in text and "added or removed" not in text and "zeroed out" in text
    assert f"| {plan.sampling}, rate 0.05 |".replace("_", "\\_") in text
    assert ("| Largest batch | 300 |" in text) == (plan is TRUNCATED)


def test_nothing_to_list_is_said_in_words():
    fields = {**report(), "public_components": [], "outside_guarantee": [], "evaluation": [], "post_processing": []}
    fields["training"]["adapter"] = None
    text = PrivacyCard(fields).render()
    assert "The publisher states that there were none." in text
    assert "No figures were recorded." in text
    assert "| adapter | none |" in text


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
    PrivacyCard.load(folder).save_readme(folder)
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


def free_text() -> list[tuple]:
    paths = [path for path in fields_of(report()) if isinstance(value_at(report(), path), str)]
    paths += [("post_processing", 0), ("outside_guarantee", 0)]
    fixed = {"adjacency", "accountant", "sampling", "type", "head"}
    return [path for path in paths if path[-1] not in fixed]


def test_no_text_of_the_report_becomes_markup():
    fields = report()
    assert len(free_text()) >= 20
    for path in free_text():
        plain = shape(PrivacyCard(changed(fields, path, "plain")).render())
        for text in random.Random(str(path)).sample(HOSTILE, 6):  # each text meets several fields; all pairs take long
            assert shape(PrivacyCard(changed(fields, path, text)).render()) == plain, (path, text)
    for text in HOSTILE:
        hostile = {**changed(fields, ("data", "description"), text), "hyperparameter_tuning": text}
        hostile["training"][text] = hostile["software"][text] = text
        plain = {**changed(fields, ("data", "description"), "plain"), "hyperparameter_tuning": "plain"}
        plain["training"]["plain"] = plain["software"]["plain"] = "plain"
        rendered = PrivacyCard(hostile).render()
        assert shape(rendered) == shape(PrivacyCard(plain).render()), text
        assert words(rendered).count(" ".join(text.split())) >= 5, text  # and it is still readable
        assert ModelCard(rendered).data.license is None


def test_formulas_and_control_characters_are_defused():
    text = PrivacyCard(changed(report(), ("data", "name"), "a\u202eb\x00c $x$ \\(y\\)")).render()
    assert "a b c &#36;x&#36; &#92;(y&#92;)" in text
    assert not re.search("[\u202e\x00$\\\\](?![*_|~#`\\[\\]])", text)


def test_a_hostile_license_stays_in_the_front_matter():
    rendered = PrivacyCard(report()).render(license="x\n---\n<script>")
    assert ModelCard(rendered).data.license == "x\n---\n<script>"
    assert "<script>" not in body(rendered.replace("\n  ---", ""))
