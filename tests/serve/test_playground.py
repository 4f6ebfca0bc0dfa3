"""The page at `/`: its files, and what a person does with it in a real browser (slow)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Offline, Server, start_server
from .test_server import BASE, post, until

ROOT = Path(__file__).parents[2]
FILES = ROOT / "src" / "foreword" / "serve" / "static"
SERVED = ["sorts", "tells", "p0", "p1", "pairs", "writes"]
TEXT = "the cat sleeps on a warm stone"

# ---- the files


def test_every_file_is_served_as_what_it_is(server: Server) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    paths = {path.name: path for path in FILES.iterdir()}
    assert {path.suffix for path in paths.values()} == set(kinds)
    for path, name in [("/", "index.html"), *((f"/static/{name}", name) for name in paths)]:
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200 and answer.content == paths[name].read_bytes()
        assert answer.headers["content-type"].split(";")[0] == kinds[paths[name].suffix]
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_file_names_another_host_or_holds_inline_code(server: Server) -> None:
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z0-9-]+\.|@import|innerHTML|\beval\(", text), path.name
    page = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page)
    asked = re.findall(r'(?:src|href)="(static/[^"]+)"', page)
    assert asked and all((FILES.parent / path).is_file() for path in asked)


def test_nothing_beside_the_files_is_served(server: Server) -> None:
    for path in ("/static/", "/static/none.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 404 and "not found" in answer.json()["error"]["message"]


def test_a_key_is_asked_for_by_the_page_and_not_for_it(serve: Callable[..., Server], prefixes: Path) -> None:
    server = serve(prefixes, "--api-key", "first")
    for path in ("/", "/static/app.js"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    for path in ("/v1/models", "/static/../v1/models", "/static/%2e%2e/v1/models"):
        assert httpx.get(f"{server.url}{path}").status_code in (401, 404)
    for path in ("/v1/classify", "/v1/attention"):
        assert post(server, path, {"model": "sorts", "input": "a"}).status_code == 401


# ---- in a browser


@pytest.fixture(scope="module")
def open_server(chat_llama: Path, prefixes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    for name in SERVED:
        shutil.copytree(prefixes / name, folder / name)
    running = start_server(folder.with_suffix(".log"), "--prefixes", folder, "--model", chat_llama)
    yield running
    running.end()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages. Whatever they log, throw or ask of other hosts fails the test that opened them."""
    contexts, trouble = [], []

    def opened(url: str, **settings: Any) -> Any:
        contexts.append(chromium.new_context(reduced_motion="reduce", **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or trouble.append(request.url))
        # A refused request is logged by the browser itself, as a line without a source line of ours.
        page.on("console", lambda line: "Failed to load resource" in line.text or trouble.append(line.text))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not trouble


def run(page: Any, text: str, prefix: str | None = None, second: str | None = None) -> None:
    """Choose, type, press Ctrl+Enter, and wait for the answers."""
    if prefix is not None:
        page.get_by_label("Prefix", exact=True).select_option(prefix)
    if second is not None:
        page.get_by_label("Second prefix").select_option(second)
    box = page.get_by_label("Text")
    box.fill(text)
    box.press("Control+Enter")
    settle(page)


def settle(page: Any) -> None:
    page.get_by_role("button", name="Stop").wait_for(state="hidden")


def column(page: Any, role: str) -> Any:
    return page.get_by_role("article", name=re.compile(f"^{role}:"))


def bars(card: Any) -> list[list[str]]:
    """Label and percentage of every bar."""
    return [item.inner_text().split("\n") for item in card.locator(".labels li").all()]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def classified(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    return post(server, "/v1/classify", body).json()["data"][0]


@pytest.mark.slow
def test_labels_beside_the_base_and_a_second_prefix(visit: Callable[..., Any], open_server: Server) -> None:
    page = visit(open_server.url)
    run(page, TEXT, "sorts", "tells")
    bodies = {
        "With the prefix": {"model": "sorts", "input": TEXT},
        "The base, no prefix": {"model": BASE, "like": "sorts", "input": TEXT},
        "Second prefix": {"model": "tells", "input": TEXT},
    }
    seen = []
    for role, body in bodies.items():
        found = classified(open_server, body)
        card = column(page, role)
        assert bars(card) == [[label, percent(share)] for label, share in found["probabilities"].items()]
        assert card.locator(".verdict").inner_text().split("\n") == [found["label"], percent(found["probability"])]
        seen.append(f"{body['model']}: {found['label']}, {percent(found['probability'])}")
    assert page.get_by_role("status").inner_text() == "; ".join(seen)
    assert page.get_by_role("alert").inner_text() == ""


@pytest.mark.slow
def test_attention_is_shaded_told_and_walked_through_by_keys(visit: Callable[..., Any], open_server: Server) -> None:
    page = visit(open_server.url)
    run(page, TEXT, "sorts")
    found = post(open_server, "/v1/attention", {"model": "sorts", "input": TEXT}).json()
    card = page.get_by_role("article", name="Attention on sorts")
    items = card.get_by_role("listitem")
    expected = [(one["token"].replace("\n", "↵"), percent(one["share"])) for one in found["tokens"]]
    assert [item.text_content().rsplit(" ", 2)[:2] for item in items.all()] == [list(one) for one in expected]
    assert card.locator("h2").inner_text().startswith(percent(found["share"]))
    shades = {item.evaluate("item => getComputedStyle(item).backgroundColor") for item in items.all()}
    assert len(shades) > len(expected) / 2
    items.first.focus()
    page.keyboard.press("ArrowRight")
    token, share = expected[1]
    assert f"“{token}” gives {share} of its attention to the prefix." in card.inner_text()
    page.keyboard.press("End")
    assert f"gives {expected[-1][1]} of its attention" in card.inner_text()


@pytest.mark.slow
def test_text_streams_beside_the_base_and_a_second_prefix(
    visit: Callable[..., Any], open_server: Server, offline: Offline
) -> None:
    page = visit(open_server.url)
    run(page, "the dog", "writes", "p0")
    assert page.get_by_label("Tokens", exact=True).input_value() == "24"  # what the prefix was trained to write
    prompts = {"With the prefix": ("writes", "Text: the dog\n"), "The base, no prefix": (BASE, "Text: the dog\n")}
    prompts["Second prefix"] = ("p0", "the dog")
    for role, (model, prompt) in prompts.items():
        assert column(page, role).locator(".written").text_content() == offline.text(model, prompt, 24)
    assert len(page.get_by_role("article", name=re.compile("^Attention on")).all()) == 2
    page.get_by_label("Prefix", exact=True).select_option("p1")
    page.get_by_label("Tokens", exact=True).fill("12")
    page.get_by_label("As a chat").check()
    run(page, "the cat")
    chat = "user: the cat\nassistant:"
    assert column(page, "With the prefix").locator(".written").text_content() == offline.text("p1", chat, 12)
    assert column(page, "The base, no prefix").locator(".written").text_content() == offline.text(BASE, chat, 12)


@pytest.mark.slow
def test_another_prefix_answers_at_once_and_bad_requests_are_told(
    visit: Callable[..., Any], open_server: Server
) -> None:
    page = visit(open_server.url)
    assert page.locator("#prefix option[value=pairs]").is_disabled()
    run(page, "  ", "sorts")
    assert page.get_by_role("alert").inner_text() == "text 1 is empty; write at least one word."
    assert "No answer." in column(page, "With the prefix").inner_text()
    run(page, TEXT)
    assert page.get_by_role("alert").inner_text() == ""
    before = bars(column(page, "With the prefix"))
    page.get_by_label("Prefix", exact=True).select_option("tells")
    column(page, "With the prefix").get_by_role("heading", name="tells").wait_for()
    settle(page)
    after = classified(open_server, {"model": "tells", "input": TEXT})["probabilities"]
    assert (
        bars(column(page, "With the prefix")) == [[label, percent(share)] for label, share in after.items()] != before
    )
    assert "a layer that was trained with it" in column(page, "The base, no prefix").inner_text()
    run(page, TEXT, "p0")
    page.get_by_label("Tokens", exact=True).fill("2000")
    run(page, TEXT)
    assert "there is room for" in page.get_by_role("alert").inner_text()


@pytest.mark.slow
def test_a_key_opens_the_page_for_as_long_as_its_tab(
    visit: Callable[..., Any], serve: Callable[..., Server], prefixes: Path
) -> None:
    server = serve(prefixes, "--api-key", "first")
    page = visit(server.url)
    box = page.get_by_label("This server asks for an API key")
    assert box.evaluate("box => box === document.activeElement") and page.get_by_role("alert").inner_text() == ""
    box.fill("second")
    box.press("Enter")
    page.get_by_text("the API key is missing or wrong").wait_for()
    assert not page.get_by_label("Text").is_visible()
    box.fill("first")
    box.press("Enter")
    run(page, TEXT, "sorts")
    assert len(bars(column(page, "With the prefix"))) == 2
    page.reload()
    page.get_by_label("Text").wait_for()
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
    page.get_by_role("button", name="Forget the key").click()
    box.wait_for()


@pytest.mark.slow
def test_escape_stops_a_run(
    visit: Callable[..., Any], serve: Callable[..., Server], prefixes: Path, offline: Offline
) -> None:
    server = serve(prefixes, "--rows", 1)
    page = visit(server.url)
    page.get_by_label("Prefix", exact=True).select_option("p0")
    page.get_by_label("Tokens", exact=True).fill("100")
    page.get_by_label("Text").fill("the cat")
    jobs = {"model": "p1", "prompt": ["the cat"] * 16, "max_tokens": 100, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(post, server, "/v1/completions", jobs)
        until(lambda: server.metric("foreword_running") == 1)
        page.get_by_role("button", name="Run").click()
        page.get_by_text("Asking …").wait_for()
        page.keyboard.press("Escape")
        settle(page)
        assert page.get_by_role("status").inner_text() == "Stopped."
        assert page.get_by_role("alert").inner_text() == ""
        assert holding.result().status_code == 200
    until(lambda: server.metric("foreword_waiting") + server.metric("foreword_running") == 0)
    assert server.metric("foreword_cancelled_total") >= 1
    run(page, "the cat")
    assert column(page, "With the prefix").locator(".written").text_content() == offline.text("p0", "the cat", 100)


@pytest.mark.slow
def test_by_keyboard_alone_in_reading_order(visit: Callable[..., Any], open_server: Server) -> None:
    page = visit(open_server.url)
    page.get_by_label("Prefix", exact=True).select_option("tells")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        reached.append(focused.get_attribute("id") or focused.inner_text())
        assert focused.evaluate("one => getComputedStyle(one).outlineStyle") != "none", reached
    assert reached == ["Skip to the results", "API", "prefix", "second", "text", "run"]
    page.get_by_label("Prefix", exact=True).focus()
    page.keyboard.type("sorts")
    page.get_by_label("Text").focus()
    page.keyboard.type(TEXT)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    settle(page)
    assert len(bars(column(page, "With the prefix"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_every_width_and_scheme_is_readable(
    visit: Callable[..., Any], open_server: Server, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(open_server.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for prefix, second in (("sorts", "tells"), ("writes", "p0")):
        run(page, TEXT + " and-a-word-without-any-break-in-it" + "x" * 60, prefix, second)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(bright) > 200) if scheme == "light" else (max(bright) < 60)
