"""The page of the report in a real browser: Debian's chromium without a window, driven by selenium."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from finished_runs import FAILED, HELD, IN_PART_CELLS, OPEN, PROTOCOL, finished_run, verdict

from experiments.framework import registry, report
from experiments.framework.claim import Claim
from experiments.framework.experiment import Experiment

INSTALL = "apt-get install chromium chromium-driver && pip install selenium axe-core-python"
webdriver = pytest.importorskip("selenium.webdriver", reason=f"needs a browser: {INSTALL}")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=f"needs a browser: {INSTALL}")

WIDTHS = (360, 800, 1280)
LONG = "A claim whose sentence is long enough to be broken into several lines wherever the page is narrow."


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a page that has everything: all verdicts, two sources and themes, notes, disputes, questions."""
    directory = tmp_path_factory.mktemp("results")
    claims = [
        verdict(HELD, sentence="Held."),
        verdict(FAILED, sentence="Failed.", source="A book"),
        verdict(OPEN, sentence="Open."),
        verdict(IN_PART_CELLS, ("rate", "seed"), sentence=LONG),
    ]
    finished_run(directory, claims, protocol=PROTOCOL)
    finished_run(directory, [verdict([3.0, 3.1, 3.2], sentence="Far beyond.")], experiment="placement", sha256="0" * 64)
    (directory / "bad").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", _saying_more(registry.load))
        report.write_report(directory, None)
    return (directory / report.PAGE).as_uri()


def _saying_more(load):
    """Experiments that declare what is optional, with disputed claims."""

    def more(name):
        held = load(name)
        disputed = [claim_of(sentence) for sentence in ("Held.", "Far beyond.")]
        said = {
            "claims": disputed,
            "answer": {"cpu": "It does. So it is."},
            "surprise": "Who would have thought it?",
            "reader_questions": {"Is it needed?": "No. Never."},
        }
        return Experiment(**{**{field: getattr(held, field) for field in held.__dataclass_fields__}, **said})

    return more


def claim_of(sentence):
    """A claim on a question on which sources contradict each other."""
    return Claim(sentence, lambda r: r.v, measures="it", unit="points", above=0.5, dispute="Does it help?")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser without a window that keeps what it logs and requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """opened(width, scheme) -> the browser with the page in it, as it is first seen."""

    def at(width=1280, scheme="light", address=page):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(address)
        return browser

    return at


def shown(browser):
    """The claims that the map shows, in order."""
    script = "return [...document.querySelectorAll('.map > li')].filter((l) => l.offsetParent)"
    return browser.execute_script(f"{script}.map((l) => l.querySelector('.claim').innerText)")


def choose(browser, name, value):
    """Choose an entry of a filter as a person does."""
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("name", name)).select_by_visible_text(value)


def test_no_error_on_the_console_and_no_request_to_a_network(opened):
    browser = opened()
    browser.find_element("css selector", ".tile.held").click()
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests
    assert all(url.startswith(("file:", "data:", "about:")) for url in requests)
    assert len([url for url in requests if url.startswith("file:")]) == 1


def test_every_picture_loads_and_has_words(opened):
    found = opened().execute_script("return [...document.images].map((i) => [i.complete, i.naturalWidth, i.alt])")
    assert len(found) == 2
    assert all(complete and width > 0 and words.strip() for complete, width, words in found)


def test_filters_change_what_is_shown(opened):
    browser = opened()
    every = ["Held.", "Failed.", "Open.", LONG, "Far beyond."]
    assert shown(browser) == every
    browser.find_element("css selector", ".tile.failed").click()
    assert shown(browser) == ["Failed."]
    browser.find_element("css selector", ".tile.open").click()
    assert shown(browser) == ["Failed.", "Open."]
    assert browser.find_element("css selector", ".shown").text == "2 of 5 claims"
    choose(browser, "source", "A book")
    assert shown(browser) == ["Failed."]
    browser.find_element("css selector", ".tile.failed").click()
    assert shown(browser) == []
    assert browser.find_element("css selector", ".empty").is_displayed()
    browser.find_element("css selector", "button[type=reset]").click()
    assert shown(browser) == every
    choose(browser, "theme", "what it is")
    assert shown(browser) == ["Far beyond."]


