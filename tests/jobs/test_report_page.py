"""The report in headless Chromium: no error, no request, the provenance view by mouse and keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.html.document import SOURCES
from tests.browser import Browser, program

pytestmark = [
    pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium-headless-shell"),
    pytest.mark.timeout(600),  # the run that is shared takes minutes
]

NOW = "document.querySelector('.tok.now')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def page(browser: Browser, throughput_output: Path) -> Browser:
    browser.messages.clear()
    browser.requests.clear()
    browser.open(throughput_output / "report.html", width=1200, height=900)
    return browser


def trail_of(page: Browser) -> dict[str, Any]:
    """The one that is shown."""
    title, method = page.run(
        "[document.getElementById('pick-output').value, document.querySelector('.pill[aria-checked=true]').textContent]"
    )
    trails = json.loads(page.run("document.getElementById('data').textContent"))["trails"]
    return next(trail for trail in trails if trail["title"] == title and trail["method"] == method)


@pytest.mark.parametrize(("width", "is_dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_it_opens_without_errors_or_requests(page: Browser, throughput_output: Path, width: int, is_dark: bool) -> None:
    page.open(throughput_output / "report.html", width=width, height=900, is_dark=is_dark)
    assert page.messages == [] and page.requests == []
    assert page.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 22, 26)" if is_dark else "rgb(251, 250, 248)")


def test_what_it_would_load_is_refused(page: Browser) -> None:
    page.run("document.addEventListener('securitypolicyviolation', (e) => { window.refused = e.violatedDirective; })")
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'})), 0")
    page.wait_for("window.refused === 'img-src'")
    assert any("Content Security Policy" in message for message in page.messages)


def test_prompts_are_text_and_not_markup(page: Browser) -> None:
    titles = page.run("[...document.getElementById('pick-output').options].map((o) => o.value)")
    second = next(title for title in titles if "turn 2" in title)
    page.run(
        f"(() => {{ const p = document.getElementById('pick-output'); p.value = {json.dumps(second)};"
        " p.dispatchEvent(new Event('change')); })()"
    )
    assert page.run("document.getElementById('said').textContent") == "Say </script> & <b> twice."
    assert page.run("document.querySelectorAll('#said *').length") == 0
    assert page.messages == []


def test_the_view_shows_the_trail(page: Browser) -> None:
    trail = trail_of(page)
    assert trail["method"] == "rasd"
    kinds = page.run("[...document.querySelectorAll('.tok')].map((t) => t.className)")
    assert kinds == [f"tok s-{SOURCES[token[1]]}" for token in trail["tokens"]]
    rounds = page.run("[...document.querySelectorAll('.round')].map((r) => r.children.length)")
    numbers = [token[6] for token in trail["tokens"]]
    assert rounds == [numbers.count(number) for number in dict.fromkeys(numbers)]
    assert page.run("document.querySelectorAll('#rounds > span').length") == len(rounds)


def test_pointing_at_a_token_tells_its_scores(page: Browser) -> None:
    trail = trail_of(page)
    place, token = next((i, t) for i, t in enumerate(trail["tokens"]) if SOURCES[t[1]] != "target")
    page.run(f"document.querySelectorAll('.tok')[{place}].id = 'wanted'")
    page.point_at("#wanted")
    page.wait_for(f"{NOW} && {NOW}.id === 'wanted'")
    detail = page.run("document.getElementById('detail').textContent")
    assert f"from {SOURCES[token[1]]}" in detail and f"depth {token[5]} of round {token[6]}" in detail
    assert f"estimated {round(100 * token[3] + 1e-9)}%" in detail


def test_arrow_keys_walk_through_tokens_and_rounds(page: Browser) -> None:
    rounds = [token[6] for token in trail_of(page)["tokens"]]
    at = "[...document.querySelectorAll('.tok')].indexOf(document.activeElement)"
    page.run("document.querySelector('.tok[tabindex=\"0\"]').focus()")
    assert page.run(at) == 0
    page.press("ArrowRight")
    assert page.run(at) == 1
    page.press("End")
    assert page.run(at) == len(rounds) - 1
    page.press("ArrowUp")
    assert page.run(at) == rounds.index(rounds[-1] - 1)
    page.press("ArrowDown")
    assert page.run(at) == rounds.index(rounds[-1])
    page.press("Home")
    page.press("ArrowLeft")
    assert page.run(at) == 0
    assert page.run("document.querySelectorAll('.tok[tabindex=\"0\"]').length") == 1, "one stop for the Tab key"
    assert page.messages == []


def test_a_source_alone_and_another_method(page: Browser) -> None:
    own = [SOURCES[token[1]] for token in trail_of(page)["tokens"]]
    page.point_at(".chip.s-target", click=True)
    assert page.run("document.querySelector('.chip.s-target').getAttribute('aria-pressed')") == "true"
    assert page.run("document.querySelectorAll('.tok.dim').length") == sum(source != "target" for source in own)
    page.point_at(".chip.s-target", click=True)
    assert page.run("document.querySelectorAll('.tok.dim').length") == 0
    page.run("[...document.querySelectorAll('.pill')].find((p) => p.textContent === 'plain').id = 'plain'")
    page.point_at("#plain", click=True)
    assert trail_of(page)["method"] == "plain"
    assert page.run("document.querySelectorAll('.tok:not(.s-target)').length") == 0
    assert page.run("document.querySelector('.chip.s-draft').disabled") is True
    page.press("ArrowRight")
    assert trail_of(page)["method"] == "context", "the arrow keys choose among methods"
    assert page.messages == []


def test_every_picture_has_words_and_a_table(page: Browser) -> None:
    assert page.run("[...document.querySelectorAll('main svg')].every((s) => s.getAttribute('aria-label'))")
    bare = "[...document.querySelectorAll('main section')].filter((s) => !s.querySelector('table')).map((s) => s.id)"
    assert page.run(bare) == ["provenance-view"]
