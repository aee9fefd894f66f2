"""Takes the dashboard's two pictures, of a swarm that answers while they are taken.

bsns up smollm2-135m --nodes 4 --gateway
python docs/pictures/take.py http://127.0.0.1:8080
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

HERE = Path(__file__).parent
QUESTION = "How does a bridge carry its load?"


def take(browser: Browser, url: str, name: str, scheme: str, width: int, height: int, *, phone: bool) -> None:
    """One picture, once everything has something to show."""
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        has_touch=phone,
        reduced_motion="reduce",
    )
    page.goto(url)
    page.locator("#status[data-kind=good]").wait_for()
    for part in (".stages li", ".barcode"):
        page.locator(part).first.wait_for(timeout=60_000)
    page.wait_for_function("document.querySelectorAll('#links tbody tr').length > 6", timeout=120_000)
    page.locator("#chat-text").fill(QUESTION)
    page.locator("#chat-text").press("Enter")
    page.locator("#graph .route").first.wait_for(timeout=60_000)
    page.wait_for_timeout(6_000)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=HERE / name, full_page=not phone)
    page.close()


def main() -> None:
    (url,) = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, url, "dashboard-desktop-light.png", "light", 1360, 900, phone=False)
        take(browser, url, "dashboard-phone-dark.png", "dark", 360, 1150, phone=True)
        browser.close()


if __name__ == "__main__":
    main()
