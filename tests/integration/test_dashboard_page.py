"""The dashboard in a browser, over real nodes: what people see, type and hear of."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import Running, running, tiny

from bsns.gateway.keys import add_key

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

__all__ = ["tiny"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium")

SLOW = {"BSNS_BLOCK_TIME_MS": "10"}
"""An answer lasts long enough to be looked at."""
WAIT_MS = 30_000


class Office:
    """Three nodes, of which two hold the same blocks, and a gateway."""

    def __init__(self, stack: ExitStack, model: str) -> None:
        self.model, self._stack = model, stack
        self.nodes: dict[str, Running] = {}
        self.invite = ""
        self._take_in(self._node("0:2"))
        for node in [self._node("2:4"), self._node("2:4")]:
            self._take_in(node)
        self.url = self.gateway()

    def _node(self, blocks: str) -> Running:
        join = ("--join", self.invite) if self.invite else ()
        words = ("serve", self.model, "--blocks", blocks, *join, "--threads", "1", "--json")
        return self._stack.enter_context(running(*words, env=SLOW))

    def _take_in(self, node: Running) -> None:
        serving = node.event("serving")
        self.invite = self.invite or serving["invite"]
        self.nodes["…" + serving["id"][-8:]] = node

    def gateway(self, *options: str) -> str:
        words = ("gateway", self.model, "--join", self.invite, "--port", "0", *options, "--json")
        url: str = self._stack.enter_context(running(*words)).event("listening")["url"]
        return url


@pytest.fixture(scope="module")
def office(tiny: str) -> Iterator[Office]:
    with ExitStack() as stack:
        yield Office(stack, tiny)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root it has none
        yield browser
        browser.close()


class Reader:
    """A page, and all that it complained about or asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(WAIT_MS)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def serves(self) -> None:
        """Waits until it shows a swarm that lacks nothing."""
        self.page.locator("#status[data-kind=good]").wait_for()

    def ask(self, text: str = "Name three rivers.") -> Any:
        """The answer's place, once it has begun."""
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")
        answer = self.page.locator("#chat-log article.assistant").last
        answer.locator(".text:not(:empty)").wait_for()
        return answer

    def fits(self) -> bool:
        fits: bool = self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        return fits


@pytest.fixture
def read(browser: Any, office: Office) -> Iterator[Any]:
    """Opens the dashboard; at the end nobody may have complained."""
    readers: list[Reader] = []

    def open_page(**options: Any) -> Reader:
        readers.append(Reader(browser, office.url, **options))
        readers[-1].serves()
        return readers[-1]

    yield open_page
    for reader in readers:
        reader.page.close()
        assert reader.complaints == []
        assert {re.sub(r"(//[^/]+)/.*", r"\1", url) for url in reader.asked} == {office.url}


def grows(reader: Reader, answer: Any) -> None:
    """Waits until the answer is longer than it is now."""
    length = len(answer.locator(".text").text_content())
    reader.page.wait_for_function(
        "([place, length]) => place.textContent.length > length",
        arg=[answer.locator(".text").element_handle(), length],
    )


def test_it_shows_the_swarm(read: Any, office: Office) -> None:
    reader = read()
    page = reader.page
    assert page.locator("#nodes tbody tr").count() == 3
    names = page.locator("#nodes th .name").all_text_contents()
    assert sorted(names) == sorted(office.nodes)
    assert page.locator("#graph .cards g").count() == 4
    page.locator("#plan .stages li").first.wait_for()
    page.get_by_role("img", name=re.compile("^Barcode: 3 bars")).wait_for()
    assert page.get_by_role("button", name=re.compile("^Node ….*blocks 0:2, serving")).count() == 1
    assert page.get_by_role("meter", name="Cache in use").count() == 3
    page.get_by_text("Links as a table").click()
    row = page.locator("#nodes tbody tr").first.element_handle()
    before = page.locator("#links tbody").text_content()
    page.wait_for_function("before => document.querySelector('#links tbody').textContent !== before", arg=before)
    assert row.evaluate("row => row.isConnected")  # who reads a table is not disturbed
    assert page.get_by_role("row", name=re.compile("^gateway …")).count() == 3


def test_an_answer_streams_and_its_route_shows(read: Any, office: Office) -> None:
    reader = read()
    answer = reader.ask()
    assert reader.page.locator("#chat-log").get_attribute("aria-busy") == "true"
    grows(reader, answer)
    reader.page.locator("#graph .on-route").nth(1).wait_for()
    arrows, stages = (reader.page.locator(f"#graph .{what}").count() for what in ("arrow", "on-route"))
    assert arrows == stages + 1
    reader.page.locator("#session").select_option("none")
    assert reader.page.locator("#graph .arrow").count() == 0
    reader.page.get_by_role("button", name="Stop").click()
    answer.get_by_text("Stopped").wait_for()
    assert reader.page.locator("#chat-log").get_attribute("aria-busy") == "false"
    assert reader.page.evaluate("document.title").startswith(Path(office.model).name)


