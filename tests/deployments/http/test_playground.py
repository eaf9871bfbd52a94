"""The playground, in Chromium. Without one the tests are skipped: `apt-get install chromium` brings it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright
from served import MODEL, QUESTION, document, health, seconds_until_free

from benchmarks.screenshots import chromium
from deployments.schemas.rapid_fields import RapidFields, RetrievalFields

# Node writes through a pipe that Playwright leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

TEXT = document(0, characters=1200)
TIMEOUT_MS = 120_000
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = chromium(playwright.chromium)
        if path is None:
            pytest.skip("no Chromium is installed: apt-get install chromium, or playwright install chromium")
        with playwright.chromium.launch(executable_path=path) as browser:
            yield browser


@pytest.fixture
def page(browser: Browser, bytes_url: str) -> Iterator[Page]:
    """The page, freshly loaded; afterwards it must have met no error of its own, nor its policy."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if "Content Security Policy" in said.text else None)
        page.on(
            "request",
            lambda sent: None if sent.url.startswith(("http://127.0.0.1:", "data:")) else troubles.append(sent.url),
        )
        page.goto(bytes_url)
        expect(page.locator("#model")).to_have_text("bytes")
        yield page
        assert not troubles


def prepare(page: Page, *, tokens: int = 12, gamma: int | None = 3) -> None:
    """A passage, a question, and settings under which it is answered soon; with γ fixed, always in the same rounds."""
    page.get_by_label("Text of the document").fill(TEXT)
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.locator("summary", has_text="Settings").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Draft tokens a round").fill("" if gamma is None else str(gamma))


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#ask")).to_be_enabled(timeout=TIMEOUT_MS)


def request_of_the_page(text: str, model: str) -> dict[str, Any]:
    """What the page asked as `prepare` left it."""
    message = {"role": "user", "content": f"{text}\n\n{QUESTION}"}
    rapid = {"num_draft_tokens": 3}
    return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 12, "rapid": rapid}


def answer_of_the_api(url: str, text: str, *, model: str = "bytes") -> dict[str, Any]:
    body = request_of_the_page(text, model)
    answer: dict[str, Any] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_MS / 1e3).json()
    return answer


def rounds_of_the_api(url: str, text: str, *, model: str) -> list[dict[str, Any]]:
    body = request_of_the_page(text, model) | {"stream": True}
    body["rapid"]["trace"] = True
    sent = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_MS / 1e3).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in sent if line.startswith("data: {")]
    return [chunk["rapid_round"] for chunk in chunks if "rapid_round" in chunk]


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found]


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled to sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_an_answer_is_the_apis_with_each_token_marked_by_its_origin(page: Page, smollm_url: str) -> None:
    page.goto(smollm_url)
    prepare(page)
    ask(page)
    expected = answer_of_the_api(smollm_url, TEXT, model=MODEL)
    assert page.locator(".text").text_content() == expected["choices"][0]["message"]["content"]
    shown = page.locator(".text .token").evaluate_all(
        "all => all.map(token => [token.textContent, token.classList[1]])"
    )
    rounds = rounds_of_the_api(smollm_url, TEXT, model=MODEL)
    tokens = [token for each in rounds for token in each["tokens"] if token["text"].strip()]
    assert shown == [[token["text"].lstrip(), token["origin"]] for token in tokens]
    counted = expected["rapid"]
    expect(page.locator("[data-figure=rounds]")).to_have_text(str(counted["rounds"]))
    expect(page.locator("[data-figure=acceptance]")).to_have_text(f"{100 * counted['acceptance_rate']:.0f}%")
    assert page.locator(".rounds .own").count() == counted["rounds"]
    expect(page.get_by_role("status")).to_contain_text(f"{counted['emitted']} tokens")


def test_the_answer_comes_bit_by_bit(page: Page, smollm_url: str) -> None:
    page.goto(smollm_url)
    prepare(page, tokens=16, gamma=0)
    page.evaluate(
        """window.lengths = [];
        new MutationObserver(() => lengths.push(document.querySelector("#answers .text")?.textContent.length ?? 0))
          .observe(document.querySelector("#answers"), { childList: true, subtree: true })"""
    )
    ask(page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) > 4


