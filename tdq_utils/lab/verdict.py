"""What the numbers of a report say, in two sentences, and never more than they say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST = 0.005  # a smaller share of the error is called nothing: it would round to 0 %
SURE = 0.03  # nothing is sure to be nothing if it is less than this, two standard errors included
DECIDES = 0.1  # of the output's error, by one layer
GAIN_DB = 1.0  # at a layer's input
MOST = 3  # layers that a sentence names


def certain(share: float, error: float | None) -> int:
    """1: something is gained, -1: lost, 0: nothing, by ``LEAST`` and two standard errors (``None``, NaN: not known)."""
    margin = max(LEAST, 2 * (error or 0.0)) if error == error else LEAST
    return int(share >= margin) - int(share <= -margin)


def percent(share: float) -> str:
    """A share, 0 to 1, for readers."""
    return f"{100 * share:.0f} %"


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Sentences on what was found (:class:`tdq_utils.lab.findings.Survey`): does an interval over t help; what decides; time or
    channels?

    By the model's output where that was measured, else by the inputs of its layers, as what could be gained at most.
    """
    measured = found["measured"] == "output"
    sentences = [_helps(found["gains"], measured), (_decide if measured else _could_gain)(found)]
    return [*sentences, *_channels(found)] if "channels" in found else sentences


def _channels(found):
    """Two sentences: what follows time and channels could gain at the layers' inputs; what a balance removes from the output."""
    bits, layers = found["activations"], found["channels"]
    time, channels, both = (np.median([row[f"{kind}_db"] for row in layers]) for kind in ("time", "channels", "both"))
    parts = {"mse": "one constant", "tdq": "TDQ"}
    does = []
    for row in found["balanced"]:
        share, sign = row["removed"], certain(row["removed"], row["removed_se"])
        what = f"{'removes' if sign > 0 else 'adds'} {percent(abs(share))}" if sign else "changes nothing that is sure"
        does.append(f"with {parts[row['method']]} {what}")
    return [f"At a layer's input the error at A{bits} falls by {time:.1f} dB if its interval follows time, by {channels:.1f} dB "
            f"if it follows channels, by {both:.1f} dB if both (medians of {len(layers)} layers).",
            f"Balanced over channels, the model at A{bits} {'; '.join(does)} of what the best constant loses."]  # fmt: skip


def _helps(gains, measured):
    """The first sentence: at which bits of activations something is removed, nothing, or added."""
    at: dict[str, list[str]] = {"gain": [], "nothing": [], "nothing sure": [], "loss": []}
    for row in gains:
        share, error, bits = row["removed"], row["removed_se"] or 0.0, f"A{row['bits']}"
        if sign := certain(share, error):
            at["gain" if sign > 0 else "loss"].append(f"{percent(abs(share))} at {bits}")
        else:
            at["nothing" if abs(share) + 2 * error < SURE else "nothing sure"].append(bits)
    removes = [listed(at["gain"])] if at["gain"] else []
    removes += [f"{what} at {listed(at[what])}" for what in ("nothing", "nothing sure") if at[what]]
    does = [f"{'removes' if measured else 'can remove at most'} {', and '.join(removes)}"] if removes else []
    does += [f"adds {listed(at['loss'])}"] if at["loss"] else []
    start = "in the model's output, an interval over t" if measured else "at the layers' inputs, the best interval for each t"
    return f"Of what the best constant loses {start} {'; it '.join(does)}."


def _decide(found):
    """The second sentence, by the share of the output's error that is gone when one layer is left in full precision."""
    rows = sorted(found["sensitivity"]["layers"], key=lambda row: -row["removed"])
    sure, bits = [row for row in rows if certain(row["removed"], row["removed_se"]) > 0], found["activations"]
    deciding = [row for row in sure if row["removed"] >= DECIDES][:MOST]
    names, shares = ([f(row) for row in deciding] for f in (lambda row: row["layer"], lambda row: percent(row["removed"])))
    if not sure:
        return f"No single layer decides: in full precision, none removes a part of the error at A{bits} that is sure."
    if not deciding:
        most = f"{sure[0]['layer']} in full precision removes {percent(sure[0]['removed'])}"
        return f"No single layer decides: {most} of the error at A{bits}."
    if len(names) == 1:
        return f"Layer {names[0]} decides: in full precision it removes {shares[0]} of the error at A{bits}."
    return (
        f"Layers {listed(names)} decide: in full precision, one at a time, they remove {listed(shares)} of the error at A{bits}."
    )


def _could_gain(found):
    """The second sentence, by the gain at the layers' inputs."""
    bits, column = found["activations"], f"gain_db_{found['activations']}"
    rows = sorted((row for row in found["drift"] if not row["kept"]), key=lambda row: -row[column])
    deciding, median = [row for row in rows if row[column] >= GAIN_DB][:MOST], np.median([row[column] for row in rows])
    if not deciding:
        return f"No layer stands out: at A{bits} the most that one could gain is {rows[0][column]:.1f} dB ({rows[0]['layer']})."
    names, gains = listed([row["layer"] for row in deciding]), listed([f"{row[column]:.1f} dB" for row in deciding])
    one = len(deciding) == 1
    return f"{'Layer' if one else 'Layers'} {names} could gain {gains} at A{bits}; the median of all is {median:.1f} dB."
