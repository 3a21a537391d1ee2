"""The report on any recorded model: one page that needs no other file and no network, and its numbers as JSON."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from tdq_utils.denoiser.record import Recorded
from tdq_utils.denoiser.sampling import Seeds
from tdq_utils.errors import check_folder, checked_path
from tdq_utils.lab.findings import Survey
from tdq_utils.show import report_plots as figures
from tdq_utils.show.channel_plots import time_and_channels
from tdq_utils.show.tables import NAMES, significant, styled

PAGE = Path(__file__).parent / "assets" / "report.html"
HEADS = {"gain_db_": "gain at A{} (dB)", "ratio": "largest / smallest range", "correlation": "correlation with t"}


def report(recorded: Recorded, out: str | Path, scheduler: Any = None, weights: int = 8, activations: int = 6,
           bits: Sequence[int] = (4, 5, 6, 8), seeds: Seeds = range(8), steps: int | None = None, progress: bool = True,
           **sampling: Any) -> dict[str, Any]:  # fmt: skip
    """Will an interval over t help this model? Measure it, and write ``index.html`` and ``report.json`` into a folder. ::

        with tdq.record(pipe.transformer, inputs=24) as recorded:
            pipe(prompt, num_inference_steps=20)
        tdq.report(recorded, "runs/report")

    The model is quantized in several ways and comes back bit-identical, also after an error. Most of the time goes into two
    runs of every kept call for every layer; a recording without ``inputs`` skips all that needs the model's output.

    Args:
        recorded: what :func:`tdq_utils.denoiser.record.record` gave, closed; with ``inputs=n`` for the error of the output.
        out: folder, made if needed. scheduler: the one of the recording, to sample pictures with; default: none are sampled.
        weights: bits of weights. activations: bits of activations that layers, pictures and sliders are looked at with.
        bits: of activations, for drift and the verdict. seeds: of the pictures. steps: of sampling, default: as many as t were
            recorded. progress: show a bar. sampling: further arguments of ``sample``, such as ``condition`` and ``shape``.

    Returns the numbers, as ``report.json`` has them. TDQError: a quantized model or one in training mode, another model's
    recording, layers that were not recorded, bits outside 2..8, a scheduler that visits other t.
    """
    check_folder(folder := checked_path(out))
    survey = Survey(recorded, scheduler, weights, activations, bits, seeds, steps, progress, sampling)
    folder.mkdir(parents=True, exist_ok=True)
    survey.run()
    with figures.page_style():
        page = render(survey.found, survey.images)
    _write(folder / "report.json", json.dumps(survey.found, indent=1, allow_nan=False) + "\n")
    _write(folder / "index.html", page)
    return survey.found


def _write(path, text):
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def render(found: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """The page of what a :class:`tdq_utils.lab.findings.Survey` found, with its pictures."""
    parts = [_gains(found), _channels(found), _ranges(found), _drift(found), _outputs(found), _layers(found), _kept(found),
             _pictures(found, images), _cost(found), _protocol(found)]  # fmt: skip
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in parts)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in parts)
    data = json.dumps(found, allow_nan=False).replace("</", "<\\/")
    text = [f"<p>{escape(sentence).replace(' %', '&nbsp;%')}</p>" for sentence in found["verdict"]]
    facts = {"model": found["protocol"]["model"], "weights": f"{found['weights']} bits",
             "activations": f"{found['activations']} bits, where one number is shown",
             "layers": f"{len(found['layers'])} recorded, {len(found['kept'])} kept in full precision",
             "time steps": f"{len(found['t'])}, from {found['t'][0]:g} to {found['t'][-1]:g}"}  # fmt: skip
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Template(PAGE.read_text()).substitute(title=escape(found["protocol"]["model"]), verdict="".join(text), facts=shown,
                                                 links=links, body=body, data=data)  # fmt: skip


def _table(frame: pd.DataFrame, caption: str, formats: Mapping[str, Any] | None = None, **how: Any) -> str:
    """A styled table whose columns can be sorted, in a box that scrolls by itself."""
    return f'<div class="scroll">{styled(frame, caption, formats, **how).to_html(table_attributes="class=sortable")}</div>'


def _figure(figure: Any, name: str, alt: str, width: int = 640) -> str:
    return f'<figure class="scroll"><div style="min-width: {width}px">{figures.inline(figure, name, alt)}</div></figure>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


NO_CALLS = _note("Not measured: the recording kept no calls. Record with <code>record(model, inputs=24)</code>.")


def _gains(found):
    measured = found["measured"] == "output"
    rows = pd.DataFrame(found["gains"]).rename(columns={"bits": "activations"})
    rows["activations"] = "A" + rows.activations.astype(str)
    rows[["removed", "removed_se"]] = 100 * rows[["removed", "removed_se"]].astype(float)
    rows = rows.rename(columns={"removed": "removed (%)", "removed_se": "standard error (%)"})
    how = "the error of the model's output on the recorded calls: TDQ against the MSE-optimal constant" if measured else (
        "the squared error at a layer's input, the mean over quantized layers: the MSE-optimal interval of each t against the "
        "MSE-optimal constant, so the most that can be gained")  # fmt: skip
    alt = "Bars: " + ", ".join(f"A{row['bits']} {100 * row['removed']:.1f} %" for row in found["gains"])
    pictures = _figure(figures.gains(found), "gains", alt, 320)
    if measured:
        alt = "Error of the output in dB by bits of activations, for the best constant and for TDQ"
        pictures += _figure(figures.error_over_bits(found), "bits", alt, 320)
    note = _note("Bars: two standard errors over calls. The sentences above count a share as something if it is at least 0.5 % "
                 "and two standard errors.") if measured else NO_CALLS  # fmt: skip
    table = _table(rows, f"Share of {how}. Weights: {found['weights']} bits.", dict.fromkeys(rows.columns[1:], "{:.1f}"))
    return "gains", "What an interval over t removes", f'<div class="pair">{pictures}</div>{note}{table}'


def _channels(found):
    title = "Time or channels"
    if "channels" not in found:
        return "channels", title, NO_CALLS
    heads = {"time_db": "over time (dB)", "channels_db": "over channels (dB)", "both_db": "over both (dB)"}
    frame = pd.DataFrame(found["channels"]).sort_values("channels_db", ascending=False).rename(columns=heads)
    caption = (f"By how many dB the squared error at a layer's input falls at A{found['activations']} when its one interval "
               "becomes one for each t, one for each channel, or one for each channel at each t. Balancing channels gets what "
               "lies in channels with one interval still: it divides them by factors that fold into the weights. Measured on up "
               "to 512 vectors of each call: chance alone is worth about half a dB of both.")  # fmt: skip
    alt = "Points: gain over time and over channels, a layer each: " + ", ".join(
        f"median {frame[head].median():.1f} dB {head.removesuffix(' (dB)')}" for head in heads.values()
    )
    table = _table(frame, caption, dict.fromkeys(heads.values(), "{:.1f}"))
    rows = pd.DataFrame(found["balanced"])
    rows[["removed", "removed_se"]] = 100 * rows[["removed", "removed_se"]].astype(float)
    rows = rows.rename(columns={"removed": "removed (%)", "removed_se": "standard error (%)"})
    caption = f"Balanced: share of what the best constant loses in the output, at A{found['activations']}, that is removed."
    balanced = _table(rows, caption, dict.fromkeys(rows.columns[1:], "{:.1f}"))
    points = _figure(time_and_channels(pd.DataFrame(found["channels"])), "channels-points", alt, 320)
    return "channels", title, f'<div class="pair">{points}</div>{balanced}' + _folded("Layer by layer", table)


def _ranges(found):
    alt = (f"Heat map of {len(found['layers'])} layers by {len(found['t'])} time steps: the range that holds 99.9 % of a layer's "
           "input, relative to the layer's largest")  # fmt: skip
    picture, (left, right, top, bottom) = figures.heat_map(found, alt)
    gain = {row["layer"]: -1.0 if row["kept"] else row[f"gain_db_{found['activations']}"] for row in found["drift"]}
    first = max(found["histograms"], key=gain.__getitem__)
    options = "".join(f"<option{' selected' * (name == first)}>{escape(name)}</option>" for name in found["histograms"])
    return (
        "ranges",
        "Range of every layer over t",
        f"""
