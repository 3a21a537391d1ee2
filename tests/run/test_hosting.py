"""diffusers as a host: from_pretrained quantizes, save_pretrained keeps all of it, pipelines follow, damage is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map

import tdq_utils
from tdq_utils import calibrate, freeze, full_precision, load_model, quantize, restore, sample
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.layers import QuantizedLayer
from tdq_utils.fit.quantize import METHODS, activation_quantizers, quantized_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from denoisers import ZOO

TDQConfig = tdq_utils.TDQConfig
TENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(unet, tmp_path):
    """Where the tiny UNet lies in full precision."""
    unet.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@torch.no_grad()
def same(a, b, x, t=999):
    return torch.equal(a(x, t).sample, b(x, t).sample)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("method", ["tdq", "mse", "dynamic"])
def test_from_pretrained_quantizes(folder, unet, scheduler, profile, x, method):
    """The same as quantize on the loaded model, to the last bit; nothing is calibrated while loading."""
    config = TDQConfig(weights=4, activations=5, method=method, keep=["conv_in", "mid_block.*"], weights_per="tensor")
    model = UNet2DModel.from_pretrained(folder, quantization_config=config)
    quantize(unet, 4, 5, method, keep=["conv_in", "mid_block.*"], weights_per="tensor")
    assert model.quantization.kept == unet.quantization.kept and model.quantization.names == unet.quantization.names
    if method != "dynamic":
        with pytest.raises(TDQError, match="must be calibrated"):
            model(x, 999)
        for each in (model, unet):
            torch.manual_seed(1)
            calibrate(each, scheduler, profile=profile, progress=False, **(dict(iterations=2) if method == "tdq" else {}))
    assert same(model, unet, x)
    assert not model.training
    restore(model)
    assert same(model, UNet2DModel.from_pretrained(folder), x)
    assert "quantization_config" not in model.config


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(calibrated, scheduler, tmp_path, method, frozen):
    """Of a model that quantize quantized: nothing but the folder is needed."""
    model = calibrated(method)
    if frozen:
        freeze(model, scheduler, steps=4)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.quantization.kept == model.quantization.kept
    for name in ("weights", "activations", "method", "weights_per", "visited", "frozen"):
        assert getattr(loaded.quantization, name) == getattr(model.quantization, name)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in model.state_dict().items())
    assert torch.equal(*(sample(each, scheduler, range(3), 4, progress=False) for each in (model, loaded)))


def test_saving_leaves_the_model_as_it_was(calibrated, scheduler, tmp_path, x):
    """And a second round trip is exact, too: of a model that from_pretrained quantized."""
    model = calibrated("table")
    freeze(model, scheduler, steps=4)
    before, keys = dict(model.config), list(model.state_dict())
    model.save_pretrained(tmp_path / "a")
    assert dict(model.config) == before and list(model.state_dict()) == keys
    again = UNet2DModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert same(UNet2DModel.from_pretrained(tmp_path / "b"), model, x)
    described = [config_of(tmp_path / name)["quantization_config"] for name in "ab"]
    assert described[0] == described[1]
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


def test_rounded_weights_are_not_written_twice(calibrated, scheduler, tmp_path):
    model = calibrated("mse")
    model.save_pretrained(tmp_path / "unfrozen")
    freeze(model, scheduler, steps=4)
    model.save_pretrained(tmp_path / "frozen")
    sizes = [(tmp_path / name / TENSORS).stat().st_size for name in ("unfrozen", "frozen")]
    assert sizes[1] <= sizes[0]


KIT = """
import sys, tdq_utils
assert "tdq_utils.run.hosting" not in sys.modules and "diffusers" not in sys.modules
"""
HOST = """
from diffusers import UNet2DModel
import inspect, sys
assert "class ModelMixin" in inspect.getsource(sys.modules["diffusers.models.modeling_utils"])
"""
CONFIG = "import tdq_utils; assert tdq_utils.TDQConfig(weights=4).method == 'tdq'"


@pytest.mark.parametrize("imports", [KIT + HOST, HOST + KIT.splitlines()[1], CONFIG + HOST], ids=["kit", "diffusers", "config"])
def test_one_line_elsewhere(calibrated, scheduler, tmp_path, x, imports):
    """In another process, whatever is imported first."""
    model = calibrated("tdq")
    freeze(model, scheduler, steps=4)
    model.save_pretrained(tmp_path)
    torch.save((x, model(x, 749).sample), tmp_path / "expected")
    code = f"""
