"""The page stands alone: nothing is fetched, everything is said, no text becomes markup; a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from assessment_parts import owners_assessment, strangers_assessment
from card_reports import COMPOSED, changed, report
from PIL import Image
from scipy.stats import norm

from hf_spectral_dp.report import render_report, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
BROWSERS_OWN = ("google.com", "googleapis.com", "gvt1.com")  # what it asks for on its own, whatever the page
VOID = {"img", "meta", "link", "br", "hr", "input", "path", "use", "rect", "line"}


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.ids, self.tags, self.words = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        fields = dict(attributes)
        self.ids += [fields["id"]] if "id" in fields else []
        self.fetched += [fields[name] for name in ("src", "srcset", "data", "poster", "action") if name in fields]
        if tag != "a" and "href" in fields:
            self.fetched.append(fields["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def owners():
    return owners_assessment()


@pytest.fixture(scope="module")
def strangers():
    return strangers_assessment()


@pytest.fixture(scope="module")
def page(owners):
    return render_report(owners, report())


def test_the_page_is_well_formed_and_fetches_nothing(page):
    reader = read(page)
    assert not reader.open and len(reader.ids) == len(set(reader.ids))
    assert reader.tags.count("img") > 60 and reader.tags.count("svg") == 4
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in reader.fetched)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    assert "@import" not in page and not re.search(r"url\((?!#)", page) and "http" not in re.sub("http-equiv", "", page)


def test_every_section_has_its_figures(page, owners):
    text = " ".join(" ".join(read(page).words).split())
    claim = report()["claim"]
    for said in (claim["statement"], "Fréchet distance", "convolutional", "residual", "mixer", "no sign of copying",
                 "Without privacy", "For the owner of the data", "nearest training image (private)", "not accounted",
                 "covered by the claim", f"μ = {claim['gaussian_dp']['mu']}", "Evidence, not a guarantee"):  # fmt: skip
        assert said in text, said
    share = owners.leakage["this model"].copying.share
    assert f"{100 * share:.1f} %" in text


def test_private_pictures_and_warnings_only_where_they_belong(strangers):
    text = " ".join(read(render_report(strangers, report())).words)
    assert "(private)" not in text and "For the owner of the data" not in text and "Only their owner" not in text
    assert "not looked for" in text


def test_attacks_on_rows_are_not_held_against_a_claim_for_persons(page, owners):
    """Two opposite rows of a person in one full batch under noise of 1: without one of them, a test of 1 % false alarms
    finds the other in twice as many cases as it could find the person."""
    person = norm.sf(norm.isf(0.01) - 1)
    row = (0.01 + norm.sf(norm.isf(0.01) - 2)) / 2
    assert row > 2 * person
    protects_persons = render_report(owners, changed(report(), ("unit", "level"), "person"))
    for said in ("for any one row", "Points: the best of the attacks", "best attack on this model"):
        assert said in page and said not in protects_persons


def test_earlier_runs_are_on_the_page_and_in_its_figures(strangers):
    text = " ".join(read(render_report(strangers, report(COMPOSED))).words)
    assert f"ε = {COMPOSED.epsilon():.3g}" in text and text.count("Of an earlier run on the same data") == 2
    assert "Of an earlier run" not in " ".join(read(render_report(strangers, report())).words)


def test_a_generator_of_public_images_claims_nothing(strangers):
    reader = read(render_report(strangers, None, "drawn digits"))
    text = " ".join(" ".join(reader.words).split())
    assert not reader.open and "No private image was used" in text and "no claim" in text and "drawn digits" in text
    assert "ε" not in text and "not accounted" not in text and "private generator" not in text
    assert reader.tags.count("svg") == 1  # of utility; none of attacks
    with pytest.raises(ValueError, match="needs a name"):
        render_report(strangers, None)


def test_text_of_the_card_is_no_markup(strangers):
    wicked = "<script>alert(1)</script>\"'><img src=http://x>"
    fields = changed(report(), ("data", "name"), wicked)
    fields = changed(fields, ("hyperparameter_tuning", "statement"), wicked)
    reader = read(render_report(strangers, fields))
    assert "script" not in reader.tags and all(source.startswith(("data:", "#")) for source in reader.fetched)


def test_files_are_written_whole_and_repeat_themselves(strangers, tmp_path):
    path = write_report(strangers, report(), tmp_path / "new" / "report")
    assert sorted(file.name for file in path.parent.iterdir()) == ["assessment.json", "index.html"]
    assert json.loads((path.parent / "assessment.json").read_text())["generated"] == strangers.generated
    first = path.read_bytes()
    assert write_report(strangers, report(), path.parent).read_bytes() == first


def test_a_browser_shows_the_page_and_it_asks_nothing_of_the_network(owners, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    def shown(path) -> tuple[str, set[str]]:
        """The page as the browser built it, and the hosts that were asked for; none can be reached."""
        log = tmp_path / "net.json"
        done = subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1200,3000",
                "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}",
                f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert "Refused to" not in done.stderr
        hosts = set(re.findall(r'"(?:url|original_url)":"https?://([^/"]+)', log.read_text()))
        return done.stdout, {host for host in hosts if not host.endswith(BROWSERS_OWN)}

    page, hosts = shown(write_report(owners, report(), tmp_path / "report"))
    assert "What touched private data" in page and not hosts
    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 100  # pictures and plots, not a blank page
    (tmp_path / "other.html").write_text("<img src='http://elsewhere.invalid/x.png'>")
    assert shown(tmp_path / "other.html")[1] == {"elsewhere.invalid"}  # the log does show what a page asks for
