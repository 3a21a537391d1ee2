"""The explorer in a real browser: by keyboard, by touch, and with the numbers of Python."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tdq_utils.method.grid import squared_error
from tdq_utils.show import explorer
from tdq_utils.show.profile_plots import split_error

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"


def convs(profile):
    """Those whose histograms are even enough: they get hundreds of values, not eight vectors."""
    return [name for name in profile.layers if ".conv" in name][::3]


@pytest.fixture
def tiny(profile, tmp_path):
    """A page over the tiny model, as two models; in the place of TDQ's s(t), a table by hand."""
    steps = {bits: {name: 1.1 * profile.best_steps(name, bits)[1] for name in convs(profile)} for bits in (4, 5)}
    found = explorer.statistics(profile, steps, "tiny", "8 images")
    explorer.write([found, {**found, "title": "other"}], tmp_path / "explorer.html")
    return tmp_path / "explorer.html"


def row(page, method):
    return {name: float(value) for name, value in page.locator(f"#row-{method}").evaluate("row => ({...row.dataset})").items()}


def test_its_errors_are_those_of_python(tiny, profile, visit):
    page = visit(tiny)
    for label in page.locator("#layer option").all_inner_texts()[::2]:
        name = label.split("\u00b7 ")[1]
        page.locator("#layer").select_option(label=label)
        for bits in (4, 5):
            page.locator(f"#bits input[value='{bits}']").check(force=True)
            for i in (0, 3):
                page.locator("#t").fill(str(i))
                values, counts = (part[i : i + 1] for part in profile.values(name))
                for method in ("mse", "table"):
                    static, each = profile.best_steps(name, bits)
                    got, s = row(page, method), each[i] if method == "table" else static
                    assert np.isclose(got["step"], float(s), rtol=1e-4)
                    grid = profile.grid(name, bits)
                    error = float(squared_error(values, counts, s.reshape(1), grid) / counts.sum())
                    assert np.isclose(got["round"] + got["cut"], error, rtol=0.05), (name, bits, i, method)
                    cut, rounding = split_error(values, counts, torch.as_tensor(s).reshape(1), grid)
                    assert np.allclose([got["cut"], got["round"]], [cut[0], rounding[0]], rtol=0.05, atol=0.05 * error)
    page.locator("#model").select_option("1")
    assert "model=1" in page.url and page.locator("#layer option").count() == len(convs(profile))


def test_by_keyboard(built, visit):
    page = visit(built / "explorer.html")
    handle = page.locator(".handle")
    handle.focus()
    before, start = row(page, "yours"), float(handle.get_attribute("aria-valuenow"))
    page.keyboard.press("ArrowRight")
    assert float(handle.get_attribute("aria-valuenow")) > start and row(page, "yours")["step"] > before["step"]
    assert page.locator("#row-yours input").is_checked()
    page.keyboard.press("Enter")  # the best for this t
    assert np.isclose(row(page, "yours")["step"], row(page, "table")["step"], rtol=1e-3)
    best = row(page, "yours")["round"] + row(page, "yours")["cut"]
    page.keyboard.press("PageUp")
    page.keyboard.press("PageUp")
    assert row(page, "yours")["round"] + row(page, "yours")["cut"] > best
    page.keyboard.press("Home")
    assert row(page, "yours")["cut"] > 10 * row(page, "yours")["round"]
    page.locator("#t").focus()
    told = page.locator("#insight").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#told").inner_text() == "949" and page.locator("#insight").inner_text() != told
    page.locator("#layer").focus()
    page.keyboard.press("ArrowDown")
    assert "949" in page.url and "layer=" in page.url and len(page.asked) == 1


def test_by_touch_and_play(built, visit):
    page = visit(built / "explorer.html", "phone", "dark")
    page.locator(".handle .grip").scroll_into_view_if_needed()
    box = page.locator(".handle .grip").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + 8, steps=4)
    page.mouse.up()
    assert page.locator("#row-yours input").is_checked() and page.locator(".handle .grip").bounding_box()["x"] > box["x"] + 15
    assert page.locator(".handle").evaluate("node => getComputedStyle(node).touchAction") == "none"
    page.locator("#play").click()
    page.wait_for_function("document.getElementById('told').textContent !== '999'")
    page.locator("#play").click()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "explorer-full-phone-dark.png", full_page=True)


def test_what_is_shown_can_be_shared(built, visit):
    shown = "#layer=up_blocks.0.resnets.1.conv2&bits=4&t=99&by=yours&end=2"
    page = visit(built / "explorer.html", query=shown)
    assert page.locator("#told").inner_text() == "99" and "16 levels" in page.locator("#where").inner_text()
    assert page.locator("#row-yours input").is_checked() and "end=2" in page.url
