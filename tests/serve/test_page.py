"""The page at `/`, driven by its keys in a real headless browser."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROMPT = "def read(self"


@pytest.fixture
def page(browser, serve: Callable[..., str], llama: Path) -> Iterator[object]:
    url = serve(llama)
    browser.open(url + "/")
    browser.wait_for("document.title === 'tiny'")
    yield browser
    assert browser.errors == []
    assert all(request.startswith(url) for request in browser.requests)


def text(page) -> str:
    return page.evaluate("document.getElementById('prompt').value")


def set_field(page, name: str, value: object) -> None:
    page.evaluate(f"document.getElementById({name!r}).value = {json.dumps(str(value))}")


def test_a_prompt_is_typed_sent_and_answered_with_keys_only(page) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    set_field(page, "seed", 3)
    set_field(page, "max_tokens", 40)
    page.type(PROMPT)
    page.press("Control+Enter")
    page.wait_for("document.getElementById('status').textContent.startsWith('Done')")
    first = text(page)
    assert first.startswith(PROMPT) and len(first) > len(PROMPT)
    marked = page.evaluate("document.querySelector('#complete mark').textContent")
    assert PROMPT + marked == first
    assert page.evaluate("parseFloat(document.getElementById('ttft').textContent) > 0")
    assert page.evaluate("document.getElementById('reason').textContent") in ("max tokens", "the model")
    page.press("Control+Enter")  # the answer can be continued
    page.wait_for("document.querySelectorAll('#complete mark').length === 2")
    page.wait_for("!document.getElementById('send').disabled")
    assert text(page).startswith(first)
    for expected in (first, PROMPT):
        page.evaluate("document.getElementById('undo').click()")
        assert text(page) == expected


@pytest.mark.slow
def test_escape_stops_and_the_server_forgets_the_request(page) -> None:
    set_field(page, "max_tokens", 2000)
    set_field(page, "seed", 3)  # draws no end token
    page.type(PROMPT)
    page.press("Control+Enter")
    page.wait_for("document.querySelector('#complete mark')?.textContent.length > 3")
    page.press("Escape")
    page.wait_for("document.getElementById('reason').textContent === 'you'")
    page.wait_for("fetch('/metrics').then(r => r.text()).then(t => /kv_blocks_used.*} 0\\n/.test(t))")
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.slow
def test_every_control_is_reached_by_tab_and_shows_its_focus(page) -> None:
    page.type("x")
    page.press("Control+Enter")
    page.wait_for("!document.getElementById('undo').disabled")
    seen = []
    for _ in range(8):
        page.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or seen[-1] in ("prompt", "")
    assert seen[:6] == ["temperature", "max_tokens", "top_p", "seed", "undo", "send"]
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input,textarea')].filter(x => !x.labels.length).map(x => x.id)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_a_refusal_is_shown_with_its_hint(page) -> None:
    set_field(page, "max_tokens", 2040)
    page.type("x " * 40)
    page.press("Control+Enter")
    page.wait_for("!document.getElementById('error').hidden")
    assert "hint:" in page.evaluate("document.getElementById('error').textContent")
    assert text(page) == "x " * 40
    page.errors.clear()  # the browser logs the refusal's status, as it should


def test_chat_is_closed_for_a_base_model(page) -> None:
    page.wait_for("document.getElementById('tab-chat').getAttribute('aria-disabled') === 'true'")
    page.evaluate("document.getElementById('tab-chat').click()")
    assert page.evaluate("document.getElementById('chat').hidden")
    assert "base model" in page.evaluate("document.getElementById('tab-chat').textContent")


@pytest.mark.slow
def test_a_chat_model_chats(browser, serve: Callable[..., str], chat_model: Path, tmp_path: Path) -> None:
    browser.open(serve(chat_model) + "/")
    browser.wait_for("document.title === 'tiny'")
    browser.evaluate("document.getElementById('tab-complete').focus()")
    browser.press("ArrowRight")
    browser.evaluate("document.getElementById('max_tokens').value = 8")
    browser.evaluate("document.getElementById('message').focus()")
    for _ in range(2):
        browser.type("hello")
        browser.press("Control+Enter")
        browser.wait_for("!document.getElementById('send').disabled")
    assert browser.screenshot(tmp_path / "chat.png", 1280, 800).stat().st_size > 10_000
    roles = browser.evaluate("[...document.querySelectorAll('#talk li')].map(x => x.className)")
    assert roles == ["user", "assistant"] * 2
    assert browser.errors == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (320, 640)])
def test_nothing_is_wider_than_the_screen(page, width: int, height: int) -> None:
    page.resize(width, height)
    page.type("a_very_long_name_without_any_space_" * 20)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_the_picture_is_taken_in_light_and_dark_and_on_a_phone(page, tmp_path: Path) -> None:
    set_field(page, "seed", 3)
    page.type(PROMPT)
    page.press("Control+Enter")
    page.wait_for("document.getElementById('status').textContent.startsWith('Done')")
    for name, width, height, dark in (
        ("light", 1280, 800, False),
        ("dark", 1280, 800, True),
        ("phone", 390, 844, False),
    ):
        assert page.screenshot(tmp_path / f"{name}.png", width, height, dark).stat().st_size > 10_000
