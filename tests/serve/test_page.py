"""The chat page in headless Chromium, in front of a gateway whose backend says what it is told; no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import served as web
import uvicorn
from browser import CHROMIUM, Browser
from stand_in import StandIn

from cascade.store import Store
from serve.events import Delta, Failed, Finished, Started, Work
from serve.gateway import Gateway
from serve.http import build_api
from serve.keys import KeyRing, add_key
from serve.live import LiveModifiers, LiveRouter

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

CARD = "document.querySelector('.answers:last-child .answer')"
IDLE = "document.querySelectorAll('.answer.running').length == 0 && document.querySelectorAll('.answer').length == {}"


class Told:
    """Answers every question with "fine", but for those that it is to break off."""

    def __init__(self) -> None:
        self.asked = list[Work]()

    async def stream(self, work: Work):
        self.asked.append(work)
        yield Started("v1", 3, 0.0, 0.0)
        if work.messages[-1].content == "break":
            yield Delta("half an ans")
            yield Failed(503, "the engine was lost, try again", "engine_lost")
            return
        yield Delta("fine")
        yield Finished("stop", 1)

    async def healthy(self) -> bool:
        return True


@pytest.fixture
def served(stand_in: StandIn, tmp_path) -> Iterator[tuple[str, str, Told]]:
    """Address of a server with keys, a key, and its backend."""
    store = Store(str(tmp_path))
    key, backend = add_key(store, "me"), Told()
    gateway = Gateway(backend, LiveModifiers(stand_in.store), LiveRouter(stand_in.store, tmp_path))
    api = build_api(gateway, keys=KeyRing(store))
    with web.served(uvicorn.Server(uvicorn.Config(api, log_level="error"))) as url:
        yield url, key, backend


def ask(page: Browser, question: str, cards: int) -> str:
    """What the card says in the end."""
    page.run(f"$('question').value = {json.dumps(question)}, $('form').requestSubmit()")
    page.wait_for(IDLE.format(cards))
    return str(page.run(f"{CARD}.textContent"))


def enter_key(page: Browser, key: str) -> None:
    page.run(f"$('key').value = {json.dumps(key)}, $('key').dispatchEvent(new Event('change'))")


def test_the_page_asks_for_a_key_and_keeps_it(served, tmp_path) -> None:
    address, key, _ = served
    with Browser(address) as page:
        page.wait_for("$('trouble').textContent.includes('API key')")
        assert "API key" in ask(page, "hi", 1)
        enter_key(page, "wrong")
        page.wait_for("$('trouble').textContent.includes('Incorrect API key')")
        enter_key(page, key)
        page.wait_for("$('model').options.length == 4 && $('trouble').textContent == ''")
        assert "fine" in ask(page, "hello", 2)
        page.screenshot(tmp_path / "page.png")
        page.run("window.old = true, void setTimeout(() => location.reload())")
        page.wait_for("!window.old && document.readyState == 'complete' && $('model').options.length == 4")
        assert page.run("$('key').value") == key
        assert page.run("localStorage.length") == 0


def test_an_answer_that_broke_off_is_no_turn(served) -> None:
    address, key, backend = served
    with Browser(address) as page:
        enter_key(page, key)
        page.wait_for("$('model').options.length == 4")
        said = ask(page, "break", 1)
        assert "half an ans" in said
        assert "the engine was lost" in said
        assert "fine" in ask(page, "again", 2)
        ask(page, "once more", 3)
    turns = [(m.role, m.content) for m in backend.asked[-1].messages if m.role != "system"]
    assert turns == [("user", "again"), ("assistant", "fine"), ("user", "once more")]
