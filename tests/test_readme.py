"""The README's tables of results are those of the committed measurements."""

import re
from pathlib import Path

import pandas as pd

from tdq_utils.lab.tables.qat import default_trainings

ROOT = Path(__file__).parents[1]
METHODS = {
    "static, min-max": "minmax",
    "static, momentum": "momentum",
    "static, PTQ4DM": "ptq4dm",
    "static, MSE": "mse",
    "static, learned": "learned",
    "per-step table": "table",
    "dynamic, per sample": "dynamic-sample",
    "full precision, fine-tuned": "fine-tuned",
    "LSQ": "lsq",
    "PACT": "pact",
    "NIPQ": "nipq",
    "TDQ": "tdq",
    "TDQ on LSQ": "tdq",
    "TDQ on PACT": "tdq-pact",
    "TDQ on NIPQ": "tdq-nipq",
}


def readme_table(title):
    """``(label, bits, cell)`` of the table whose header begins with ``title``; labels without what is in brackets."""
    text = (ROOT / "README.md").read_text().replace("**", "")
    block = next(block for block in text.split("\n\n") if block.startswith(f"| {title}"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return [(re.sub(r" \(.*", "", row[0]), bits, cell) for row in rows for bits, cell in zip(header[1:], row[1:], strict=True)]


def check(title, rows_of):
    """Every cell is what ``rows_of(label)`` holds at its bits: the mean, and the least and greatest of several repeats."""
    cells = readme_table(title)
    assert len(cells) >= 30
    for label, bits, shown in cells:
        rows = rows_of(label)
        w, a = (int(n) for n in re.findall(r"\d+", bits))
        values = rows[((rows.weights == w) & (rows.activations == a)) | (rows.weights == 0)].fcd
        spread = f" ({values.min():.2f}–{values.max():.2f})" if len(values) > 1 else ""
        measured = f"{values.mean():.2f}{spread}" if len(values) else ""
        if rows.weights.max() == 0 and "(" not in shown:  # the same under all bits: its spread need stand only once
            measured = measured.removesuffix(spread)
        assert shown == measured, f"{label}, {bits}"


def test_post_training_quantization():
    table = pd.read_csv(ROOT / "data/results/ptq.csv")
    table = table[table.weights_method == "nearest"]
    check("intervals", lambda label: table[table.method == METHODS.get(label, label)])


def test_time_or_channels():
    """Repeat 0 alone, of both tables; what is not measured yet is empty."""
    names = {"static, MSE": "mse", "TDQ": "tdq", "full precision": "full precision"}
    balanced, plain = (pd.read_csv(ROOT / f"data/results/{name}.csv") for name in ("balance", "ptq"))
    table = pd.concat([balanced, plain.assign(rule="-")]).query("repeat == 0")
    table = table.drop_duplicates(["method", "weights", "activations", "weights_method", "rule"])

    def rows_of(label):
        name, rule, rounding = names[re.sub(", balanced|, AdaRound", "", label)], "balanced" in label, "AdaRound" in label
        rows = table[(table.method == name) & (table.weights_method == ("adaround" if rounding else "nearest"))]
        return rows[(rows.rule == ("range" if rule else "-"))]

    check("channels", rows_of)
    gap = {rule: rows_of(label).query("weights == 8 and activations == 5").fcd.item() for rule, label in
           (("plain", "static, MSE"), ("balanced", "static, MSE, balanced"))}  # fmt: skip
    share = (gap["plain"] - gap["balanced"]) / (gap["plain"] - rows_of("full precision").fcd.iloc[0])
    assert f"closes {share:.0%} of the gap at W8A5".replace("%", " %") in (ROOT / "README.md").read_text()


def test_training():
    table = pd.read_csv(ROOT / "data/results/qat.csv")
    table = table[table.steps == 20]
    trained = default_trainings(table)

    def rows_of(label):
        name, calibrated = re.subn(", calibrated only", "", label)
        untrained = calibrated or name == "full precision"
        return table[(table.method == METHODS.get(name, name)) & (table.iterations == 0 if untrained else trained)]

    check("with training", rows_of)


def test_constants_that_hardly_move():
    table = pd.read_csv(ROOT / "data/results/qat.csv")
    slow = table[(table.method == "lsq") & (table.weights == 4) & (table.step_rate == 0.1)]
    assert len(slow) == 2
    assert f"(LSQ {slow.fcd.mean():.2f})" in (ROOT / "README.md").read_text()
