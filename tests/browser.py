"""A headless browser for the tests of the report's page."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Chromium, which keeps what pages write to its console; in CI it has to be there."""
    from selenium import webdriver

    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        missing_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def missing_browser() -> None:
    """Fail in CI, elsewhere leave the test out and say so."""
    message = (
        "NO BROWSER, THE REPORT'S PAGE IS NOT TESTED: apt-get install chromium chromium-driver"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    print(f"\n{message}", file=sys.__stderr__)
    pytest.skip(message)
