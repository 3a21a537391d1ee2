"""What the lessons from 05 on need around their cells: measured rows -> frames to show, their figures, tiny pipelines."""

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import nn

from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import checked_state, quantized_layers
from tdq_utils.lab.tables.quickstart import verdict
from tdq_utils.show import plots
from tdq_utils.show.result_plots import training_labels
from tdq_utils.show.tables import NAMES, bits

REFERENCES = ["full precision", "real images"]
HEADS = {"fcd": "FCD", "kid": "KID", "mse": "distance"}

# Of each family: pipeline, denoiser and its config, scheduler and its config, widths of pooled embeddings, arguments of a call.
TINY: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], dict[str, int], dict[str, Any]]] = {
    "SDXL": (
        "StableDiffusionXLPipeline", "UNet2DConditionModel",
        dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16),
             attention_head_dim=4, cross_attention_dim=12, use_linear_projection=True, addition_embed_type="text_time",
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
             addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12),
        "EulerDiscreteScheduler", dict(timestep_spacing="leading", steps_offset=1), dict(pooled_prompt_embeds=12), {},
    ),
    "Flux": (
        "FluxPipeline", "FluxTransformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8)),
        "FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), dict(pooled_prompt_embeds=10), {},
    ),
    "Z-Image": (
        "ZImagePipeline", "ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
             n_kv_heads=2, cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[64, 64, 64]),
        "FlowMatchEulerDiscreteScheduler", dict(shift=3.0), {}, {},
    ),
    "Wan 2.2": (
        "WanPipeline", "WanTransformer3DModel",
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
             freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32),
        "FlowMatchEulerDiscreteScheduler", dict(shift=3.0), {}, dict(num_frames=5),
    ),
}  # fmt: skip


def protocol(table: pd.DataFrame) -> str:
    """How the quantized rows of a table of results were made, for its caption."""
    rows = table[table.weights > 0]
    steps = ", ".join(map(str, sorted(rows.steps.unique())))
    engine, batch, threads = (rows[name].mode()[0] for name in ("engine", "batch_size", "threads"))
    how = f"{rows.images.iloc[0]:,} images a row, {rows.sampler.iloc[0]}, {steps} steps; engine: {engine}"
    return f"{how}, batches of {batch}, {threads} thread{'s' if threads > 1 else ''}."


def repeats(table: pd.DataFrame) -> str:
    """How often each pair of bits was measured, for a caption."""
    counts = table.repeat.groupby(bits(table), sort=False).nunique()
    return "; ".join(f"{n} repeats of {', '.join(alike.index)}" for n, alike in counts.groupby(counts, sort=False))