def test_with_the_keyboard_alone(read: Any) -> None:
    reader = read()
    page = reader.page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the chat
    assert page.evaluate("document.activeElement.id") == "chat-text"
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.locator("#chat-log article.assistant .text:not(:empty)").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "chat-stop"
    page.keyboard.press("Enter")
    page.get_by_text("Stopped").wait_for()
    page.wait_for_function("document.activeElement.id === 'chat-text'")
    page.locator("#session").focus()
    page.keyboard.press("Tab")
    focused = page.locator("#graph .cards g:focus")
    assert focused.get_attribute("aria-label") == "This gateway"
    page.keyboard.press("ArrowRight")
    assert "blocks 0:2" in focused.get_attribute("aria-label")
    assert focused.locator(".ring").evaluate("ring => getComputedStyle(ring).stroke") != "none"
    page.keyboard.press("Enter")
    assert focused.get_attribute("aria-pressed") == "true"
    assert page.locator("#graph .touched").count() >= 1
    page.keyboard.press("Escape")
    assert focused.get_attribute("aria-pressed") == "false"


def test_on_a_phone(read: Any) -> None:
    reader = read(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    reader.page.locator("#plan .stages li").first.wait_for()
    assert reader.fits()
    reader.page.get_by_text("Links as a table").tap()
    reader.ask("a" * 200)
    assert reader.fits()
    cards = [card.bounding_box() for card in reader.page.locator("#graph .box").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in cards)


def luminance(page: Any, selector: str, what: str) -> float:
    """Of a colour, as WCAG 2.2 defines it."""
    colour = page.locator(selector).first.evaluate("(element, what) => getComputedStyle(element)[what]", what)
    channels = [int(word) / 255 for word in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_legible(read: Any, scheme: str) -> None:
    page = read(color_scheme=scheme).page
    ground = luminance(page, ".card.graph", "backgroundColor")
    assert (ground < 0.05) == (scheme == "dark")
    for selector in ("#graph-title", ".legend", "#nodes .condition", "#nodes .what", "#status"):
        text = luminance(page, selector, "color")
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5, selector


def test_nothing_moves_for_those_who_want_it_still(read: Any) -> None:
    reader = read(reduced_motion="reduce")
    reader.ask()
    reader.page.locator("#graph .route").first.wait_for()
    assert reader.page.evaluate("document.getAnimations().length") == 0
    lively = read()
    lively.ask()
    lively.page.locator("#graph .route").first.wait_for()
    assert lively.page.evaluate("document.getAnimations().length") > 0


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, office: Office, tmp_path: Path) -> None:
    word = add_key(tmp_path / "keys.json", "ann")
    reader = Reader(browser, office.gateway("--keys", str(tmp_path / "keys.json")))
    page = reader.page
    page.get_by_label("API key", exact=True).fill("wrong")
    page.get_by_role("button", name="Open").click()
    page.get_by_role("alert").get_by_text("does not know this key").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("API key", exact=True).fill(word)
    page.keyboard.press("Enter")
    reader.serves()
    grows(reader, reader.ask())
    page.locator("#graph .on-route").first.wait_for()
    assert page.evaluate("[...Object.values(sessionStorage), localStorage.length, document.cookie]") == [word, 0, ""]
    page.get_by_role("button", name="Forget the key").click()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator("#chat-log article").count() == 0
    assert page.get_by_label("API key", exact=True).is_visible()
    page.close()


def test_a_killed_node_turns_red_and_the_answer_goes_on(read: Any, office: Office) -> None:
    """The last test: the swarm is not whole afterwards."""
    reader = read()
    page = reader.page
    answer = reader.ask()
    page.locator("#graph .on-route").nth(1).wait_for()
    route = [card.get_attribute("aria-label") for card in page.locator("#graph .cards .on-route").all()]
    name = next(re.split("[ ,]", words)[1] for words in route if "2:4" in words)
    office.nodes[name].kill()
    page.locator("#graph [data-condition=lost]").wait_for()
    card = page.get_by_role("button", name=re.compile(f"^Node {name}.*lost"))
    stroke = re.findall(r"\d+", card.locator(".box").evaluate("box => getComputedStyle(box).stroke"))
    assert int(stroke[0]) > 2 * int(stroke[1])  # red
    page.locator("#nodes tr[data-condition=lost]").get_by_text(name).wait_for()
    happened = page.locator("#happened")
    happened.get_by_text(f"node {name} is lost").wait_for()
    happened.get_by_text("in place of").wait_for()
    assert page.locator("#figure-repairs").text_content() == "1"
    grows(reader, answer)
    page.get_by_role("button", name="Stop").click()
    answer.get_by_text("Stopped").wait_for()
    assert answer.locator(".error").count() == 0
    page.locator("#status[data-kind=good]").wait_for()
