"""Draw the README's first picture: ``python -m tools.picture``, with playwright and Chromium.

It is the first screen of ``reports/demo/index.html``, written to ``reports/demo/page.png``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PAGE = Path("reports/demo/index.html")
WIDTH, MARGIN = 1180, 12  # pixels


def main() -> None:
    """Open the page in Chromium and write its first screen."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.5, color_scheme="light"
        )
        page.goto(PAGE.absolute().as_uri())
        page.wait_for_selector(".top .chart svg .mark-symbol path")
        page.add_style_tag(content="#theme { visibility: hidden }")
        box = page.locator(".top").bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + MARGIN}
        page.screenshot(path=PAGE.with_name("page.png"), clip=clip)
        browser.close()


if __name__ == "__main__":
    main()