SORTED = {
    "verdict": ["Far beyond.", "Held.", LONG, "Failed.", "Open."],
    "how far beyond the threshold": ["Far beyond.", LONG, "Held.", "Open.", "Failed."],
    "source": ["Failed.", "Held.", "Open.", LONG, "Far beyond."],
}


def test_sorting_changes_the_order(opened):
    browser = opened()
    for key, expected in SORTED.items():
        choose(browser, "sort", key)
        assert shown(browser) == expected
    choose(browser, "sort", "experiment")
    assert shown(browser) == ["Held.", "Failed.", "Open.", LONG, "Far beyond."]


def test_a_claim_leads_to_its_experiment(opened):
    browser = opened()
    browser.find_element("link text", "Far beyond.").click()
    assert browser.current_url.endswith("#placement-1")
    assert -5 <= browser.execute_script("return document.querySelector(':target').getBoundingClientRect().top") <= 900


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(opened, width):
    browser = opened(width)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """return [...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, .skip, svg')
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.execute_script(outside) == []


def test_dark_and_light_are_what_the_reader_asked_for(opened):
    brightness = """return ['backgroundColor', 'color'].map((name) =>
        getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0))"""
    page, ink = opened(scheme="light").execute_script(brightness)
    assert page > 700 > 200 > ink
    page, ink = opened(scheme="dark").execute_script(brightness)
    assert page < 100 < 600 < ink


def test_the_keyboard_reaches_and_works_everything(opened):
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    every = """return [...document.querySelectorAll('a[href], button, select, summary, [tabindex="0"]')]
        .filter((one) => one.checkVisibility()).length"""
    reached = []
    for _ in range(browser.execute_script(every)):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        here = browser.switch_to.active_element
        if here.id not in reached:
            reached.append(here.id)
    assert len(reached) == browser.execute_script(every)
    browser.execute_script("document.querySelector('.tile.failed').focus()")
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert shown(browser) == ["Failed."]
    summary = browser.find_element("tag name", "summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")


def test_on_paper_everything_is_open_and_filters_are_gone(opened):
    browser = opened()
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element("css selector", ".filters").is_displayed()
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0


def test_without_scripts_every_claim_is_there(opened, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened()
        assert len([one for one in browser.find_elements("css selector", ".map > li") if one.is_displayed()]) == 5
        assert not browser.find_element("css selector", ".filters").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_fault_in_accessibility(opened, width, scheme):
    found = importlib.util.find_spec("axe_core_python")
    if found is None or found.origin is None:
        pytest.skip("needs axe-core: pip install axe-core-python")
    browser = opened(width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    browser.execute_script(Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    violations = browser.execute_async_script("axe.run().then((r) => arguments[arguments.length - 1](r.violations))")
    told = [(one["id"], one["impact"], [node["html"][:90] for node in one["nodes"]][:3]) for one in violations]
    assert told == []


def test_the_committed_page_opens_and_is_small(opened):
    path = report.RESULTS / report.PAGE
    assert path.exists(), "run `python -m experiments report`"
    assert path.stat().st_size < 8 * 2**20
    browser = opened(address=path.as_uri())
    assert browser.get_log("browser") == []
    assert all(browser.execute_script("return [...document.images].map((i) => i.naturalWidth > 0)"))
    lines = browser.execute_script("return document.querySelectorAll('.map > li').length")
    assert len(shown(browser)) == 12 < lines
    more = browser.find_element("css selector", ".more")
    assert more.text == f"Show all {lines}"
    more.click()
    assert len(shown(browser)) == lines
    assert not more.is_displayed()
    assert browser.execute_script("return document.activeElement.closest('li')") == browser.execute_script(
        "return document.querySelectorAll('.map > li')[12]"
    )
