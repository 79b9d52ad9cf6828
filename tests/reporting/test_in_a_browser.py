"""A report in a real browser: whole, offline, readable on two widths, and no script of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from data_pipeline.shards.index import load_manifest
from tests.browser import browser, opened
from tests.reporting.made_up import write_schedule
from tests.reporting.test_bad_runs import HOSTILE, hostile
from unimoe_mcore.report import main


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a mixture, a dense model and a run full of attacks."""
    folder = tmp_path_factory.mktemp("made up")
    runs = write_schedule(folder)
    (runs / "stage3" / "config.yaml").write_text(
        json.dumps(json.loads((runs / "stage3" / "config.yaml").read_text()) | {"note": HOSTILE})
    )
    attack = hostile(runs, load_manifest(folder / "data" / "tiny").digest)
    to = folder / "report"
    assert main([*(str(runs / n) for n in ("stage3", "dense")), str(attack), "--to", str(to)]) == 0
    assert (to / "report.md").is_file()
    return to / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_whole_on_this_width(width: int, report: Path, chromium: Browser) -> None:
    page, wrong = opened(chromium, report, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(pictures) >= 4
    assert all(pictures)
    beyond = page.evaluate(
        "[...document.querySelectorAll('svg, img, audio')].filter(e => e.checkVisibility() && "
        "e.getBoundingClientRect().right > innerWidth).length"
    )
    assert beyond == 0
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')]"
        ".map(t => t.getBoundingClientRect().height).filter(h => h))"
    )
    assert small >= 8  # pixels: the smallest letters of a picture
    page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.duration > 0)")
    assert page.locator("audio").count() >= 1
    assert page.evaluate("window.taken") is None
    assert HOSTILE in page.inner_text("main")
    assert wrong == []
    page.close()


def test_a_sound_plays_and_the_recipe_unfolds(report: Path, chromium: Browser) -> None:
    page, wrong = opened(chromium, report, 1280)
    played = page.evaluate(
        "(async () => { const a = document.querySelector('audio'); await a.play();"
        " await new Promise(done => { a.onended = done; }); return a.currentTime; })()"
    )
    assert played > 0.2
    listing = page.locator("details pre").first
    assert not listing.is_visible()
    page.get_by_text("base: config.yaml").click()
    assert listing.is_visible()
    page.get_by_role("link", name="Examples").click()
    assert page.evaluate("scrollY") > 500
    assert wrong == []
    page.close()