import torch
x, expected = torch.load({str(tmp_path / "expected")!r})
torch.set_num_threads(1)
assert torch.equal(UNet2DModel.from_pretrained({str(tmp_path)!r})(x, 749).sample, expected)
"""
    subprocess.run([sys.executable, "-c", imports + code], check=True)


def test_without_the_kit_diffusers_says_so(calibrated, tmp_path, monkeypatch):
    calibrated("mse").save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "tdq")
    with pytest.raises(ValueError, match="Unknown quantization type, got tdq"):
        UNet2DModel.from_pretrained(tmp_path)


def test_an_uncalibrated_model_comes_back_uncalibrated(unet, scheduler, profile, tmp_path, x):
    quantize(unet, 8, 5, "mse")
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(TDQError, match="must be calibrated"):
        loaded(x, 999)
    for model in (unet, loaded):
        calibrate(model, scheduler, profile=profile)
    assert same(loaded, unet, x)


@pytest.mark.parametrize("options", [dict(weights=None, activations=4), dict(activations=None), dict(keep=[])], ids=str)
def test_settings_survive(unet, scheduler, profile, tmp_path, x, options):
    quantize(unet, **options, method="mse")
    calibrate(unet, scheduler, profile=profile)
    unet.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), unet, x)


def test_halves_of_skips_survive(unet, scheduler, tmp_path, x):
    quantize(unet, 4, 5, "mse", split_skips=True)
    calibrate(unet, scheduler, range(2), 4, progress=False)
    unet.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), unet, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_learned_rounding_survives(calibrated, tmp_path, x, scheduler, frozen):
    model = calibrated("mse")
    name, layer = next(iter(quantized_layers(model).items()))
    layer.levels = (layer.weight_levels() - 1).clamp(layer.weight_grid.q_min)
    if frozen:
        freeze(model, scheduler, steps=4)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(quantized_layers(loaded)[name].levels, layer.levels)
    assert same(loaded, model, x)


def test_channels_last_survives(calibrated, tmp_path, x):
    model = calibrated("mse").to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not loaded.mid_block.resnets[0].conv1.weight.is_contiguous() and same(loaded, model, x)


def test_shards(calibrated, tmp_path, x):
    model = calibrated("table")
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(UNet2DModel.from_pretrained(tmp_path), model, x)


@pytest.mark.parametrize("method", ["tdq", "table", "learned"])
@pytest.mark.parametrize("given", [torch.bfloat16, None], ids=["torch_dtype", "as-saved"])
def test_half_precision_keeps_steps_in_float32(calibrated, scheduler, tmp_path, x, method, given):
    model = calibrated(method).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=given)
    assert loaded.conv_in.weight.dtype == torch.bfloat16
    state = loaded.state_dict()
    assert all(value.dtype == state[name].dtype and torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert same(loaded, model, x.bfloat16())
    freeze(loaded, scheduler, steps=4)
    assert same(loaded, model, x.bfloat16())


def test_a_loaded_model_is_cast_as_any_other(folder, calibrated, x, tmp_path):
    """diffusers refuses to cast what it thinks is quantized; the kit's layers can be."""
    model = calibrated("mse")
    model.save_pretrained(tmp_path / "q")
    loaded = UNet2DModel.from_pretrained(tmp_path / "q")
    assert same(loaded.to(torch.bfloat16), model.to(torch.bfloat16), x.bfloat16())
    UNet2DModel.from_pretrained(folder, quantization_config=TDQConfig(method="dynamic")).half().float()


def test_full_precision_is_saved_as_such(calibrated, unet, tmp_path, x):
    """Inside full_precision and after restore, the folder holds a plain model; a twin by from_config is one, too."""
    model = calibrated("mse")
    before = fingerprint(model)
    with full_precision(model):
        model.save_pretrained(tmp_path / "inside")
    model.save_pretrained(tmp_path / "quantized")
    loaded = UNet2DModel.from_pretrained(tmp_path / "quantized")
    UNet2DModel.from_config(loaded.config).save_pretrained(tmp_path / "twin")
    restore(loaded)
    assert fingerprint(loaded) == before
    loaded.save_pretrained(tmp_path / "restored")
    for name in ("inside", "twin", "restored"):
        assert "quantization_config" not in config_of(tmp_path / name)
        assert not hasattr(UNet2DModel.from_pretrained(tmp_path / name), "quantization")
    assert fingerprint(UNet2DModel.from_pretrained(tmp_path / "inside")) == before


