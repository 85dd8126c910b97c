"""The web page in a real browser, over a null engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tests.helpers.browser import Page, browser, find_browser, new_page
from tests.helpers.http_server import http_server
from tests.helpers.null_engine import LocalBackend, serving, write_model
from tests.helpers.scripted_backend import THINKING_TEMPLATE, ScriptedBackend

BROWSER = find_browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium or Chrome on the PATH, or named by CHROMIUM"
)

RUNNING = "document.querySelector('.message.running') !== null"
ANSWERED = "document.querySelectorAll('.message.assistant:not(.running)').length"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, LocalBackend]]:
    """A model with a chat template, at 20 ms a step."""
    model = write_model(tmp_path_factory.mktemp("model"))
    with http_server(model, step_ms=20.0) as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    assert BROWSER is not None
    with browser(BROWSER, tmp_path_factory.mktemp("profile")) as port:
        yield port


@pytest.fixture
async def page(served: tuple[int, LocalBackend], chromium: int) -> AsyncIterator[Page]:
    async with new_page(chromium) as opened:
        await opened.resize(1280, 800)
        await opened.open(f"http://127.0.0.1:{served[0]}/")
        await opened.until("document.getElementById('model').textContent == 'tiny'")
        yield opened
        assert opened.errors == []
        origin = f"http://127.0.0.1:{served[0]}/"
        assert [url for url in opened.requests if not url.startswith(origin)] == []


async def ask(page: Page, text: str) -> None:
    await page.eval("document.getElementById('prompt').focus()")
    await page.type(text)
    await page.press("Enter")


# --- files ---


async def test_the_files_come_with_their_policy(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path / "model")) as (http, _):
        answer = await http.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        for name, kind in (("main.js", "text/javascript"), ("style.css", "text/css")):
            answer = await http.get(f"/web/{name}")
            assert answer.headers["content-type"].startswith(kind)
        again = await http.get("/web/style.css", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in ("/web/none.js", "/web/..%2fingress.py", "/web/../ingress.py"):
            assert (await http.get(path)).status_code == 404


async def test_status(tmp_path: Path) -> None:
    for template in (None, "{{ messages[0].content }}"):
        model = write_model(tmp_path / str(template is None), chat_template=template)
        async with serving(model) as (http, backend):
            status = (await http.get("/status")).json()
            assert (status["models"], status["max_model_len"]) == (["tiny"], 256)
            assert status["chat"] is (template is not None)
            (engine,) = status["engines"]
            assert engine["failure"] is None
            assert engine["shards"][0]["rank"] == 0
            backend.engine.fail("out of luck")
            assert (await http.get("/status")).json()["engines"][0]["failure"] == "out of luck"


# --- playground ---


@needs_browser
async def test_a_conversation(page: Page, served: tuple[int, LocalBackend]) -> None:
    await page.eval("document.querySelector('[name=max_tokens]').value = 20")
    await page.eval("document.querySelector('[name=seed]').value = 7")
    # Watched from inside the page: a busy machine may look too late.
    await page.eval(
        "window.seen = false; new MutationObserver(() => { window.seen ||= "
        f"{RUNNING} && document.querySelectorAll('.token').length > 2;"
        " }).observe(document.body, {childList: true, subtree: true}); true"
    )
    await ask(page, "Hello <b>there</b>")
    await page.until(ANSWERED)
    assert await page.eval("window.seen"), "tokens are shown as they come"
    assert await page.text(".message.user .text") == "Hello <b>there</b>"
    footer = await page.text(".message.assistant footer")
    assert footer.startswith("20 tokens · ")
    assert "tokens/s" in footer
    assert "first after" in footer
    shown = await page.eval("document.querySelector('.message.assistant .text').textContent")
    body = {
        "messages": [{"role": "user", "content": "Hello <b>there</b>"}],
        "max_tokens": 20,
        "seed": 7,
    }
    async with httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{served[0]}/v1/chat/completions"
        answer = (await http.post(url, json=body)).json()
    assert shown == answer["choices"][0]["message"]["content"]

    # Again, with another seed; there is still one answer.
    await page.eval("document.querySelector('[name=seed]').value = 8")
    await page.click(".message.assistant footer button:last-child")
    await page.until(RUNNING)
    await page.until(ANSWERED)
    assert await page.eval("document.querySelectorAll('.message').length") == 2
    again = await page.eval("document.querySelector('.message.assistant .text').textContent")
    assert again != shown

    # The next turn has all that was said before; clearing forgets it.
    await ask(page, "More")
    await page.until(f"{ANSWERED} == 2")
    await page.click("#clear")
    assert await page.eval("document.querySelectorAll('.message').length") == 0


@needs_browser
async def test_reasoning_is_folded_before_the_answer(tmp_path: Path, chromium: int) -> None:
    model = write_model(tmp_path / "model", chat_template=THINKING_TEMPLATE)
    frontend = Frontend.load(EngineConfig(model=str(model)))
    said = "<think>\nIt <b>may</b> rain.\n</think>\n\nTake a coat."
    with http_server(model) as (port, backend):
        backend.generate = ScriptedBackend(frontend, lambda _: said).generate  # type: ignore[method-assign]
        async with new_page(chromium) as page:
            await page.open(f"http://127.0.0.1:{port}/")
            await page.until("document.getElementById('model').textContent == 'tiny'")
            await ask(page, "Weather?")
            await page.until(ANSWERED)
            folded = "document.querySelector('.message.assistant .reasoning').open"
            assert not await page.eval(folded)
            assert await page.text(".message.assistant .text") == "Take a coat."
            await page.click(".reasoning summary")
            assert await page.eval(folded)
            assert await page.text(".reasoning div") == "It <b>may</b> rain."
            assert page.errors == []


@needs_browser
async def test_stop_ends_the_request(page: Page, served: tuple[int, LocalBackend]) -> None:
    scheduler = served[1].engine.scheduler
    for way in ("click", "key"):
        await page.eval("document.querySelector('[name=max_tokens]').value = 150")
        await ask(page, "Hello")
        await page.until("document.querySelectorAll('.message.running .token').length > 2")
        assert scheduler.stats().running == 1
        if way == "click":
            await page.click("#stop")
        else:
            await page.press("Escape")
        await page.until(ANSWERED)
        assert "stopped" in await page.text(".message.assistant footer")
        assert await page.eval("!document.getElementById('send').hidden")
        await page.until("new Promise((done) => setTimeout(() => done(true), 200))")
        assert scheduler.stats().running == 0
        await page.click("#clear")


@needs_browser
async def test_probabilities_on_hover_and_by_keyboard(page: Page) -> None:
    await ask(page, "Hello")
    await page.until(ANSWERED)
    hidden = "document.getElementById('tip').hidden"
    assert await page.eval(hidden)
    await page.hover(".message.assistant .token:nth-child(3)", until=f"!{hidden}")
    assert "100.0 %" in await page.text("#tip")
    await page.hover("#send", until=hidden)
    await page.eval("document.querySelector('.message.assistant .text').focus()")
    for _ in range(3):
        await page.press("ArrowRight")
    await page.press("ArrowLeft")
    chosen = "[...document.querySelectorAll('.token')].findIndex(e => e.matches('.chosen'))"
    assert await page.eval(chosen) == 1
    assert await page.eval("!document.getElementById('tip').hidden")


@needs_browser
async def test_tokens_fall_on_their_text(page: Page) -> None:
    """Pieces of characters wait for their text; both of the API's shapes are read."""
    script = """
      import('./web/tokens.js').then(({append, tokensOf}) => {
        const place = document.createElement('div');
        const token = (token) => ({token, logprob: -1, top_logprobs: []});
        const held = append(place, 'a b', tokensOf({content: [' a', 'x'].map(token)}));
        const none = append(place, '', [...held, ...tokensOf({content: [token('\\ufffd')]})]);
        const rest = append(place, 'é!', [...none, ...tokensOf({content: [token('!')]})]);
        const plain = tokensOf({tokens: ['q'], token_logprobs: [-2],
                                top_logprobs: [{r: -3, q: -2}]});
        append(place, 'no tokens', []);
        return [place.textContent, held.length, none.length, rest.length,
                plain[0].top.map((each) => each.token).join('')];
      })"""
    text, held, none, rest, order = await page.eval(script)
    assert text == "a bé!no tokens"
    assert (held, none, rest, order) == (0, 1, 0, "qr")


