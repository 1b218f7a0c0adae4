"""The report in a real browser: charts have drawn, tables are filled, nothing is logged as an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import run_folder

from hocket.report import build, read


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        message = "chromium and chromedriver are not installed"
        if os.environ.get("CI"):
            pytest.fail(f"{message}; CI must have them")
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
        "window-size=1200,1600",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def boxes(browser: Any, selector: str) -> list[dict[str, float]]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => {let b = e.getBoundingClientRect(); return {w: b.width, h: b.height}})"
    return browser.execute_script(script, selector)


def show(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(lambda b: len(b.find_elements("css selector", ".main-svg")) >= 4)


def test_two_runs_side_by_side(browser: Any, tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / s, s) for s in ("sync", "overlap")]
    show(browser, build(runs, tmp_path / "page.html"))
    for x in ("version", "t", "bytes"):
        lines = boxes(browser, f"#loss-{x} .scatterlayer .js-line")
        assert len(lines) == 2
        assert all(b["w"] > 50 for b in lines)
    for i, run in enumerate(runs):
        bars = boxes(browser, f"#lanes-{i} .barlayer .point path")
        assert len(bars) == len(read(run).lanes)
        assert sum(b["w"] > 0 and b["h"] > 0 for b in bars) > 0.9 * len(bars)
    rows = browser.find_elements("css selector", "table.runs tbody tr")
    assert len(rows) == 2
    assert all(cell.text for row in rows for cell in row.find_elements("css selector", "td"))
    assert len(browser.find_elements("css selector", "table.clients tbody tr")) == 6
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_one_run_fits_a_narrow_window(browser: Any, tmp_path: Path) -> None:
    browser.set_window_size(420, 900)
    show(browser, build([run_folder(tmp_path / "a", "overlap")], tmp_path / "page.html"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert len(browser.find_elements("css selector", ".card")) >= 6
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
