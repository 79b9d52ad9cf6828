"""A real browser for tests: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser without a window; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: run tests/browser.sh as root")
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which a container's user often is.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def opened(browser: Browser, file: Path, width: int) -> tuple[Page, list[str]]:
    """A page of that width, and what went wrong in it: errors, and everything else it asked for."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.set_default_timeout(20_000)
    address = file.resolve().as_uri()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith("data:") or request.url == address
            else wrong.append(request.url)
        ),
    )
    page.goto(address)
    return page, wrong
