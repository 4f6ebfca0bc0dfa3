"""The site builds without a warning and without network, loads nothing from elsewhere, and leaves nothing out."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import foreword

from .pages import DOCS, ROOT

# mkdocs in a process where nothing can be connected to.
BUILD = """
import socket

def refuse(*_, **__):
    raise OSError("the site asked for the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""
# Headings of the troubleshooting page that are no message.
OTHERS = {"It does not learn", "Out of memory", "404, 429 and 504 from the server"}


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, tables = imported(DOCS / "hooks.py"), imported(ROOT / "benchmarks" / "tables.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said, said
    assert "nav" not in said, said  # a page that no navigation names
    return folder


class Loads(HTMLParser):
    """What a page loads by itself; links that a reader follows are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" or tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.found += [address for name in ("src", "href", "data", "srcset") if (address := given.get(name))]


def loaded(site: Path) -> Iterator[tuple[str, str]]:
    for page in site.rglob("*.html"):
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        yield from ((page.name, address) for address in parser.found)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        yield from ((sheet.name, address) for address in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", text))


def test_it_builds_without_network_and_its_pages_load_nothing_from_elsewhere(site: Path) -> None:
    found = list(loaded(site))
    assert len(found) > 100
    assert not [one for one in found if re.match(r"(https?:)?//", one[1])]


@pytest.mark.slow
def test_a_browser_asks_for_nothing_but_the_sites_own_files(site: Path, chromium: Any) -> None:
    asked: list[str] = []
    page = chromium.new_page()
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(site.rglob("index.html")):
        page.goto(path.as_uri())
    page.close()
    assert len(asked) > 100
    assert not [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]


def test_mathematics_is_mathml(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("index.html")}
    assert not [path for path, page in pages.items() if "arithmatex" in page]
    assert pages[site / "method" / "index.html"].count("<math") > 30


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").rglob("*.html"))
    assert not [name for name in foreword.__all__ if f'id="foreword.{name}"' not in reference]


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "command-line" / "index.html").read_text(encoding="utf-8")
    for word in ("foreword train", "foreword serve", "foreword import", "--gradient-accumulation", "--no-zero-shot"):
        assert word in page


def test_an_output_that_the_code_does_not_print_fails_the_build(caplog: pytest.LogCaptureFixture) -> None:
    page = "```python\nprint(6 * 7)\n```\n\n<!-- computed -->\n```text\n{}\n```\n"
    assert hooks.computed(page.format(42), "page.md") == page.format(42) and not caplog.records
    assert hooks.computed(page.format(41), "page.md") == page.format(42)
    assert "page.md shows another output" in caplog.text


# ---- error messages


def pieces(message: str) -> list[str]:
    return [piece.strip() for piece in message.split("…") if piece.strip(" .;,'")]


def holds(message: str, wanted: list[str]) -> bool:
    """Whether the pieces occur in the message in this order."""
    at = 0
    for piece in wanted:
        at = message.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_every_message_has_a_cure_in_itself_or_on_the_page() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    named = {row.split(" | ")[0].removeprefix("| ") for row in page.splitlines() if row.startswith("| ")}
    headings = [pieces(part) for part in parts_of_headings(page)]
    without = {
        message
        for _, message in hooks.messages()
        if not hooks.halves(message)[1]
        and message not in named
        and not any(wanted and holds(message, wanted) for wanted in headings)
        and pieces(message)
    }
    assert not without, "say what to do in these messages, or on docs/troubleshooting.md"


def parts_of_headings(page: str) -> list[str]:
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    return [part for heading in headings if heading not in OTHERS for part in heading.split(" / ")]


def test_every_message_on_the_page_is_one_of_forewords() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [message for _, message in hooks.messages()]
    table = page.split("| message | cure |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 50
    strangers = [row for row in table if row.split(" | ")[0].removeprefix("| ") not in messages]
    strangers += [
        part for part in parts_of_headings(page) if not any(holds(message, pieces(part)) for message in messages)
    ]
    assert not strangers


# ---- tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "python benchmarks/tables.py makes them anew"
