"""Tables show what they hold, mark what is best, and look the same every time."""

import re

import pandas as pd
import pytest

from tdq_utils.show.tables import Table, bits, headline, significant, styled


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "method": ["full precision", "mse", "tdq", "mse", "tdq"],
            "bits": [None, "W8A5", "W8A5", "W8A6", "W8A6"],
            "fcd": [1.2345, 7.25, 6.04, 3.301, 3.299],
            "images": 256,
        }
    )


def cells(table, column):
    """What stands in a column, and whether it is bold."""
    html = table.to_html()
    bold = "".join(re.findall(r"([^{}]*)\{[^}]*font-weight: bold", html))
    found = re.findall(rf'<td (?:id="(\w+)" )?class="data row\d+ col{column}\b[^>]*>([^<]*)</td>', html)
    return [(text, bool(name) and re.search(rf"#{name}\b", bold) is not None) for name, text in found]


def test_equal_input_gives_equal_html_and_text(frame):
    one, two = (styled(frame, "seeds 0 to 255", best={"fcd": "min"}, groups="bits") for _ in range(2))
    assert one.to_html() == two.to_html() and repr(one) == repr(two)
    assert "seeds 0 to 255" in one.to_html() and repr(one).startswith("seeds 0 to 255\n")
    assert styled(frame, "another").uuid != one.uuid  # two tables on a page do not share their styles


def test_the_best_of_each_group_is_marked_with_what_reads_the_same_and_never_a_reference(frame):
    table = styled(frame, "c", best={"fcd": "min"}, groups="bits", references=frame.bits.isna())
    marked = [False, False, True, True, True]
    assert cells(table, 2) == list(zip(["1.23", "7.25", "6.04", "3.30", "3.30"], marked, strict=True))
    assert [text for text, _ in cells(table, 0)] == ["full precision", "static, MSE", "TDQ", "static, MSE", "TDQ"]
    assert cells(table, 1)[0] == ("–", False)


def test_the_largest_can_be_the_best_and_an_index_can_be_shown(frame):
    table = styled(
        frame.set_index("images", append=True).reset_index(level=1), "c", {"fcd": "{:.1f}"}, {"fcd": "max"}, index=True
    )
    assert cells(table, 3)[1] == ("7.2", True)
    assert 'class="row_heading level0 row0"' in table.to_html()
    assert "row_heading level0" not in styled(frame, "c").to_html()


@pytest.mark.parametrize(
    ("value", "text"), [(6.0, "6.0"), (0.0521, "0.052"), (15.2, "15"), (1234.4, "1,234"), (0.0, "0"), (-0.34, "-0.34")]
)
def test_two_digits(value, text):
    assert significant(2)(value) == text


def test_the_headline_has_both_distances_and_its_protocol():
    rows = [
        ("full precision", None, None, 0.0, 1.4),
        ("mse", 8, 5, 0.18, 7.2),
        ("tdq", 8, 5, 0.13, 6.0),
        ("real images", None, None, None, 0.17),
    ]
    table = pd.DataFrame(rows, columns=["method", "weights", "activations", "mse", "fcd"]).assign(images=256, steps=20.0)
    assert bits(table).tolist()[1:3] == ["W8A5"] * 2 and bits(table).isna().sum() == 2
    shown = headline(table)
    assert isinstance(shown, Table) and "256 images a row, 20 sampling steps" in shown.caption
    assert cells(shown, 2) == [("0", False), ("0.18", False), ("0.13", True), ("–", False)]
    assert cells(shown, 3) == [("1.4", False), ("7.2", False), ("6.0", True), ("0.17", False)]
    assert str(shown).splitlines()[4].split() == ["W8A5", "TDQ", "0.13", "6.0"]