@pytest.mark.parametrize("before", ["", "\U0001f433\U0001f433 "], ids=["plain", "beyond the basic plane"])
def test_the_map_shows_where_the_retrieved_passages_are(page: Page, bytes_url: str, before: str) -> None:
    """The server counts characters, the browser UTF-16 units: a whale is one, or two."""
    prepare(page)
    text = before + TEXT
    page.get_by_label("Text of the document").fill(text)
    ask(page)
    chunks = answer_of_the_api(bytes_url, text)["rapid"]["chunks"]
    passages = page.locator("#passages mark")
    assert passages.all_text_contents() == [text[chunk["start"] : chunk["end"]] for chunk in chunks]
    listed = page.locator("#chunks").get_by_role("button")
    for chunk, button in zip(chunks, listed.all_text_contents(), strict=True):
        assert f"Passage {chunk['position'] + 1}{chunk['score']:.2f}" in button
    listed.last.click()
    expect(passages.last).to_have_class("current")
    expect(passages.last).to_be_in_viewport()


def test_stop_frees_the_engines(page: Page, bytes_url: str) -> None:
    prepare(page, tokens=4000)
    page.get_by_role("button", name="Ask").click()
    page.locator(".text .token").first.wait_for(timeout=TIMEOUT_MS)
    assert health(bytes_url)["sequences"]["target"] > 0
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    assert seconds_until_free(bytes_url) < 10
    written = page.locator(".text").text_content()
    expect(page.locator("#ask")).to_be_enabled()
    assert written and page.locator(".text").text_content() == written


def test_two_strategies_run_one_after_the_other(page: Page) -> None:
    prepare(page)
    page.get_by_role("checkbox", name="Compare with").check()
    page.get_by_label("Strategy to compare with").select_option("autoregressive")
    page.evaluate(
        """() => {
          window.finished = [];  // how many answers were, when each was asked for
          const send = window.fetch;
          window.fetch = (...sent) => {
            finished.push(document.querySelectorAll("article .times:not([hidden])").length);
            return send(...sent);
          };
        }"""
    )
    ask(page)
    expect(page.get_by_role("article")).to_have_count(2)
    assert page.get_by_role("article").get_by_role("heading").all_text_contents() == ["rapid", "autoregressive"]
    expect(page.locator("#verdict")).to_contain_text("Both wrote the same text.")  # at temperature 0
    expect(page.locator("#verdict")).to_contain_text("memory bandwidth")
    assert all(re.fullmatch(r"[\d.]+ m?s", time) for time in page.locator(".clock").all_text_contents())
    assert page.evaluate("finished") == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("notes.md", "# Notes\n\nAn umlaut: ü.\n", "# Notes\n\nAn umlaut: ü.\n"),
        (
            "page.html",
            "<h1>One</h1><p>two <b>three</b><script>window.ran = 1</script><img src='/x.png'><p>four",
            "One\n\ntwo three\n\nfour",
        ),
    ],
)
def test_a_file_of_text_is_read_in_the_page(page: Page, name: str, content: str, shown: str) -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "text/plain", "buffer": content.encode()})
    expect(page.get_by_label("Text of the document")).to_have_value(shown)
    expect(page.get_by_role("status")).to_have_text(f"{name} was read.")
    assert page.evaluate("window.ran") is None


def test_a_file_can_be_dropped(page: Page) -> None:
    dropped = page.evaluate_handle(
        """() => { const data = new DataTransfer();
        data.items.add(new File(["Call me Ishmael."], "book.txt", { type: "text/plain" })); return data; }"""
    )
    page.locator("#document").dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.get_by_label("Text of the document")).to_have_value("Call me Ishmael.")


def test_a_pdf_is_read_by_the_server(page: Page, bytes_url: str) -> None:
    with page.context.new_page() as printer:
        printer.set_content(f"<p>{TEXT}</p>")
        report = {"name": "report.pdf", "mimeType": "application/pdf", "buffer": printer.pdf()}
    prepare(page)
    page.locator("#file").set_input_files(report)
    expect(page.locator("#uploaded")).to_contain_text("report.pdf")
    expect(page.get_by_role("status")).to_have_text("report.pdf was read.")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page)
    (file, question) = sent.value.post_data_json["messages"][0]["content"]
    assert file["type"] == "file" and question == {"type": "text", "text": QUESTION}
    assert page.locator("#strip span").count() == page.locator("#chunks").get_by_role("button").count() > 0
    assert page.locator(".text").text_content()
    with page.expect_response("**/v1/files/*"):
        page.get_by_role("button", name="Clear").click()
    expect(page.get_by_label("Text of the document")).to_be_visible()
    left = httpx.get(f"{bytes_url}/v1/files").json()["data"]
    assert "report.pdf" not in [file["filename"] for file in left]


