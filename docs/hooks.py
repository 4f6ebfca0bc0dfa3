"""What the site's pages have computed when `mkdocs build` makes them: outputs, error messages, commands, mathematics.

A page asks for it by an HTML comment:

    <!-- computed -->        the text block that follows shows what the page's Python code prints, run now
    <!-- messages -->        every message that foreword's own errors have, read from the sources
    <!-- command line -->    every command with its options
"""

from __future__ import annotations

import ast
import io
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

SOURCES = Path(__file__).parent.parent / "src" / "foreword"
ERRORS = ("InputError", "RunError", "DivergedError")
COMPUTED = re.compile(r"(<!-- computed -->\n+```text\n)(.*?)(```)", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FIELD = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): (?=\S)")
log = logging.getLogger("mkdocs.hooks.foreword")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if "<!-- computed -->" in markdown:
        markdown = computed(markdown, page.file.src_path)
    if "<!-- messages -->" in markdown:
        markdown = markdown.replace("<!-- messages -->", message_table())
    if "<!-- command line -->" in markdown:
        markdown = markdown.replace("<!-- command line -->", command_line())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    return MATHS.sub(lambda found: mathml(found[2], display=found[1] == "div"), html)


def computed(markdown: str, name: str) -> str:
    """The page with its output made anew; a page that shows another is a warning, which fails a strict build."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec("".join(PYTHON.findall(markdown)), {"__name__": name})

    def put(found: re.Match[str]) -> str:
        if found[2] != printed.getvalue():
            log.warning("%s shows another output than its code prints; put that of the code there.", name)
        return found[1] + printed.getvalue() + found[3]

    return COMPUTED.sub(put, markdown)


# ---- the messages of errors


def messages() -> Iterator[tuple[str, str]]:
    """(module, message) of every error that a user may meet, each computed part as an ellipsis."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                module = path.relative_to(SOURCES).with_suffix("").as_posix()
                yield from [(module, _template(node.exc.args[0]))] if _name(node.exc.func) in ERRORS else []


def _name(called: ast.expr) -> str:
    return called.id if isinstance(called, ast.Name) else ""


def _template(message: ast.expr) -> str:
    """A literal with `…` for what is computed."""
    if isinstance(message, ast.JoinedStr):
        return "".join(_template(part) for part in message.values)
    return str(message.value) if isinstance(message, ast.Constant) else "…"


def halves(message: str) -> tuple[str, str]:
    """What is wrong, and what to do where the sentence says it."""
    cut = max(message.rfind("; "), message.rfind(", so "))
    return (message, "") if cut < 0 else (message[:cut], message[cut:].removeprefix("; ").removeprefix(", so "))


def message_table() -> str:
    groups: dict[str, list[str]] = {}
    for module, message in messages():
        rows = groups.setdefault(module, [])
        if message not in rows:
            rows.append(message)
    lines = []
    for module, rows in groups.items():
        lines += ["", f"### `{module}`", "", "| what is wrong | what to do |", "|---|---|"]
        for wrong, cure in (halves(message) for message in rows):
            lines.append(f"| {_cell(wrong)} | {_cell(cure)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("{", "&#123;")


# ---- the command line


def command_line() -> str:
    """Every command, its sentence and its options, as `--help` has them."""
    import typer

    from foreword.cli import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("foreword", [], resilient_parsing=True)
    lines: list[str] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        lines += ["", f"## foreword {name}", "", *_described(command.help or "")]
        lines += ["", "| | default | |", "|---|---|---|", *(_option(p) for p in command.params if p.name != "help")]
    return "\n".join(lines) + "\n"


def _described(help: str) -> Iterator[str]:
    for line in help.splitlines():
        yield f"```bash\n{line.strip().removeprefix('Example: ')}\n```" if line.strip().startswith("Example:") else line


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if not parameter.opts[0].startswith("-"):
        names = f"`{(parameter.metavar or parameter.name).upper()}`"
    default = "" if parameter.default in (None, "", False) else f"`{parameter.default}`"
    return f"| {names} | {default} | {_cell(getattr(parameter, 'help', None) or '')} |"


# ---- docstrings


class Fields(griffe.Extension):
    """Docstrings whose lines begin with `name: ` show these as a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    lines: list[str] = []
    for line in docstring.splitlines():
        if FIELD.match(line):
            if lines and lines[-1] and not lines[-1].startswith(("- ", " ")):
                lines.append("")
            line = FIELD.sub(r"- `\1`: ", line)
        elif line[:1].isupper() and any(before.startswith("- ") for before in lines) and lines[-1]:
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


# ---- mathematics


def mathml(latex: str, display: bool) -> str:
    for entity, sign in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        latex = latex.replace(entity, sign)
    return convert(latex.strip(), display="block" if display else "inline")
