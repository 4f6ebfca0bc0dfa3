"""Pages: HTML files with their styles and pictures inside, which need no network. Templates are in templates/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .errors import RunError

_environment = Environment(
    loader=PackageLoader("foreword"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def plain(value: Any) -> str:
    """A value as people read it: numbers with separators or four digits, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {plain(item)}" for key, item in value.items() if item is not None)
    return str(value).strip()


_environment.filters["plain"] = plain


def write(path: Path, template: str, content: dict[str, Any]) -> None:
    """Render `template` with `content` to `path`, written beside and renamed. Raises RunError where that fails."""
    page = _environment.get_template(template).render(content)
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)