def test_fine_tuned_weights_are_those_that_come_back(calibrated, tmp_path, x):
    model = calibrated("mse")
    model.quantization.before = {"conv_in.bias": model.conv_in.bias.clone()}  # as fine-tuning leaves it
    model.conv_in.bias.add_(1)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert same(loaded, model, x)
    restore(loaded)
    assert torch.equal(loaded.conv_in.bias, model.conv_in.bias)


def test_diffusers_dequantizes(calibrated, tmp_path):
    model = calibrated("mse")
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    loaded.dequantize()
    assert fingerprint(loaded) == before and not any(isinstance(module, QuantizedLayer) for module in loaded.modules())


def test_whole_pipelines(calibrated, scheduler, tmp_path):
    model = calibrated("table")
    freeze(model, scheduler, steps=4)
    pipe = DDIMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.quantization.frozen
    run = lambda p: p(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images  # noqa: E731
    assert (run(pipe) == run(loaded)).all()
    assert load_model(tmp_path)[0].quantization.method == "table"


def test_pipelines_by_a_mapping(unet, tmp_path, x):
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    config = TDQConfig(weights=4, method="dynamic-sample")
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    first, second = (DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping).unet for _ in range(2))
    quantize(unet, 4, 8, "dynamic-sample")
    assert same(first, unet, x) and same(second, unet, x)
    first.save_pretrained(tmp_path / "again")
    assert config.saved is None and same(UNet2DModel.from_pretrained(tmp_path / "again"), unet, x)


@torch.no_grad()
@pytest.mark.parametrize("family", ZOO.values(), ids=ZOO)
def test_any_family_in_half_precision(family, tmp_path):
    """With buffers that are not saved, modules that diffusers likes to keep in float32, inputs in lists."""
    if not hasattr(diffusers, family.kind):
        pytest.skip("not in this diffusers")
    model, half = family.build(), torch.bfloat16
    quantize(model, 4, 8, "dynamic")
    model.to(half).save_pretrained(tmp_path)
    loaded = getattr(diffusers, family.kind).from_pretrained(tmp_path)
    assert loaded.quantization.kept == model.quantization.kept
    call = tree_map(lambda v: v.to(half) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, family.call(2))
    call[family.time] = torch.full((2,), family.times[1])
    outputs = [tree_leaves(each(**call, return_dict=False)[0]) for each in (model, loaded)]
    assert all(torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(*outputs, strict=True))


def test_other_dtypes_as_diffusers_gives_them(calibrated, tmp_path, x):
    """torch_dtype casts the weights and buffers, not the step sizes."""
    calibrated("table").save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, UNet2DModel.from_pretrained(tmp_path).to(torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("method", ["tdq", "learned"])
def test_a_device_map(calibrated, tmp_path, x, method):
    model = calibrated(method)
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path, device_map={"": "cpu"}), model, x)
    with pytest.raises(DataError, match="sha256 of the step .* without offloading to a disk"):
        UNet2DModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "disk")


def test_saving_where_it_came_from(calibrated, tmp_path, x):
    calibrated("tdq").save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        before = loaded(x, 999).sample
    loaded.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert same(again, loaded, x) and torch.equal(loaded(x, 999).sample, before)


def test_copies_save_themselves(calibrated, tmp_path, x):
    model = calibrated("mse")
    model.save_pretrained(tmp_path / "a")
    twin = copy.deepcopy(UNet2DModel.from_pretrained(tmp_path / "a"))
    twin.conv_in.bias.data.add_(1)
    twin.save_pretrained(tmp_path / "b")
    assert same(UNet2DModel.from_pretrained(tmp_path / "b"), twin, x) and not same(twin, model, x)


