"""Every page of the site in a real browser: from a disk, without a network, at two widths."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"

LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
CLEAR = (Path(__file__).parent / "contrast.js").read_text()


def pages(built):
    return sorted(path for path in built.glob("*.html"))


@pytest.mark.parametrize("name", LESSONS)
def test_every_slider_of_a_lesson_moves_its_picture(name, built, visit):
    page = visit(built / f"{name}.html", "phone")
    panels = page.locator(".panel")
    for i in range(panels.count()):
        panel = panels.nth(i)
        panel.locator("[role=slider]").first.wait_for()
        shown = "panel => [...panel.querySelectorAll('img')].filter(i => i.offsetParent).map(i => i.src).join()"
        before, asked = panel.evaluate(shown), len(page.asked)
        assert before.startswith(("data:", "blob:"))
        panel.locator("[role=slider]").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("([panel, before]) => [...panel.querySelectorAll('img')].filter(i => i.offsetParent)"
                               ".map(i => i.src).join() !== before", arg=[panel.element_handle(), before])  # fmt: skip
        assert all(url.startswith(("data:", "blob:")) for url in page.asked[asked:])
        assert panel.evaluate("panel => [...panel.querySelectorAll('img')].every(i => i.alt.length > 20)")
    views = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["metadata"].get("widgets")
    dead = page.locator(".card-link").count()
    assert (panels.count() + dead > 0) == bool(views)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_read_well(scheme, built, visit):
    """Nothing wider than the window, contrast of AA, a text on every figure, no dead link; on a phone and on a desktop."""
    size = {"light": "phone", "dark": "desktop"}[scheme]
    page = visit(built / "index.html", size, scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for path in pages(built):
        page.goto(path.as_uri())
        page.wait_for_function("[...document.querySelectorAll('.panel')].every(p => p.querySelector('[role=slider]'))")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path.name
        assert page.evaluate("[...document.images].filter(i => !i.closest('.panel') && i.alt.length < 12).length") == 0, path.name
        assert page.evaluate(CLEAR) == [], path.name
        assert page.locator("h1").count() == 1, path.name
        for target in page.evaluate("[...document.links].map(a => a.getAttribute('href')).filter(h => !/^([a-z]+:|#)/.test(h))"):
            assert (built / target.partition("#")[0].partition("?")[0]).is_file(), (path.name, target)
        page.screenshot(path=SCREENSHOTS / f"{path.stem}-{size}-{scheme}.png")


def test_search_finds_words_and_goes_there(built, visit):
    page = visit(built / "index.html")
    page.fill("input[type=search]", "straight-through")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hits a")
    assert "quantizers" in page.locator(".hits a").first.inner_text().lower()
    page.locator(".hits a").first.click()
    page.wait_for_selector("article h1")
    page = visit(built / "search.html", query="?q=xyzzy%20(")
    assert "Nothing holds all of these words" in page.locator(".hits").inner_text()


def test_next_and_previous(built, visit):
    page = visit(built / f"{LESSONS[1]}.html")
    page.locator("[rel=next]").click()
    page.wait_for_url(f"**/{LESSONS[2]}.html")
    page.locator("[rel=prev]").click()
    page.wait_for_url(f"**/{LESSONS[1]}.html")


def test_tables_are_sorted_by_keyboard(built, visit):
    page = visit(built / "table-ptq.html")
    head = page.locator("th", has_text="fcd").first
    column = head.evaluate("th => th.cellIndex")
    head.focus()
    for order in ("ascending", "descending"):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        cells = page.evaluate(f"[...document.querySelectorAll('tbody tr')].map(r => parseFloat(r.cells[{column}].textContent))")
        numbers = [value for value in cells if value is not None and value == value]
        assert numbers == sorted(numbers, reverse=order == "descending") and len(numbers) > 100
