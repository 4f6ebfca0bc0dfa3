"""A picture of the playground: a server on saved prefixes, and headless Chromium that types and presses Run.

`python benchmarks/playground.py runs/demo --text "..." --picture docs/playground.png`; `--phone` and `--dark` as
`pictures.py` has them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import browser
from serving import serving

SIZES = {False: (1200, 800), True: (375, 800)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directories", nargs="+", type=Path, help="saved prefixes; the first is chosen")
parser.add_argument("--text", required=True)
parser.add_argument("--picture", required=True, type=Path)
parser.add_argument("--second", help="the name of the prefix beside it")
parser.add_argument("--phone", action="store_true")
parser.add_argument("--dark", action="store_true")


def shoot(url: str, first: str, arguments: argparse.Namespace) -> None:
    """Ask the page at `url` and keep what it shows."""
    from playwright.sync_api import sync_playwright

    width, height = SIZES[arguments.phone]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": width, "height": height},
            device_scale_factor=2,
            color_scheme="dark" if arguments.dark else "light",
            reduced_motion="reduce",
        )
        page.goto(url)
        page.get_by_label("Prefix", exact=True).select_option(first)
        if arguments.second:
            page.get_by_label("Second prefix").select_option(arguments.second)
        page.get_by_label("Text").fill(arguments.text)
        for _ in range(2):  # the first time reads the prefix from disk
            page.get_by_role("button", name="Run").click()
            page.get_by_role("button", name="Stop").wait_for(state="hidden", timeout=300_000)
        page.get_by_role("list", name="Tokens").first.wait_for()
        page.screenshot(path=arguments.picture, full_page=True)
        print(f"{arguments.picture}: {page.evaluate('document.documentElement.scrollWidth')} points wide")
        chromium.close()


def main() -> None:
    arguments = parser.parse_args()
    with serving(*arguments.directories) as (url, _):
        shoot(url, arguments.directories[0].resolve().name, arguments)


if __name__ == "__main__":
    main()