def by_bits(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """Means over repeats: a row a method, a column a pair of bits. ``REFERENCES``, which have no bits, stand in each column."""
    rows = table[table.weights_method == "nearest"]
    rows = rows.assign(bits=bits(rows)).sort_values(["weights", "activations"], ascending=False)
    wide = rows.pivot_table(measure, "method", "bits", sort=False)
    for name in REFERENCES:
        wide.loc[name] = rows[rows.method == name][measure].mean()
    return wide.reindex([name for name in [*dict.fromkeys([*NAMES][1:]), *REFERENCES] if name in wide.index]).reset_index()


def judged(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """:func:`~tdq_utils.lab.tables.quickstart.verdict` for readers; ``gap closed``: per cent of that between the best static
    interval and full precision; ``over the table``: per cent."""
    found = verdict(table, measure).sort_values(["weights", "activations"], ascending=False)
    full = table[table.method == "full precision"][measure].mean()
    return pd.DataFrame({
        "bits": bits(found), "best static interval": found.static.map(NAMES), "its mean": found.static_mean, "TDQ": found.tdq,
        "per-step table": found.table, "TDQ better in every repeat": found.wins.map({True: "yes", False: "no"}),
        "repeats": found.repeats, "gap closed": 100 * (found.static_mean - found.tdq) / (found.static_mean - full),
        "over the table": 100 * found.over_table,
    }).reset_index(drop=True)  # fmt: skip


def compared(table: pd.DataFrame, question: str, measure: str = "fcd") -> pd.DataFrame:
    """The variants of one question of the ablation table: the mean, and its change from the first variant in per cent, in the
    mean and in each repeat. Columns ``method``, ``variant``, the measure, ``change``, ``repeat 0``, ..."""
    wide = table[table.question == question].pivot_table(measure, ["method", "variant"], "repeat", sort=False)
    each = pd.concat([wide.mean(axis="columns").rename("change"), wide.add_prefix("repeat ")], axis="columns")
    change = 100 * (each / each.groupby("method", sort=False).transform("first") - 1)
    return change.assign(**{HEADS[measure]: each.change})[[HEADS[measure], *change]].reset_index()


def pivoted(rows: pd.DataFrame, index: str | list[str], columns: str, values: str | list[str]) -> pd.DataFrame:
    """A pivot table of means with one line of heads, such as ``FCD, TDQ``; of one measure alone, ``TDQ``."""
    wide = rows.pivot_table(values, index, columns, sort=False)
    heads = wide.columns if isinstance(values, list) else [("", name) for name in wide.columns]
    wide.columns = [", ".join(filter(None, (HEADS.get(value, value), str(NAMES.get(name, name))))) for value, name in heads]
    return wide.reset_index()


def trainings(table: pd.DataFrame) -> pd.DataFrame:
    """A line a kind of training and pair of bits, means over repeats; those without bits first."""
    rows = table.assign(bits=bits(table).fillna("–"), training=training_labels(table))
    groups = rows.groupby(["bits", "training"], sort=False)
    spread = groups.fcd.agg(**{"repeats": "size", "FCD": "mean", "least": "min", "greatest": "max"})
    found = spread.join(groups[["kid", "mse", "loss"]].mean()).rename(columns=HEADS).reset_index()
    pairs = ["–", *found.bits]
    return found.sort_values("bits", key=lambda column: column.map(pairs.index), kind="stable", ignore_index=True)


def step_sizes(model: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """s by layer, noise first, at the ``steps`` time steps that a model was frozen for."""
    found = {name: layer.activation.step.s for name, layer in quantized_layers(model).items()}
    return {name: s.flip(0) if s.dim() else s.expand(steps) for name, s in found.items()}


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """While open, what goes into and comes out of each quantized layer: ``{name: (input, output)}`` of the latest call."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as handles:
        for name, layer in quantized_layers(model).items():
            hook = layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
            handles.callback(hook.remove)
        yield seen


def real_against_real(sizes: np.ndarray, distances: Sequence[float], c: float, reference: int = 10_000) -> FigureBase:
    """FCD of real images against their number, and the law ``c (1 / n + 1 / reference)``."""
    ax, label = plots.axes_of(None, 6, 3), f"c (1/n + 1/{reference:,}), c = {c:.0f} (fitted from n = 500)"
    ax.loglog(sizes, distances, "o", label="measured")
    ax.loglog(sizes, c * (1 / sizes + 1 / reference), "--", color="0.4", label=label)
    ax.set(xlabel="real images", ylabel="FCD to the test set", title="Real against real: the bias falls roughly as 1/n")
    for axis in (ax.xaxis, ax.yaxis):
        plots.plain_log(axis)
    ax.legend()
    return ax.figure


def quiet() -> None:
    """No progress bars and no warnings of diffusers and transformers, whose pipelines load a lot."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Guards may run slower")  # torch's compiler, on Python 3.13.0


@contextmanager
def refused() -> Iterator[None]:
    """Print the message of the TDQError that is raised inside, less fingerprints of models. AssertionError: none is."""
    try:
        yield
    except TDQError as error:
        print(fill(re.sub(r"\b[0-9a-f]{12}\b", "<fingerprint>", str(error)), 110))  # random weights differ by machine
    else:
        raise AssertionError("This should have been refused.")


def reasons(model: nn.Module) -> pd.DataFrame:
    """Why layers of a quantized model are left in full precision: a row a reason, with its layers' number and the first name."""
    kept = pd.DataFrame(checked_state(model).kept.items(), columns=["layer", "reason"])
    return kept.groupby("reason", sort=False).layer.agg(layers="size", example="first").reset_index()


def tiny_pipeline(family: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of diffusers around a tiny random denoiser, and the arguments of a call: two prompts, embedded.

    ``family``: a key of ``TINY``. The same weights and prompts at every call; no text encoder, no VAE: it makes latents.
    """
    import diffusers

    pipeline, denoiser, config, scheduler, scheduling, pooled, call = TINY[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, denoiser)(**config).eval().requires_grad_(False)
        shapes = {"prompt_embeds": (2, 5, 12), **{name: (2, width) for name, width in pooled.items()}}
        signs = ("",) if family == "Flux" else ("", "negative_")  # its guidance is a number that the model gets
        prompt: dict[str, Any] = {f"{sign}{name}": torch.randn(shape) for sign in signs for name, shape in shapes.items()}
    kind = getattr(diffusers, pipeline)
    slots = inspect.signature(kind).parameters
    parts = {name: None for name, slot in slots.items() if slot.default is slot.empty}  # none of them is needed
    parts |= {"unet" if "unet" in slots else "transformer": model, "scheduler": getattr(diffusers, scheduler)(**scheduling)}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    if family == "Z-Image":
        prompt = {name: list(value) for name, value in prompt.items()}
    return pipe, prompt | call | dict(height=64, width=64, output_type="latent")


def framed(page: str, height: int = 640, title: str = "report") -> Any:
    """A whole HTML page, shown inside a notebook: a frame of so many pixels that holds it, and asks nobody for it."""
    from IPython.display import HTML

    return HTML(f'<div><iframe title="{title}" width="100%" height="{height}" srcdoc="{escape(page)}"></iframe></div>')
