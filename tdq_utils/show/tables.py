"""Tables as readers want them: a caption with the protocol, few digits, the best value marked, the same HTML every time."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

# What methods are called in tables and figures.
NAMES = {
    "full precision": "full precision", "minmax": "static, min-max", "momentum": "static, momentum",
    "percentile": "static, percentile", "mse": "static, MSE", "ptq4dm": "static, PTQ4DM", "learned": "static, learned",
    "table": "per-step table", "finite-set": "per-step min-max", "tdq": "TDQ",
    "dynamic": "dynamic, per tensor", "dynamic-sample": "dynamic, per sample",
    "dynamic-token": "dynamic, per token",
    "pact": "PACT", "lsq": "LSQ", "nipq": "NIPQ", "tdq-pact": "TDQ on PACT", "tdq-nipq": "TDQ on NIPQ",
    "fine-tuned": "full precision, fine-tuned",
}  # fmt: skip
BEST = {"background-color": "#cfe3f5", "color": "black", "font-weight": "bold"}  # bold, too: not by colour alone
PALE = {"font-style": "italic", "opacity": "0.75"}
RULE = {"border-top": "1px solid #888"}
LOOK = [
    {"selector": "caption", "props": "caption-side: top; text-align: left; max-width: 48em; margin-right: -24em"},
    {"selector": "th", "props": "text-align: right; vertical-align: bottom; max-width: 9em; white-space: normal"},
    {"selector": "td", "props": "text-align: right"},
    {"selector": "th.row_heading", "props": "text-align: left; max-width: none"},
]


class Table(Styler):
    """A styled table; as text, in a terminal, aligned columns under the caption."""

    def __repr__(self) -> str:
        rows = [line.split("\t") for line in self.to_string(delimiter="\t").splitlines()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([str(self.caption), *lines])


def significant(digits: int) -> Callable[[float], str]:
    """A format of so many significant digits: 6.0, 0.052, 1,234."""

    def text(value: float) -> str:
        return f"{value:,.0f}" if value == 0 or abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")

    return text


def styled(frame: pd.DataFrame, caption: str, formats: Mapping[str, Any] | None = None,
           best: Mapping[str, str] | None = None, groups: str | None = None, references: Iterable[bool] | None = None,
           index: bool = False) -> Table:  # fmt: skip
    """``frame`` for readers, its columns' names as heads: last in a cell. Equal input gives equal HTML and text, to be compared.

    Args:
        caption: what is seen, by which protocol (model, seeds, steps, images). It identifies the HTML: one caption, one table.
        formats: ``{column: format or function}``; otherwise whole numbers are shown as they are, others to 3 significant digits,
            and a column ``method`` by the names of methods.
        best: ``{column: "min" or "max"}``: where the best value of each group is marked, and what reads the same.
        groups: column; neighbouring rows of one value are a group, with a line to the next.
        references: for each row, whether it is no contestant (full precision, real images): pale, and never the best.
        index: show the index, whose entries must differ; otherwise it is dropped."""
    frame = frame if index else frame.reset_index(drop=True)
    shown: dict[str, Any] = dict.fromkeys(frame.select_dtypes("float"), significant(3))
    shown |= {"method": lambda name: NAMES.get(name, name)} if "method" in frame else {}
    shown |= formats or {}
    table = Table(frame, uuid=f"{zlib.crc32(caption.encode()):08x}", cell_ids=False, caption=caption)
    texts = [f".col{i}" for i, kind in enumerate(frame.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    left = [{"selector": ", ".join(texts), "props": "text-align: left"}] if texts else []
    table.format(shown, na_rep="–").set_table_styles(LOOK + left)
    rest = pd.Series(False if references is None else list(references), frame.index)
    table.set_properties(subset=(frame.index[rest], slice(None)), **PALE)
    key = frame[groups].fillna("") if groups else pd.Series("", frame.index)
    new = key != key.shift().fillna(key)
    table.set_properties(subset=(frame.index[new], slice(None)), **RULE)
    for column, kind in (best or {}).items():
        form = shown.get(column, str)
        for _, values in frame[column][~rest].dropna().groupby(new.cumsum()):
            read = values.map(form.format if isinstance(form, str) else form)
            table.set_properties(subset=(values.index[read == read[values.agg(f"idx{kind}")]], [column]), **BEST)
    return table if index else table.hide()


def bits(table: pd.DataFrame) -> pd.Series:
    """``W8A5`` for each row, from its columns ``weights`` and ``activations``; missing where a row has none."""
    label = "W" + table.weights.map("{:.0f}".format) + "A" + table.activations.map("{:.0f}".format)
    return label.where(table.weights > 0)


def headline(table: pd.DataFrame) -> Table:
    """Rows of :func:`tdq_utils.lab.tables.quickstart.compare`, by bits: distances to full precision and to real images."""
    shown = {"bits": bits(table).fillna("–"), "method": table.method, "distance to full precision": table.mse, "FCD": table.fcd}
    caption = (f"{table.images.iloc[0]} images a row, {table.steps.iloc[0]:.0f} sampling steps, the same seeds. Distance: mean "
               "squared pixel difference to the image of the same seed in full precision. FCD: Frechet classifier distance to "
               "the 10,000 test images. Lower is better.")  # fmt: skip
    low = dict.fromkeys(("distance to full precision", "FCD"), "min")
    return styled(pd.DataFrame(shown), caption, dict.fromkeys(low, significant(2)), low, "bits", table.weights.isna())