<p>The range that holds 99.9 % of the magnitudes of a layer's input, relative to the layer's largest. A row of one colour does not
drift: a constant serves it as well. Move the slider to see one step.</p>
<div class="controls"><label>t <input id="step" type="range" min="0" max="{len(found["t"]) - 1}" value="0"></label>
<output id="told" for="step"></output><label>layer <select id="layer">{options}</select></label></div>
<div class="pair"><figure><svg id="histogram" viewBox="0 0 560 330" role="img"></svg></figure>
<div id="bars" role="group" aria-label="Range at the chosen t, relative to the layer's largest"></div></div>
<figure class="scroll"><div class="over" style="min-width: 640px" data-left="{left:.5f}" data-right="{right:.5f}">{picture}
<i id="marker" style="top: {100 * top:.2f}%; bottom: {100 * (1 - bottom):.2f}%"></i></div></figure>""",
    )


def _drift(found):
    frame = pd.DataFrame(found["drift"]).sort_values(f"gain_db_{found['activations']}", ascending=False)
    frame["kept"] = frame.kept.map({True: "kept", False: "yes"})
    heads = {name: HEADS["gain_db_"].format(name[8:]) for name in frame if name.startswith("gain_db_")}
    shown = frame.rename(columns=heads | HEADS | {"kept": "quantized"})
    formats = {HEADS["ratio"]: "{:.2f}", HEADS["correlation"]: "{:.2f}"} | dict.fromkeys(heads.values(), "{:.2f}")
    caption = ("Drift of each layer's input over t. Gain: by how many dB the squared error falls when the best constant interval "
               "is replaced by the best one for each t, the most that any interval over t can give there. "
               "Click a head to sort.")  # fmt: skip
    return "drift", "Drift, layer by layer", _table(shown, caption, formats)


def _outputs(found):
    if "over_t" not in found:
        return "output", "Error of the output over t", NO_CALLS
    frame = pd.DataFrame({NAMES[method]: {row["t"]: row["error_db"] for row in rows} for method, rows in found["over_t"].items()})
    frame = frame.astype(float).rename_axis("t").reset_index().sort_values("t", ascending=found["t"][0] < found["t"][-1])
    bits = f"W{found['weights']}A{found['activations']}"
    alt = f"Lines: error of the output in dB over t at {bits}, for {', '.join(frame.columns[1:])}"
    caption = (f"Squared error of the output relative to the squared output in full precision, in dB, at {bits}; the mean over "
               f"those of the {found['protocol']['kept_calls']} kept calls that are at this t.")  # fmt: skip
    table = _table(frame, caption, dict.fromkeys(frame.columns[1:], "{:.1f}") | {"t": "{:g}"})
    return (
        "output",
        "Error of the output over t",
        _figure(figures.error_over_t(found), "over-t", alt) + _folded("The numbers", table),
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _layers(found):
    if "sensitivity" not in found:
        return "layers", "Which layers decide", NO_CALLS
    frame = pd.DataFrame(found["sensitivity"]["layers"]).sort_values("removed", ascending=False)
    frame[["removed", "removed_se"]] = 100 * frame[["removed", "removed_se"]].astype(float)
    heads = {"alone_db": "alone quantized (dB)", "spared_db": "all others quantized (dB)",
             "removed": "removed of the error (%)", "removed_se": "standard error (%)"}  # fmt: skip
    shown = frame.astype({"alone_db": float, "spared_db": float}).rename(columns=heads)
    whole = found["sensitivity"]["all_db"]
    bits = f"W{found['weights']}A{found['activations']}"
    caption = (f"Error of the model's output on the kept calls at {bits}, by the best constant: each layer alone quantized; each "
               "alone in full precision while all others are quantized, and which share of the error is gone then. "
               f"All quantized: {'–' if whole is None else f'{whole:.1f} dB'}.")  # fmt: skip
    alt = f"Error with each layer alone quantized, and what each removes alone in full precision; first: {frame.layer.iloc[0]}"
    table = _table(shown, caption, dict.fromkeys(heads.values(), "{:.1f}"))
    bars = _figure(figures.sensitivity_bars(found), "layers-bars", alt, 760)
    return "layers", "Which layers decide", bars + _folded(f"All {len(frame)} layers", table)


def _kept(found):
    frame = pd.DataFrame(found["kept"].items(), columns=["layer", "reason"])
    if frame.empty:
        return "kept", "Kept in full precision", "<p>No layer is kept.</p>"
    return "kept", "Kept in full precision", _table(frame, "Layers that are not quantized, and why.")


def _pictures(found, images):
    if "pictures" not in found:
        return "pictures", "Same seeds, other intervals", _note(
            "Not sampled: no scheduler was passed. Pass <code>scheduler=</code> and what the model needs to sample; the error of "
            "the output on recorded calls stands in its place, above.")  # fmt: skip
    rows = (
        pd.DataFrame(found["pictures"])
        .astype({"psnr": float, "ssim": float})
        .rename(columns={"psnr": "PSNR (dB)", "ssim": "SSIM"})
    )
    protocol = found["protocol"]
    caption = (f"How like the pictures of the same seeds in full precision: means over {len(protocol['seeds'])} seeds, "
               f"{protocol['steps']} steps of {protocol['scheduler']}, W{found['weights']}A{found['activations']}. "
               "Higher is better.")  # fmt: skip
    table = _table(rows, caption, {"PSNR (dB)": "{:.2f}", "SSIM": "{:.3f}"}, best={"PSNR (dB)": "max", "SSIM": "max"})
    clean = next(iter(images.values()), None)
    if clean is None or clean.dim() != 4 or clean.shape[1] not in (1, 3):
        return (
            "pictures",
            "Same seeds, other intervals",
            _note("What is sampled are no pictures of one or three channels.") + table,
        )
    strips = []
    for method, found_images in images.items():
        png, n = figures.strip(found_images)
        alt = f"{n} pictures, {NAMES[method]}, seeds {protocol['seeds'][0]} to {protocol['seeds'][n - 1]}"
        source = b64encode(png).decode()
        strips.append(f'<figcaption>{NAMES[method]}</figcaption><img alt="{alt}" src="data:image/png;base64,{source}">')
    return "pictures", "Same seeds, other intervals", f'<figure class="strips">{"".join(strips)}</figure>{table}'


def _cost(found):
    frame = pd.DataFrame(found["cost"])
    frame["share"] = 100 * frame.bytes / frame.bytes.iloc[0]
    frame = frame.rename(columns={"share": "of the first line (%)"})
    caption = "Bytes of the model's parameters and of each kind of interval; an interval is a step size of four bytes."
    return "cost", "Cost in bytes", _table(frame, caption, {"bytes": "{:,.0f}", frame.columns[2]: significant(3)})


def _protocol(found):
    rows = dict(found["protocol"]) | {f"seconds: {part}": f"{value:.3g}" for part, value in found["seconds"].items()}
    rows["seeds of the pictures"] = rows.pop("seeds")
    shown = {name.replace("_", " "): _words(value) for name, value in rows.items() if value is not None}
    frame = pd.DataFrame(shown.items(), columns=["what", "value"])
    note = _note("Intervals are calibrated on the recording. With calls that were kept from the same recording, the error of the "
                 "output is that on calls which calibration has seen.")  # fmt: skip
    return "protocol", "Protocol", note + _table(frame, "How the numbers of this page were made.")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
