"""The documentation site: builds strictly, fits a desktop and a phone window, and sends no request elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    import epo_kernels

    page = (site / "api" / "index.html").read_text()
    for name in set(epo_kernels.__all__) - {"__version__"}:
        assert f'id="epo_kernels.{name}"' in page, f"docs/api.md lacks {name}"


def test_every_setting_is_in_the_configuration(site):
    page = (site / "configuration" / "index.html").read_text()
    for name in ("loss.penalty", "algorithm.group_size", "model.name_or_path", "watch.stop"):
        assert f"<code>{name}</code>" in page


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window_and_ask_for_nothing_elsewhere(site, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for file in sorted(site.rglob("index.html")):
        page.goto(file.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{file.relative_to(site)} is {wide} pixels wide in a window of {width}"
        assert page.locator("h1").count() == 1, file
    assert not errors
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    page.close()
