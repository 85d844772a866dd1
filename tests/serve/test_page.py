"""The page: in headless Chromium where it and playwright are installed, and what the server sends of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nestlearn.data import byte_tokenizer

from .conftest import NEEDS, TEXT

pytest.importorskip("fastapi", reason=NEEDS)

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def listen(model: Any) -> Iterator[Callable[[Path], str]]:
    """listen(folder) -> the address of a server on this folder of sessions."""
    import uvicorn

    from nestlearn.serve import app

    running = []

    def begin(folder: Path) -> str:
        made = app(model, byte_tokenizer(), folder, name="tiny")
        config = uvicorn.Config(made, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
        server, socket = uvicorn.Server(config), config.bind_socket()
        socket.listen()  # so that who comes before the server has started waits
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{socket.getsockname()[1]}/"

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(listen: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return listen(tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page in a tab of its own. What the browser complains about, and what it asks elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab, wrong = context.new_page(), []
    tab.set_default_timeout(20_000)
    tab.on("console", lambda line: wrong.append(line.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: None if asked.url.startswith((url, "blob:")) else wrong.append(asked.url))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.goto(url)
    yield tab
    context.close()
    assert not wrong


def session(page: Any, name: str) -> None:
    page.click("#new")
    page.fill("dialog input", name)
    page.keyboard.press("Enter")
    page.wait_for_function("name => document.querySelector('#name').textContent === name", arg=name)
    page.wait_for_selector("#memory h3")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def read(page: Any, name: str, content: bytes) -> None:
    tab(page, "Read")
    page.set_input_files("#document", {"name": name, "mimeType": "text/plain", "buffer": content})


def test_the_page_is_in_the_package_and_names_no_other_place(client: Any) -> None:
    from nestlearn.serve.page import FOLDER

    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    names = {file.name for file in FOLDER.iterdir()}
    assert {"index.html", "page.js", "page.css"} <= names
    for name in names:
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert set(re.findall(r"https?://[^\s\"']+", answer.text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| style=", answer.text)
    # A wheel has the files that pyproject.toml names.
    assert '"serve/page_files/*"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in ("nothing", "..%2fpage.py", "%2e%2e/page.py", "__init__.py"):
        assert client.get(f"/page/{name}").status_code == 404


def test_a_document_is_read_before_the_eyes_of_a_person(page: Any) -> None:
    session(page, MARKUP)
    read(page, f"{MARKUP}.txt", TEXT.encode())
    page.wait_for_selector("#read .result p >> nth=1")
    told = page.locator("#read .result").inner_text()
    assert f"{MARKUP}.txt: {len(TEXT)} tokens" in told and "A known text:" in told and "the model alone" in told
    assert page.locator(".chart polyline.line").count() == 2
    assert "as it learns: from" in page.locator(".chart svg").first.get_attribute("aria-label")
    meters = page.get_by_role("meter").all()
    assert len(meters) == 2 and all(float(meter.get_attribute("aria-valuenow")) > 0 for meter in meters)
    assert all(meter.locator(".fill").bounding_box()["width"] > 10 for meter in meters)
    page.wait_for_selector("#memory .documents li")
    assert page.locator("#memory .documents .what").inner_text() == f"{MARKUP}.txt"
    # The levels are measured on a copy, which changes nothing that is shown.
    page.get_by_role("button", name="Measure the levels").click()
    page.wait_for_selector("#memory .known li >> nth=1")
    rows = page.locator("#memory .known li").all_inner_texts()
    assert all(
        re.match(r"Level \d, writes every \d+ tokens: -?[\d.]+ bits per byte, moved [\d.]+ %", row) for row in rows
    ), rows
    assert page.locator("#memory .documents .what").count() == 1
    # What is no text is refused before anything is sent.
    read(page, "cat.jpg", b"\xff\xd8\xff")
    page.wait_for_selector("#alert p")
    assert "cat.jpg is not a text in UTF-8" in page.get_by_role("alert").first.inner_text()


def test_a_conversation_is_streamed_and_is_kept_for_each_session(page: Any) -> None:
    session(page, "talk")
    tab(page, "Chat")
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("12")
    page.get_by_label("Message").fill(MARKUP)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant:not(.waiting)")
    assert page.locator(".message p").first.inner_text() == MARKUP
    page.get_by_role("button", name="Fork").click()
    page.fill("dialog input", "talk 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tree ul ul [aria-current]:has-text('talk 2')")
    assert page.locator(".message").count() == 0
    page.locator("#tree button", has_text=re.compile("^talk(?! 2)")).click()
    page.wait_for_selector(".message.assistant")


def test_keys_and_arrows_are_enough(page: Any) -> None:
    """Without a mouse: the skip link, the tabs, a dialog that gives the focus back."""
    session(page, "by hand")
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-edit" and page.locator("#edit").is_visible()
    page.keyboard.press("Home")
    assert page.locator("#chat").is_visible() and page.locator("#tab-edit").get_attribute("tabindex") == "-1"
    delete = page.get_by_role("button", name="Delete")
    delete.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog", name="Delete by hand?").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert page.evaluate("document.activeElement.textContent") == "Delete"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, textarea, select')].filter(e => !e.labels.length && !e.ariaLabel
        ).map(e => e.outerHTML)"""
    )
    assert not unnamed


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Any, listen: Any, tmp_path: Path) -> None:
    from nestlearn.serve.keys import Keys

    with closing(Keys(tmp_path)) as keys:
        secret = keys.add("alice")
    context = browser.new_context()
    tab, asked = context.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(listen(tmp_path))
    for given, about in (("nl-wrong", "needs a key"), (secret, "does not accept the key")):
        tab.wait_for_selector(f"dialog:has-text('{about}')")
        tab.fill("dialog input", given)
        tab.keyboard.press("Enter")
    tab.wait_for_selector("#welcome:not([hidden])")
    assert tab.evaluate("sessionStorage.getItem('nestlearn-key')") == secret
    assert not any("nl-" in address for address in asked) and context.cookies() == []
    assert tab.evaluate("localStorage.length") == 0
    context.close()


