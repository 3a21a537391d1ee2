"""The page stands alone, shows what its JSON says, says no more than that, and gives the model back."""

import copy
import inspect
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import tdq_utils as tdq
from tdq_utils.__main__ import main
from tdq_utils.denoiser.record import Recorded
from tdq_utils.errors import TDQError
from tdq_utils.fit.choice import chosen_layers
from tdq_utils.lab import findings
from tdq_utils.lab.sensitivity import record_sampling
from tdq_utils.show import report_plots

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from denoisers import ZOO

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Addresses that a page could fetch, its tables as texts by caption, pictures without words, ids."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.tables, self.silent, self.ids, self.cell = [], {}, [], [], None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        self.ids += [given["id"]] if "id" in given else []
        if (tag == "img" and not given.get("alt")) or (given.get("role") == "img" and not given.get("aria-label")
                                                       and given.get("id") != "histogram"):  # fmt: skip
            self.silent.append(given)
        if tag == "tr":
            self.row = []
        if tag in ("th", "td", "caption"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag == "caption":
            self.rows = self.tables.setdefault(self.cell, [])
        elif tag in ("th", "td"):
            self.row.append(self.cell.strip())
        elif tag == "tr":
            self.rows.append(self.row)
        if tag in ("th", "td", "caption"):
            self.cell = None

    def table(self, start):
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))


