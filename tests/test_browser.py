"""The browser fixture must see what a reader's browser would complain of."""

from pathlib import Path


def test_keys_reach_the_page_and_the_picture_is_written(browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><title>t</title><form onsubmit='document.title=this.q.value;return false'>"
        "<input name=q autofocus><button>go</button></form>"
    )
    browser.open(page)
    browser.evaluate("document.querySelector('input').focus()")
    browser.type("hé")
    browser.press("a")
    browser.press("Enter")
    assert browser.evaluate("document.title") == "héa"
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.tagName") == "BUTTON"
    browser.press("Shift+Tab")
    assert browser.evaluate("document.activeElement.tagName") == "INPUT"
    assert browser.errors == []
    assert browser.screenshot(tmp_path / "p.png", 320, 200).read_bytes()[16:24] == (
        (320).to_bytes(4, "big") + (200).to_bytes(4, "big")
    )


def test_errors_and_requests_are_seen(browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><script>console.error('one'); throw new Error('two')</script>"
        "<img src='http://example.invalid/three.png'>"
    )
    browser.open(page)
    errors = "\n".join(browser.errors)
    assert all(word in errors for word in ("one", "two", "three.png"))
    assert "http://example.invalid/three.png" in browser.requests


def test_dark_and_print_are_emulated(browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>t</title><meta name=viewport content='width=device-width'>")
    browser.open(page)
    browser.resize(400, 300, dark=True)
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    browser.resize(400, 300, media="print")
    assert browser.evaluate("matchMedia('print').matches && innerWidth === 400")
