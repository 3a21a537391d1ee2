"""The contract on other people's models: which t they are told, quantized and frozen and restored; nothing wrong in silence."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from tdq_utils import calibrate, freeze, kept_layers, quantize, quantized_layers, record, restore
from tdq_utils.denoiser.call import prediction, read_times
from tdq_utils.denoiser.recording import as_profile, recording

sys.path.insert(0, str(Path(__file__).parent))
from denoisers import ZOO, unchanged


@pytest.fixture(params=ZOO, scope="module")
def family(request):
    return ZOO[request.param]


@pytest.fixture(scope="module")
def calls(family):
    """What the family's own pipeline would pass at each of three time steps."""
    torch.manual_seed(1)
    given = family.call(family.batch)
    return [given | {family.time: torch.full((family.batch,), t)} for t in family.times]


def outputs(model, calls):
    found = [prediction(model(**call)) for call in calls]
    return torch.stack([torch.stack(list(out)) for out in found])


def test_every_time_step_is_read_as_it_came(family, calls):
    model = family.build()
    assert [read_times(model, (), call).values for call in calls] == [[pytest.approx(t)] for t in family.times]


def test_the_whole_life_of_a_quantized_model(family, calls):
    model = family.build()
    before = copy.deepcopy(model.state_dict())
    clean = outputs(model, calls)
    with recording(model) as cells:
        outputs(model, calls)
    profile = as_profile(cells)
    assert profile.t.tolist() == pytest.approx(list(family.times))

    quantize(model, 4, 8, "table")
    assert [name for name in family.carries_t if name not in model.quantization.kept] == []
    calibrate(model, profile=profile, progress=False)
    assert model.quantization.visited == pytest.approx(list(family.times))
    quantized = outputs(model, calls)
    assert torch.isfinite(quantized).all() and not torch.equal(quantized, clean)
    assert unchanged(model, lambda: outputs(model, calls)) == []
    freeze(model)
    assert torch.equal(outputs(model, calls), quantized)
    restore(model)
    assert torch.equal(outputs(model, calls), clean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_are_balanced(family, calls):
    """On calls as the family's pipeline makes them; near full precision with 8 bits, and out again bit for bit."""
    model = family.build()
    clean = outputs(model, calls)
    with record(model, inputs=3) as recorded:
        outputs(model, calls)
    quantize(model, 8, 8, "table", balance=True)
    calibrate(model, data=recorded.inputs, progress=False)
    assert all(layer.balance is not None for layer in quantized_layers(model).values())
    quantized = outputs(model, calls)
    assert (quantized - clean).square().mean() < 0.01 * clean.square().mean()
    freeze(model)
    assert torch.equal(outputs(model, calls), quantized)
    restore(model)
    assert torch.equal(outputs(model, calls), clean)


def test_half_precision_runs(family, calls):
    model = family.build()
    with recording(model) as cells:
        outputs(model, calls)
    quantize(model, 8, 8, "mse")
    calibrate(model, profile=as_profile(cells), progress=False)
    model.to(torch.bfloat16)
    cast = lambda v: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    tree = lambda v: (  # noqa: E731
        {k: tree(p) for k, p in v.items()} if isinstance(v, dict) else [tree(p) for p in v] if isinstance(v, list) else cast(v)
    )
    assert torch.isfinite(outputs(model, [tree(call) for call in calls])).all()


@pytest.mark.parametrize(
    ("name", "ends"),
    [("Z-Image", ["all_x_embedder.2-1", "all_final_layer.2-1.linear"]), ("HunyuanVideo", ["x_embedder.proj", "proj_out"]),
     ("SD 3", ["pos_embed.proj", "proj_out"]), ("AuraFlow", ["pos_embed.proj", "proj_out"]),
     ("Wan", ["patch_embedding", "proj_out"])],
)  # fmt: skip
def test_the_first_and_last_layer_are_kept(name, ends):
    assert set(ends) <= kept_layers(ZOO[name].build()).keys()