@needs_browser
async def test_settings_reach_the_server_and_last(
    page: Page, served: tuple[int, LocalBackend]
) -> None:
    seen = []
    backend = served[1]
    plain = backend.generate
    backend.generate = lambda request: seen.append(request) or plain(request)  # type: ignore
    try:
        values = {"temperature": "0.5", "top_k": "9", "max_tokens": "3", "min_p": "0.25"}
        for name, value in values.items():
            await page.eval(
                f"(() => {{ const field = document.querySelector('[name={name}]');"
                f"field.value = '{value}';"
                "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
        await ask(page, "Hello")
        await page.until(ANSWERED)
        await page.open(f"http://127.0.0.1:{served[0]}/")
        await page.until("document.getElementById('model').textContent == 'tiny'")
        await ask(page, "Hello")
        await page.until(ANSWERED)
    finally:
        del backend.generate
    assert len(seen) == 2
    for request in seen:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 9, 0.25)
        assert request.max_tokens == 3


@needs_browser
async def test_a_refusal_is_shown(page: Page) -> None:
    await page.eval("document.querySelector('[name=max_tokens]').value = 5000")
    await ask(page, "Hello")
    await page.until("document.querySelector('.message.error') !== null")
    assert "max_tokens is too large" in await page.text(".message.error .text")
    page.errors.clear()  # the browser reports the 400 by itself


