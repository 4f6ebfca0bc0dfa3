"""Every block of code in the README and the site's pages does what its page says.

A page runs from top to bottom in a folder of its own, in this process. The names that it uses are there, small: the
default model and data in a cache folder, hub ids as folders. Commands run as they stand, a training for two steps on a
few rows. What needs another program (pip, make, curl, torchrun, vLLM) is read: its files, flags, targets and routes
must exist. Pages that serve are run once more with a real server by the slow test.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from serve.conftest import Server, start_server

from foreword import cli

from .pages import PAGES, ROOT, Block, blocks, commands

LANGUAGES = {"python", "bash", "json", "toml", "text"}
SERVED = [
    page
    for page in PAGES
    if any(words[:2] == ["foreword", "serve"] for b in blocks(page) if b.language == "bash" for words in commands(b))
]
FEW_ROWS = "--train-rows 16 --validation-rows 5 --test-rows 5".split()


def test_every_page_of_the_site_is_found_and_its_blocks_say_what_they_are() -> None:
    assert len(PAGES) > 20
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES or block.language.startswith("file "), f"{block.place} has no language"


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, world: Path) -> None:
    with Run(world) as run:
        for block in blocks(page):
            run.do(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", SERVED)
def test_the_page_runs_with_its_server(page: str, world: Path) -> None:
    with Run(world, live=True) as run:
        for block in blocks(page):
            run.do(block)
        assert run.asked > 0


# ---- running a page


class Run:
    """One page: names that its Python blocks share, what was printed last, and its server where it is live."""

    def __init__(self, folder: Path, live: bool = False) -> None:
        self.folder, self.live = folder, live
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.server: Server | None = None
        self.asked = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.server is not None:
            self.server.end()

    def do(self, block: Block) -> None:
        if block.language.startswith("file "):
            (self.folder / block.language.removeprefix("file ")).write_text(block.code, encoding="utf-8")
        elif block.language == "toml":  # its first line is the name of the file
            tomllib.loads(block.code)
            (self.folder / block.code.splitlines()[0].removeprefix("# ")).write_text(block.code, encoding="utf-8")
        elif block.language == "json":
            for line in block.code.splitlines():
                json.loads(line)
        elif block.language == "python":
            self.python(block)
        elif block.language == "bash":
            self.bash(block)
        elif block.mark in ("output", "computed"):
            for line in block.code.splitlines():
                assert line.strip() in self.printed, f"{block.place} is not what was printed:\n{self.printed}"

    def python(self, block: Block) -> None:
        code, self.printed = block.code, ""
        if block.mark == "served":
            self.asked += self.live
            if self.server is None:
                compile(code, block.place, "exec")
                return
            code = code.replace("http://127.0.0.1:8000", self.server.url)
        with self.captured():
            exec(compile(code, block.place, "exec"), self.names)

    def bash(self, block: Block) -> None:
        code, self.printed = 0, ""
        for words in commands(block):
            assert code == 0, f"{block.place} fails before {' '.join(words)}: {self.printed}"
            while re.fullmatch(r"\w+=\S*", words[0]):
                words = words[1:]
            if words[0] == "foreword":
                code = self.foreword(words[1:])
            elif words[0] == "curl" and self.server is not None:
                code = self.curl(words)
            else:
                READERS[words[0]](words)
        assert code == (2 if block.mark == "fails" else 0), f"{block.place}: exit code {code}\n{self.printed}"
        assert "Traceback" not in self.printed

    def foreword(self, words: list[str]) -> int:
        """Run a command; a training for two steps on a few rows, and a server only where the page is live."""
        parsed(words)
        if words[0] == "serve":
            if self.live and self.server is None:
                self.server = start_server(self.folder / "server.log", *words[1:])
            return 0
        if words[0] in ("train", "tune") and "--resume" not in words:
            words = [*words, *(FEW_ROWS if "--data" not in words else ()), "--max-steps", "2"]
        with self.captured(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["foreword", *words])
            with pytest.raises(SystemExit) as end:
                cli.main()
        return int(end.value.code or 0)

    def curl(self, words: list[str]) -> int:
        assert self.server is not None
        self.asked += 1
        words = [re.sub(r"^(http://)?(127\.0\.0\.1|localhost):8000", self.server.url, word) for word in words]
        done = subprocess.run(["curl", "--silent", "--fail-with-body", *words[1:]], capture_output=True, text=True)
        self.printed += done.stdout + done.stderr
        return done.returncode

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                yield
        finally:
            self.printed += out.getvalue()


# ---- commands that are read


def parsed(words: list[str]) -> None:
    """The command exists and takes these options with these kinds of values."""
    group: Any = typer.main.get_command(cli.app)
    command = group.commands[words[0]]
    command.make_context(words[0], list(words[1:]))


def read_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.findall(r"\[(\w+)\]", " ".join(words))
    assert words[1] == "install" and set(wanted) <= extras.keys(), words


def read_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets), words


def read_python(words: list[str]) -> None:
    """A script or module that is there, with flags that its source knows; other people's modules are theirs."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if not module.startswith("foreword"):
            return
        path = ROOT / "src" / (module.replace(".", "/") + ".py")
    else:
        script = next(word for word in words[1:] if word.endswith(".py"))
        path = ROOT / script
    source = path.read_text(encoding="utf-8")
    own = words[words.index(module if "-m" in words else script) :]
    for flag in (word for word in own if word.startswith("--")):
        parameter = f"{flag[2:].replace('-', '_')}: "  # of a function that typer runs
        assert f'"{flag}"' in source or parameter in source, f"{path.name} has no {flag}"


def read_launch(words: list[str]) -> None:
    """A script, or foreword's own command, behind torchrun or accelerate, whose configuration is there."""
    if "foreword" not in words:
        return read_python(words)
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    parsed(words[words.index("foreword") + 1 :])


def read_curl(words: list[str]) -> None:
    """A route that a server of ours has, and a body that is JSON."""
    url = next(word for word in words if "localhost" in word or "127.0.0.1" in word)
    route = "/" + url.split("/", 3 if "//" in url else 1)[-1]
    sources = [ROOT / "src/foreword" / name for name in ("serve/app.py", "interop/vllm/gateway.py")]
    assert any(f'"{route}"' in source.read_text(encoding="utf-8") for source in sources), route
    if "-d" in words:
        assert isinstance(json.loads(words[words.index("-d") + 1]), dict)


READERS = {
    "pip": read_pip,
    "make": read_make,
    "python": read_python,
    "torchrun": read_launch,
    "accelerate": read_launch,
    ".venv-vllm/bin/python": read_python,
    "curl": read_curl,
}