@pytest.mark.slow
def test_practice_edits_files_and_forgetting(page: Any, tmp_path: Path) -> None:
    session(page, "pupil")
    tab(page, "Practise")
    page.get_by_label("Text to learn by heart").fill(TEXT)
    page.get_by_label("Passes").fill("2")
    page.get_by_role("button", name="Practise", exact=True).click()
    page.wait_for_selector("#practise .result p >> nth=1")
    assert re.search(r"Practised \d+ steps", page.locator("#practise .result").inner_text())
    tab(page, "Edit")
    for label, text in (("Prompt", "Ann lives in"), ("Target", MARKUP), ("Subject", "Ann")):
        page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Write facts").click()
    page.wait_for_selector("#edit .result p >> nth=1")
    page.wait_for_selector("#memory .edits li")
    assert page.locator("#memory .edits .what").inner_text() == f"Ann lives in → {MARKUP}"
    page.get_by_role("button", name="Take back").click()
    page.wait_for_selector("#memory .edits", state="detached")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "pupil.safetensors")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open file").click()
    chooser.value.set_files(tmp_path / "pupil.safetensors")
    page.fill("dialog input", "pupil 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tree [aria-current]:has-text('pupil 2')")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("With", exact=True).select_option("pupil")
    page.wait_for_function("() => [...document.querySelectorAll('dialog .value')].every(e => e.textContent === '0 %')")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Forget").click()
    page.locator("dialog button[type=submit]").click()
    page.wait_for_function("() => document.querySelector('#memory p').textContent.startsWith('0 tokens')")
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog button[type=submit]").click()
    page.wait_for_selector("#tree .what:text-is('pupil 2')", state="detached")


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 320, "height": 700})
    session(page, "x" * 64)
    read(page, f"{'y' * 90}.txt", TEXT.encode())
    page.wait_for_selector("#read .result p >> nth=1")
    for name in ("Chat", "Practise", "Edit", "Read"):
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