def test_loading_searches_for_no_step_size(calibrated, tmp_path, monkeypatch):
    calibrated("mse").save_pretrained(tmp_path)
    monkeypatch.setattr(tdq_utils.fit.layers, "mse_step", None)
    UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights=9), "bits must be a whole number from 2 to 8; got 9"),
        (dict(activations=1), "bits .* got 1"),
        (dict(method="magic"), "method must be one of minmax, .*; got 'magic'"),
        (dict(weights_per="row"), "weights_per must be 'channel' or 'tensor'; got 'row'"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_at_once(options, message):
    with pytest.raises(TDQError, match=message):
        TDQConfig(**options)


def test_configurations_print_and_compare(calibrated, tmp_path):
    """Without what was saved: printed, and in a header sent to the hub, it would be long."""
    assert TDQConfig(weights=4) == TDQConfig(weights=4) != TDQConfig(weights=5)
    assert '"method": "tdq"' in repr(TDQConfig()) and '"quant_method": "tdq"' in TDQConfig().to_json_string()
    assert TDQConfig(keep=iter(["conv_in"])).keep == ["conv_in"]
    calibrated("tdq").save_pretrained(tmp_path)
    config = TDQConfig.from_dict(config_of(tmp_path)["quantization_config"])
    assert config.saved and len(json.dumps(config.to_dict())) < 1000


def test_what_only_the_model_can_tell_is_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "_load_pretrained_model", None)
    with pytest.raises(TDQError, match=r"keep must name conv or linear layers .* got 'nothing\.\*'"):
        UNet2DModel.from_pretrained(folder, quantization_config=TDQConfig(keep=["nothing.*"]))


def edit(change):
    def damage(folder, other):
        settings = config_of(folder)
        change(settings["quantization_config"])
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def reshape(folder, other):
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {"conv_in.bias": torch.zeros(9)}, folder / TENSORS, metadata={"format": "pt"})


def first_layer(settings):
    return next(iter(settings["saved"]["layers"].values()))


DAMAGE = {
    "other-format": (edit(lambda q: q["saved"].update(format=99)), "format must be 1, got 99"),
    "no-format": (edit(lambda q: q.update(saved={"layers": {}})), "must hold config.json .*'format'"),
    "other-bits": (edit(lambda q: q.update(weights=17)), "bits must be a whole number from 2 to 8; got 17"),
    "lost-layer": (edit(lambda q: q["saved"]["layers"].popitem()), "must hold config.json"),
    "unknown-step": (edit(lambda q: first_layer(q)["step"].update(kind="Magic")), "must hold config.json .*'Magic'"),
    "unknown-dtype": (edit(lambda q: q["saved"].update(buffers={"conv_in.bias": "float9"})), "must hold config.json .*'float9'"),
    "kept-nothing": (edit(lambda q: q.update(keep={"nothing": "as asked"})), "keep must name .* got 'nothing'"),
    "mixed": (
        lambda folder, other: (folder / TENSORS).write_bytes((other / TENSORS).read_bytes()),
        "sha256 of the step",
    ),
    "other-shape": (reshape, r"conv_in.bias must have the shape \(8,\), got \(9,\)"),
    "not-quantized": (
        lambda folder, other: (folder / TENSORS).write_bytes((other.parent / "float" / TENSORS).read_bytes()),
        "tensors are missing, .* copy the whole folder",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_refused(folder, calibrated, tmp_path, damage, message):
    model = calibrated("table")
    model.save_pretrained(tmp_path / "a")
    next(iter(activation_quantizers(model).values())).step.s.mul_(2)
    model.save_pretrained(tmp_path / "b")
    damage(tmp_path / "a", tmp_path / "b")
    with pytest.raises(TDQError, match=message):
        UNet2DModel.from_pretrained(tmp_path / "a")


def test_a_cut_file_is_refused(calibrated, tmp_path):
    calibrated("table").save_pretrained(tmp_path)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-100])
    with pytest.raises((OSError, TDQError)):
        UNet2DModel.from_pretrained(tmp_path)


def test_offloaded_models_cannot_be_saved(calibrated, tmp_path):
    from accelerate import cpu_offload

    model = cpu_offload(calibrated("mse"), execution_device=torch.device("cpu"))
    with pytest.raises(TDQError, match="must be in memory to be saved"):
        model.save_pretrained(tmp_path)
