"""The fenced blocks of the README and of the site's pages, and what HTML comments before them say.

<!-- skip: REASON -->       the next block cannot run, and why
<!-- served -->             the next block asks a running server
<!-- fails -->              the next block's last command ends with exit code 2
<!-- output -->             the next text block stands in what the block before it printed
<!-- hidden python|bash     code that readers need not see, to the comment's end
<!-- file: NAME             a file that is there when the page begins, to the comment's end
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in DOCS.rglob("*.md"))]
# What stands before a fence, hidden blocks, fences.
PART = re.compile(
    r"<!-- hidden (?P<hidden>\w+)\n(?P<secret>.*?)-->"
    r"|<!-- file: (?P<name>\S+)\n(?P<content>.*?)-->"
    r"|<!-- (?P<mark>served|fails|output|computed) -->\n"
    r"|^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)\n",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of a page; `mark` is what the comment right before it says."""

    page: str
    line: int
    language: str
    code: str
    mark: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Every block of a page in order, hidden ones and files too (a file's language is `file NAME`)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found, mark, mark_ends = [], "", -1
    for part in PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["mark"]:
            mark, mark_ends = part["mark"], part.end()
        elif part["hidden"]:
            found.append(Block(page, line, part["hidden"], part["secret"]))
        elif part["name"]:
            found.append(Block(page, line, f"file {part['name']}", part["content"]))
        else:
            own = mark if mark_ends == part.start() else ""
            found.append(Block(page, line, part["language"], part["code"], own))
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words; lines that end in a backslash or an open quote go on."""
    done, pending = [], ""
    for line in block.code.splitlines():
        pending += line.removesuffix("\\") if line.endswith("\\") else line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            continue
        done.append(words)
        pending = ""
    assert not pending.strip(), f"{block.place} ends within a command: {pending!r}"
    return [words for words in done if words]