@needs_browser
async def test_a_model_without_a_template_completes(tmp_path: Path, chromium: int) -> None:
    model = write_model(tmp_path / "model", chat_template=None)
    with http_server(model) as (port, _):
        async with new_page(chromium) as page:
            await page.open(f"http://127.0.0.1:{port}/")
            await page.until("!document.getElementById('no-template').hidden")
            await ask(page, "Once upon")
            await page.until(ANSWERED)
            assert (await page.text(".message.assistant .text")).startswith("Once upon")
            assert await page.eval("document.querySelectorAll('.token').length") > 2
            assert page.errors == []


# --- the API key ---


@needs_browser
async def test_the_page_asks_for_a_key_and_keeps_it_in_its_tab(
    tmp_path: Path, chromium: int
) -> None:
    model = write_model(tmp_path / "model")
    with http_server(model, limits={"api_key": ["secret"]}) as (port, _):
        async with new_page(chromium) as page:
            url = f"http://127.0.0.1:{port}/"
            await page.open(url)
            shown = "document.getElementById('unlock')?.open"
            await page.until(shown)
            assert await page.eval("document.getElementById('unlock-error').hidden")
            await page.type("wrong")
            await page.press("Enter")
            await page.until(f"{shown} && !document.getElementById('unlock-error').hidden")
            await page.type("secret")
            await page.press("Enter")
            await page.until("document.getElementById('model').textContent == 'tiny'")
            await ask(page, "Hello")
            await page.until(ANSWERED)
            # The tab remembers; nothing that outlives it does.
            await page.open(url)
            await page.until("document.getElementById('model').textContent == 'tiny'")
            assert not await page.eval("JSON.stringify(localStorage).includes('secret')")
            assert not await page.eval("document.cookie.includes('secret')")
            await page.click("#lock")
            await page.until(shown)
            assert all("401" in error for error in page.errors)
        async with new_page(chromium) as page:
            await page.open(url)
            await page.until(shown)


# --- engine ---


@needs_browser
async def test_the_engine_is_drawn(page: Page, served: tuple[int, LocalBackend]) -> None:
    await page.eval("document.getElementById('tab-chat').focus()")
    await page.press("ArrowRight")
    assert await page.eval("!document.getElementById('view-engine').hidden")
    assert await page.eval("document.getElementById('view-chat').hidden")
    await page.until("document.querySelectorAll('#shards tr').length == 1")
    assert "serves" in await page.text("#shards")
    async with httpx.AsyncClient(timeout=30) as http:
        url = f"http://127.0.0.1:{served[0]}/v1/completions"
        body = {"prompt": "the same beginning of a prompt", "max_tokens": 30, "n": 4}
        for _ in range(2):
            await http.post(url, json=body)
    # The next samples know of it: rates, percentiles, and blocks kept for reuse.
    described = "[...document.querySelectorAll('.chart svg')].map(e => e.ariaLabel).join()"
    await page.until(f"/Time between tokens.*p50 [0-9.]+ ms/.test({described})")
    await page.until(f"/generated [0-9.]+/.test({described})")
    assert "median" in await page.text("#tiles")
    ended = "document.querySelector('#tiles .tile:last-child b').textContent.split(' ')[0]"
    await page.until(f"Number({ended}) >= 8")
    legend = "document.getElementById('blocks-legend').textContent"
    await page.until(f"/^0 in use[1-9][0-9]* kept/.test({legend})")


