"""The page of `foreword inspect --html`: what one prefix does, or two together. Made from `examine`'s plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import charts, pages

FACTS = ("base", "form", "length", "start", "positions", "window", "parameters", "bytes", "test", "zero_shot")


def write_inspection(path: str | Path, examined: Sequence[dict[str, Any]]) -> None:
    """Write the page of one or more examined prefixes. Raises RunError where it cannot be written."""
    names = [Path(one["about"]["directory"]).resolve().name for one in examined]
    if len(set(names)) < len(names):
        names = [one["about"]["directory"] for one in examined]
    content = {
        "title": " and ".join(names),
        "names": names,
        "facts": {fact: [one["about"][fact] for one in examined] for fact in FACTS},
        "overlaid": _overlaid(names, examined),
        "parts": [_part(name, one) for name, one in zip(names, examined, strict=True)],
    }
    pages.write(Path(path), "inspect.html", content)


def _overlaid(names: Sequence[str], examined: Sequence[dict[str, Any]]) -> list[Markup]:
    """Charts by layer, all prefixes in each."""
    share, change, worth = {}, {}, {}
    for name, one in zip(names, examined, strict=True):
        if one["shares"]:
            lambdas = {site: _mean([sum(head) for head in heads]) for site, heads in one["shares"].items()}
            share[name] = _by_layer(one["sites"], lambdas)
        for part in ("keys", "values") if one["moved"] else ():
            moved = {site: both[part] for site, both in one["moved"].items()}
            change[part if len(names) == 1 else f"{name}: {part}"] = _by_layer(one["sites"], moved)
        if one["worth"] and one["worth"]["sites"]:
            worth[name] = _by_layer(one["sites"], one["worth"]["sites"])
    made = []
    if share:
        made.append(charts.lines("Share of attention on the prefix", share, "layer", "λ, mean over heads"))
    if change:
        made.append(charts.lines("Moved from the start", change, "layer", "deviations of the start"))
    if worth:
        made.append(charts.lines("What a layer's prefix is worth", worth, "layer", "rise of the loss when cut"))
    return made


def _part(name: str, one: dict[str, Any]) -> dict[str, Any]:
    """One prefix: its charts and the table of its tokens."""
    made: list[Markup] = []
    tokens: list[dict[str, Any]] = [dict.fromkeys(("words", "share", "worth")) for _ in range(one["about"]["length"])]
    if one["shares"]:
        heads = list(one["shares"].values())  # by site: [H][P]
        by_head = [[sum(head) for head in site] for site in heads]
        by_token = [[_mean(column) for column in zip(*site, strict=True)] for site in heads]
        made.append(charts.heat(f"{name}: share by layer and head", by_head, "head", "layer"))
        title = f"{name}: share by layer and prefix token"
        made.append(charts.heat(title, by_token, "prefix token", "layer", log=True))
        for token, column in zip(tokens, zip(*by_token, strict=True), strict=True):
            token["share"] = _mean(column)
    if one["worth"] and one["worth"]["tokens"]:
        ticks = [str(i) for i in range(len(tokens))]
        title = f"{name}: what each token is worth"
        made.append(charts.bars(title, {name: one["worth"]["tokens"]}, ticks, "rise of the loss when cut", log=True))
        for token, worth in zip(tokens, one["worth"]["tokens"], strict=True):
            token["worth"] = worth
    for token, words in zip(tokens, one["words"] or (), strict=False):
        token["words"] = words
    return {"name": name, "charts": made, "tokens": tokens, "loss": one["loss"], "about": one["about"]}


def _by_layer(sites: Sequence[str], values: dict[str, float]) -> list[tuple[float, float]]:
    return [(i, values[site]) for i, site in enumerate(sites) if site in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