def test_a_file_that_nobody_can_read_is_refused_in_words(page: Page) -> None:
    page.locator("#file").set_input_files({"name": "a.bin", "mimeType": "application/x", "buffer": b"\x00\x01\x02"})
    expect(page.get_by_role("alert")).to_contain_text("Paste the text of the document instead.")


def test_a_request_that_is_refused_is_explained(page: Page) -> None:
    prepare(page, tokens=100_000)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("This model's maximum context length is 8192 tokens")
    expect(page.get_by_role("alert")).to_contain_text("Shorten the document, or ask for a shorter answer")
    page.get_by_label("Longest answer").fill("4")
    ask(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_server_that_is_gone_is_said_to_be(page: Page) -> None:
    prepare(page)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")


def test_an_answer_that_breaks_off_says_why(page: Page) -> None:
    """What the server sends when an engine is lost for good."""
    error = (
        '{"error": {"message": "the target was lost", "type": "server_error", "param": null, "code": "engine_lost"}}'
    )
    body = f"event: error\ndata: {error}\n\ndata: [DONE]\n\n"
    prepare(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("the target was lost Ask again")


def test_every_setting_is_asked_for(page: Page) -> None:
    filled = {
        "Transfer strength": "auto",
        "Transfer temperature": "0.5",
        "nats that it may move": "0.25",
        "Passages kept": "256",
        "Longest passage": "64",
    }
    chosen = {"Verification": "augmented", "Search by": "hybrid", "Search again": "auto"}
    prepare(page, tokens=2)
    for label, value in filled.items():
        page.get_by_label(label).fill(value)
    for label, value in chosen.items():
        page.get_by_label(label).select_option(value)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask").click()
    assert RapidFields.model_validate(sent.value.post_data_json["rapid"]) == RapidFields(
        strategy="rapid",
        num_draft_tokens=3,
        transfer_strength="auto",
        transfer_temperature=0.5,
        transfer_divergence=0.25,
        verification="augmented",
        refresh="auto",
        retrieval=RetrievalFields(method="hybrid", max_tokens=256, chunk_tokens=64),
        trace=True,
    )
    expect(page.locator("#ask")).to_be_enabled(timeout=TIMEOUT_MS)


def test_nothing_is_sent_without_a_question(page: Page) -> None:
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request))
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no question yet.")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    assert not sent


def test_the_keyboard_is_enough(page: Page) -> None:
    prepare(page)
    page.get_by_label("Question", exact=True).focus()
    with page.expect_request("**/v1/chat/completions"):
        page.keyboard.press("Control+Enter")
    expect(page.locator("#ask")).to_be_enabled(timeout=TIMEOUT_MS)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('text')"):
            break
    expect(page.locator("article .text")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".detail")).to_contain_text("round 1")
    expect(page.locator(".text .token").first).to_have_class(re.compile("current"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_found_by_axe(page: Page, scheme: str) -> None:
    """Names, roles, labels, and contrast in both colour schemes; before an answer, after it, and with an error."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    prepare(page)
    assert violations(page) == []
    ask(page)
    assert violations(page) == []
    page.get_by_label("Question", exact=True).fill("")
    ask(page)
    assert violations(page) == []


def test_the_theme_can_be_chosen(page: Page) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    page.get_by_role("button", name="Theme: system").click()
    assert background() == light
    page.get_by_role("button", name="Theme: light").click()
    assert background() == dark


def test_a_narrow_window_is_wide_enough(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert fits(page)
    prepare(page)
    page.get_by_role("checkbox", name="Compare with").check()
    ask(page)
    expect(page.get_by_role("article")).to_have_count(2)
    assert fits(page)


def test_a_key_is_sent_and_stays_in_the_tab(page: Page) -> None:
    prepare(page)
    page.get_by_label("API key").fill("secret")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask").click()
    assert sent.value.headers["authorization"] == "Bearer secret"
    expect(page.locator("#ask")).to_be_enabled(timeout=TIMEOUT_MS)
    assert "secret" not in str(page.evaluate("JSON.stringify(localStorage)"))
    assert not page.context.cookies()
