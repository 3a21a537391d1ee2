"""The system's Chromium, driven by playwright, without a network; without either of them these tests skip, and say why."""

import shutil
from pathlib import Path

import pytest

from tdq_utils.show import site

ROOT = Path(__file__).parents[2]

WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="session")
def chromium():
    """A browser, shared by all tests of a process."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -r requirements.txt")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH: install the system's package chromium")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the whole site."""
    folder = tmp_path_factory.mktemp("site")
    site.build(ROOT, folder)
    return folder


@pytest.fixture
def visit(chromium):
    """``visit(path, size, scheme, query)``: the open page; afterwards it has asked for nothing but files of its own folder, and
    its console has stayed empty."""
    opened = []

    def go(path, size="desktop", scheme="light", query=""):
        width, height = WIDTHS[size]
        context = chromium.new_context(viewport=dict(width=width, height=height), color_scheme=scheme)
        page, asked, said = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri() + query)
        opened.append((context, path, asked, said))
        page.asked = asked
        return page

    yield go
    for context, path, asked, said in opened:
        context.close()
        assert not said, said
        assert all(url.startswith((path.parent.as_uri(), "data:", "blob:", "about:")) for url in asked), asked
