"""Pictures of HTML pages by headless Chromium: `python benchmarks/pictures.py PAGE.html=PICTURE.png ...`.

Playwright drives the system's own Chromium or Chrome (nothing is downloaded); FOREWORD_CHROMIUM names another. With
`--phone` the page is 390 points wide, with `--dark` it is asked to be dark, with `--top` only the first screen is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs", nargs="+", metavar="PAGE=PICTURE")
parser.add_argument("--phone", action="store_true")
parser.add_argument("--dark", action="store_true")
parser.add_argument("--top", action="store_true")


def find_browser() -> str | None:
    """The path of a Chromium that is installed, or None."""
    named = os.environ.get("FOREWORD_CHROMIUM")
    return named or next((path for name in BROWSERS if (path := shutil.which(name))), None)


def browser() -> str:
    """The path of a Chromium that is installed; without one the program ends."""
    found = find_browser()
    if found is None:
        sys.exit(f"pictures: none of {', '.join(BROWSERS)} is installed; install one, or name it in FOREWORD_CHROMIUM.")
    return found


def main() -> None:
    from playwright.sync_api import sync_playwright

    arguments = parser.parse_args()
    size = {"width": 390, "height": 800} if arguments.phone else {"width": 1280, "height": 860}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = chromium.new_page(viewport=size, color_scheme="dark" if arguments.dark else "light")
        page.route("http*://**", lambda route: route.abort())  # a page that needs the network shows it
        for pair in arguments.pairs:
            source, target = pair.split("=")
            page.goto(Path(source).resolve().as_uri())
            page.screenshot(path=target, full_page=not arguments.top)
            wide = page.evaluate("document.documentElement.scrollWidth")
            print(f"{target}: {wide} points wide")
        chromium.close()


if __name__ == "__main__":
    main()