@needs_browser
async def test_percentiles(page: Page) -> None:
    """Against counts by hand: ten at up to 1, ninety at up to 2, in proportion within."""
    script = """
      import('./web/engine.js').then(({parse, percentile}) => {
        const scrape = (label, low) => `tensorray:x_bucket{engine="${label}",le="1.0"} ${low}
tensorray:x_bucket{engine="${label}",le="2.0"} 50
tensorray:x_bucket{engine="${label}",le="+Inf"} 50
tensorray:y_total{engine="${label}"} 4
other:y_total 9`;
        const {values, buckets} = parse(scrape(0, 4) + '\\n' + scrape(1, 6));
        const later = buckets.x;
        return [values.y_total, percentile(later, null, 0.5), percentile(later, null, 0.05),
                percentile(later, later, 0.5), percentile({1: 0, Infinity: 5}, null, 0.5)];
      })"""
    total, half, low, none, beyond = await page.eval(script)
    assert total == 8
    assert half == pytest.approx(1 + 40 / 90)
    assert low == pytest.approx(0.5)
    assert none is None
    assert beyond == 1


@needs_browser
async def test_an_engine_that_failed_is_said(tmp_path: Path, chromium: int) -> None:
    with http_server(write_model(tmp_path / "model")) as (port, backend):
        backend.engine.failure = "out of luck"
        async with new_page(chromium) as page:
            await page.open(f"http://127.0.0.1:{port}/#engine")
            await page.until("document.getElementById('state').dataset.state == 'down'")
            assert await page.text("#failure") == "Engine 0: out of luck"


# --- looks ---


@needs_browser
async def test_nothing_is_cut_off_and_contrast_is_enough(page: Page) -> None:
    """At a phone's width nothing runs out of the page; text keeps WCAG's 4.5 to 1."""
    lum = """
      const lum = (color) => {
        const canvas = new OffscreenCanvas(1, 1).getContext('2d');
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const rgb = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2];
      };
      const ratio = (a, b) => {
        const [x, y] = [lum(a), lum(b)];
        return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
      };
      const style = (selector) => getComputedStyle(document.querySelector(selector));
    """
    for scheme in ("light", "dark"):
        await page.prefer(scheme)
        worst = await page.eval(
            f"(() => {{ {lum} return Math.min("
            "ratio(style('body').color, style('body').backgroundColor),"
            "ratio(style('.hint').color, style('body').backgroundColor),"
            "ratio(style('.model').color, style('header').backgroundColor),"
            "ratio(style('#send').color, style('#send').backgroundColor)) })()"
        )
        assert worst >= 4.5, scheme
    await page.resize(360, 700)
    for view in ("chat", "engine"):
        await page.click(f"#tab-{view}")
        assert await page.eval("document.documentElement.scrollWidth") <= 360
    boxes = "[...document.querySelectorAll('.tile, .chart')]"
    wide = f"{boxes}.filter((each) => each.scrollWidth > each.clientWidth)"
    assert await page.eval(f"{wide}.length") == 0


@needs_browser
async def test_a_phone_opens_the_settings(page: Page) -> None:
    await page.resize(390, 844)
    shown = "getComputedStyle(document.getElementById('aside')).display != 'none'"
    assert not await page.eval(shown)
    await page.click("#more")
    assert await page.eval(shown)
    await page.click("#more")
    assert not await page.eval(shown)


@needs_browser
async def test_everything_has_a_name(page: Page) -> None:
    """As a screen reader is told, by the browser's own accessibility tree."""
    tree = await page.send("Accessibility.getFullAXTree")
    roles = {"button", "tab", "textbox", "slider", "spinbutton", "checkbox", "radio"}
    nodes = [node for node in tree["nodes"] if node.get("role", {}).get("value") in roles]
    assert len(nodes) > 15
    unnamed = [json.dumps(node) for node in nodes if not node.get("name", {}).get("value")]
    assert unnamed == []