def shown(value, form):
    return "–" if value is None else form.format(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report on the tiny UNet with everything in it, and how the model was before and is after."""
    model, scheduler = ZOO["UNet2D, additive"].build(), DDIMScheduler(timestep_spacing="trailing")
    before = copy.deepcopy(model.state_dict())
    recorded = record_sampling(model, scheduler, 3, 4, progress=False)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    out = tmp_path_factory.mktemp("report")
    settings = dict(plt.rcParams)
    found = tdq.report(recorded, out, scheduler, bits=(4, 6), seeds=range(3), progress=False)
    assert dict(plt.rcParams) == settings and not plt.get_fignums()
    assert torch.equal(torch.random.get_rng_state(), state)
    return model, before, found, out


def test_the_page_needs_nothing_but_itself(made):
    *_, out = made
    page, text = Page(out / "index.html"), (out / "index.html").read_text()
    assert page.addresses and [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|@import|url\((?!#)|WebSocket", text)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and page.silent == []
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "report.json"]


def test_the_json_has_the_numbers_that_are_shown(made):
    _, _, found, out = made
    page, text = Page(out / "index.html"), (out / "index.html").read_text()
    assert json.loads((out / "report.json").read_text()) == found
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', text)[1]) == found
    assert all(sentence.replace(" %", "&nbsp;%").replace("'", "&#x27;") in text for sentence in found["verdict"])
    rows = {row[0]: row for row in page.table("Drift")[1:]}
    for row in found["drift"]:
        values = [shown(row[name], "{:.2f}") for name in ("ratio", "correlation", "gain_db_4", "gain_db_6")]
        assert rows.pop(row["layer"]) == [row["layer"], "kept" if row["kept"] else "yes", *values]
    assert not rows
    rows = {row[0]: row[1:] for row in page.table("Error of the model's output")[1:]}
    for row in found["sensitivity"]["layers"]:
        values = row["alone_db"], row["spared_db"], 100 * row["removed"], 100 * row["removed_se"]
        assert rows[row["layer"]] == [shown(value, "{:.1f}") for value in values]
    assert [row[1:] for row in page.table("Share of")[1:]] == [
        [f"{100 * row['removed']:.1f}", f"{100 * row['removed_se']:.1f}"] for row in found["gains"]
    ]
    assert [row[1:] for row in page.table("Balanced: share")[1:]] == [
        [f"{100 * row['removed']:.1f}", f"{100 * row['removed_se']:.1f}"] for row in found["balanced"]
    ]
    rows = {row[0]: row[1:] for row in page.table("By how many dB")[1:]}
    for row in found["channels"]:
        assert rows[row["layer"]] == [f"{row[name]:.1f}" for name in ("time_db", "channels_db", "both_db")]
    assert dict(page.table("Layers that are not")[1:]) == found["kept"]
    assert [row[1:] for row in page.table("How like")[1:]] == [
        [shown(row["psnr"], "{:.2f}"), shown(row["ssim"], "{:.3f}")] for row in found["pictures"]
    ]
    assert [row[:2] for row in page.table("Bytes")[1:]] == [[row["what"], f"{row['bytes']:,}"] for row in found["cost"]]
    assert [row[0] for row in page.table("Squared error of the output")[1:]] == ["999", "666", "332"]


def test_what_is_in_a_report(made):
    model, before, found, _ = made
    assert found["measured"] == "output" and found["t"] == [999, 666, 332] == [row["t"] for row in found["over_t"]["mse"]]
    assert {(row["method"], row["bits"]) for row in found["outputs"]} == {
        ("mse", 4), ("tdq", 4), ("mse", 6), ("tdq", 6), ("table", 6), ("dynamic", 6)}  # fmt: skip
    assert found["kept"].keys() | {row["layer"] for row in found["sensitivity"]["layers"]} == set(found["layers"])
    assert found["protocol"]["fingerprint"] == tdq.denoiser.loading.fingerprint(model)
    assert found["protocol"]["seeds"] == [0, 1, 2] and found["protocol"]["kept_calls"] == 3
    whole = {row["method"]: row["error_db"] for row in found["outputs"] if row["bits"] == 6}
    assert found["sensitivity"]["all_db"] == whole["mse"]
    assert [row["method"] for row in found["balanced"]] == ["mse", "tdq"] and len(found["verdict"]) == 4
    assert {row["layer"] for row in found["channels"]} == {row["layer"] for row in found["sensitivity"]["layers"]}
    assert found["gains"][1]["removed"] == pytest.approx(1 - 10 ** ((whole["tdq"] - whole["mse"]) / 10), abs=1e-4)
    assert not hasattr(model, "quantization") and not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("moves", [True, False])
def test_the_verdict_on_hand_made_profiles(moves, unet, drifting, tmp_path):
    """Activations that drift, and the same ones that do not; no calls, so nothing is said of the output."""
    names = list(chosen_layers(unet, None)[0])
    scales = {name: (1, 1, 1, 1) for name in names} | ({names[2]: (1, 2, 4, 8), names[5]: (6, 5, 2, 1)} if moves else {})
    profile = drifting(**scales)
    found = tdq.report(Recorded(unet, profile.t.tolist(), _profile=profile), tmp_path, bits=(4, 8), progress=False)
    gain = {row["layer"]: row["gain_db_6"] for row in found["drift"]}
    assert found["measured"] == "inputs" and "sensitivity" not in found and "pictures" not in found
    first, second = found["verdict"]
    text = (tmp_path / "index.html").read_text()
    assert "Not measured: the recording kept no calls." in text and "no scheduler was passed" in text
    if moves:
        assert gain[names[2]] > gain[names[5]] > 1
        shares = {bits: np.mean([1 - 10 ** (-row[f"gain_db_{bits}"] / 10) for row in found["drift"]]) for bits in (4, 6, 8)}
        assert [f"{100 * share:.0f} % at A{bits}" for bits, share in shares.items()] == re.findall(r"\d+ % at A\d", first)
        assert second.startswith(
            f"Layers {names[2]} and {names[5]} could gain {gain[names[2]]:.1f} dB and {gain[names[5]]:.1f} dB"
        )
        assert second.endswith("; the median of all is 0.0 dB.")
    else:
        assert first.endswith("can remove at most nothing at A4, A6 and A8.")
        assert second.startswith("No layer stands out: at A6 the most that one could gain is 0.0 dB")


@pytest.mark.parametrize("name", ["Flux", "Z-Image", "Wan"])
def test_other_peoples_models(name, tmp_path):
    family = ZOO[name]
    model, call = family.build(), family.call(family.batch)
    before = copy.deepcopy(model.state_dict())
    with tdq.record(model, inputs=3) as recorded:
        for t in family.times:
            model(**call, **{family.time: torch.full((family.batch,), t)})
    found = tdq.report(recorded, tmp_path, bits=(6,), progress=False)
    assert found["protocol"]["model"] == family.kind and found["t"] == pytest.approx(list(family.times), rel=1e-5)
    assert "decide" in found["verdict"][1] and len(found["over_t"]["tdq"]) == 3
    assert Page(tmp_path / "index.html").silent == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["by_layer", "cost", "likeness"])
def test_an_error_leaves_the_model_as_it_was_and_no_page(where, unet, scheduler, tmp_path, monkeypatch):
    before = copy.deepcopy(unet.state_dict())
    recorded = record_sampling(unet, scheduler, 2, 2, progress=False)
    monkeypatch.setattr(findings, where, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tdq.report(recorded, tmp_path, scheduler, bits=(6,), progress=False)
    assert not hasattr(unet, "quantization") and list(tmp_path.iterdir()) == []
    assert before.keys() == unet.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_bad_input_is_refused_before_the_folder_is_made(unet, scheduler, tmp_path):
    recorded = record_sampling(unet, scheduler, 2, 2, progress=False)
    with pytest.raises(TDQError, match="steps= of the recording"):
        tdq.report(recorded, tmp_path / "new", scheduler, steps=7)
    assert not (tmp_path / "new").exists()


def test_the_command_says_the_verdict(unet, scheduler, tmp_path, monkeypatch, capsys):
    """Bound to the real signature: the recording of the model's own trajectory, and how it is looked at."""
    signature, calls = inspect.signature(tdq.report), []
    monkeypatch.setattr(tdq, "load_model", lambda *args, **options: (unet, scheduler))
    monkeypatch.setattr(sys.modules["tdq_utils.show.report"], "report", lambda *args, **how: (
        calls.append(signature.bind(*args, **how).arguments) or {"verdict": ["One.", "Two."]}))  # fmt: skip
    assert main(["report", "--out", str(tmp_path), "--steps", "2", "--images", "3", "--activations", "5", "--weights=4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "One.", "Two.", f"The page, which opens without a network: {tmp_path / 'index.html'}"]  # fmt: skip
    (call,) = calls
    assert (call["weights"], call["activations"], call["steps"], call["scheduler"]) == (4, 5, 2, scheduler)
    assert call["recorded"].t == [999, 499] and len(call["recorded"].inputs) == 2
    assert main(["report", "--activations", "9"]) == 2


def test_a_strip_of_pictures_is_in_colour():
    png, n = report_plots.strip(torch.zeros(3, 3, 4, 4), most=2)
    assert n == 2 and png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 9
    assert report_plots.strip(torch.zeros(1, 1, 4, 4))[1] == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_slider_and_the_heads_of_tables_work_from_disk(made, tmp_path):
    """A visitor's moves, played by a script at the end of the page."""
    _, _, found, out = made
    moves = """<script>
    const step = document.getElementById("step");
    step.value = 2; step.dispatchEvent(new Event("input"));
    document.querySelector("#drift th:nth-child(3)").click();
    </script></body>"""
    page = tmp_path / "index.html"
    page.write_text((out / "index.html").read_text().replace("</body>", moves))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}", "--dump-dom",
               page.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    assert re.search(r'id="told"[^>]*>t = 332<', dom)
    bars = re.findall(r"<em>(\d+) %</em>", dom)
    assert bars == [str(round(100 * row[2] / max(row))) for row in found["range"]]
    assert re.search(r'id="histogram"[^>]*aria-label="Histogram of the input of [^"]* at t = 332"', dom)
    (tmp_path / "sorted.html").write_text(dom)
    ratios = [float(row[2]) for row in Page(tmp_path / "sorted.html").table("Drift")[1:]]
    assert ratios == sorted((round(row["ratio"], 2) for row in found["drift"]), reverse=True)
