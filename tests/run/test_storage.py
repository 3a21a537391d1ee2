"""A quantized model as a folder: exact round trips, damaged files."""

import json
from pathlib import Path

import pytest
import torch

from tdq_utils import calibrate, freeze, load_quantized, quantize, sample, save_quantized
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit import layers
from tdq_utils.fit.quantize import METHODS, quantized_layers
from tdq_utils.method.generator import RawTime
from tdq_utils.run.storage import pack, unpack

CHANNELS_LAST = [(method, frozen, torch.channels_last) for method in METHODS for frozen in (False, True)]


@pytest.mark.parametrize(("method", "frozen", "layout"), [*CHANNELS_LAST, ("table", True, torch.contiguous_format)])
def test_round_trip_is_exact(calibrated, scheduler, tmp_path, method, frozen, layout):
    model = calibrated(method).to(memory_format=layout)
    if frozen:
        freeze(model, scheduler, steps=4)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    assert (loaded.quantization.method, loaded.quantization.frozen) == (method, frozen)
    assert not loaded.training
    assert torch.equal(*(sample(each, scheduler, range(3), 4, progress=False) for each in (model, loaded)))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"weights": None, "activations": 4},
        {"weights": 3, "activations": None},
        {"weights": 4, "activations": 6, "weights_per": "tensor", "keep": []},
    ],
    ids=["activations", "weights", "all-layers-per-tensor"],
)
def test_settings_survive(unet, scheduler, profile, tmp_path, options):
    quantize(unet, method="mse", **options)
    calibrate(unet, scheduler, profile=profile)
    save_quantized(unet, tmp_path)
    loaded = load_quantized(tmp_path)
    for name in ("weights", "activations", "weights_per", "kept"):
        assert getattr(loaded.quantization, name) == getattr(unet.quantization, name)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x, 7).sample, unet(x, 7).sample)


def test_generators_with_other_settings(unet, scheduler, profile, tmp_path):
    """A loaded generator is still one: it can be frozen for any steps."""
    quantize(unet, method="tdq", keep=[name for name in profile.layers if name != "mid_block.resnets.0.conv1"])
    calibrate(unet, scheduler, profile=profile, iterations=2, features=RawTime(), depth=2, hidden=5, progress=False)
    save_quantized(unet, tmp_path)
    loaded = load_quantized(tmp_path)
    settings = [layer.activation.step.settings() for model in (unet, loaded) for layer in quantized_layers(model).values()]
    assert settings[0] == settings[1] == {"width": 1, "depth": 2, "hidden": 5, "dropout": 0.2}
    x = torch.randn(2, 1, 8, 8)
    freeze(loaded, scheduler, steps=7)
    freeze(unet, scheduler, steps=7)
    assert torch.equal(loaded(x, 999).sample, unet(x, 999).sample)


def test_before_calibration(unet, tmp_path):
    quantize(unet)
    save_quantized(unet, tmp_path)
    with pytest.raises(TDQError, match="must be calibrated"):
        load_quantized(tmp_path)(torch.zeros(1, 1, 8, 8), 5)


def test_full_precision_models_are_not_for_this(unet, tmp_path):
    with pytest.raises(TDQError, match="must be quantized"):
        save_quantized(unet, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def edit(change):
    """Damage the JSON: ``change`` alters the parsed settings."""

    def damage(folder):
        settings = json.loads((folder / "quantization.json").read_text())
        change(settings)
        (folder / "quantization.json").write_text(json.dumps(settings))

    return damage


def one(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def truncate(pattern):
    return lambda folder: one(folder, pattern).write_bytes(one(folder, pattern).read_bytes()[:-500])


DAMAGE = {
    "no-json": lambda folder: (folder / "quantization.json").unlink(),
    "no-tensors": lambda folder: one(folder, "*.safetensors").unlink(),
    "truncated-json": truncate("quantization.json"),
    "truncated-tensors": truncate("*.safetensors"),
    "garbage": lambda folder: one(folder, "*.safetensors").write_bytes(b"garbage" * 99),
    "other-format": edit(lambda settings: settings.update(format=99)),
    "other-shape": edit(lambda settings: settings["config"].update(block_out_channels=[8, 24])),
    "other-bits": edit(lambda settings: settings.update(weights=17)),
    "unknown-model": edit(lambda settings: settings.update(model="UNet9DModel")),
    "no-layers": edit(lambda settings: settings.pop("layers")),
    "lost-layer": edit(lambda settings: settings["layers"].popitem()),
    "unknown-step": edit(lambda settings: next(iter(settings["layers"].values()))["step"].update(kind="Magic")),
    "json-of-something-else": lambda folder: (folder / "quantization.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named(calibrated, tmp_path, damage):
    save_quantized(calibrated("table"), tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_quantized(tmp_path)


def test_weights_of_another_model_are_noticed(calibrated, tmp_path):
    model = calibrated("mse")
    save_quantized(model, tmp_path / "a")
    model.conv_in.bias.add_(1)
    save_quantized(model, tmp_path / "b")
    one(tmp_path / "b", "*.safetensors").replace(one(tmp_path / "a", "*.safetensors"))
    with pytest.raises(DataError, match="sha256 of model-.*safetensors must be .* copy both files again"):
        load_quantized(tmp_path / "a")


@pytest.mark.parametrize("weights", [8, 5, 4, 2])
@pytest.mark.parametrize("options", [{}, {"split_skips": True}, {"weights_per": "tensor"}], ids=str)
def test_packed_weights_give_the_same_outputs(unet, scheduler, tmp_path, weights, options):
    quantize(unet, weights, 8, "mse", **options)
    calibrate(unet, scheduler, range(2), 4, progress=False)
    freeze(unet, scheduler, steps=4)
    save_quantized(unet, tmp_path, packed=True)
    loaded = load_quantized(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x, 749).sample, unet(x, 749).sample)
    save_quantized(loaded, tmp_path / "again", packed=True)  # and they are on the grid for good
    assert torch.equal(load_quantized(tmp_path / "again")(x, 749).sample, unet(x, 749).sample)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3, 3), (1,)], ids=str)
def test_packing_is_exact(bits, shape):
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).to(torch.int8)
    packed = pack(levels, bits)
    assert torch.equal(unpack(packed, levels.shape), levels)
    assert packed.numel() == (levels.numel() if bits > 4 else -(-levels.numel() // 2))


def test_weights_in_full_precision_cannot_be_packed(unet, tmp_path):
    quantize(unet, None, 8, "dynamic")
    with pytest.raises(TDQError, match="packed needs weights on a grid"):
        save_quantized(unet, tmp_path, packed=True)


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_save_leaves_the_model_that_was_there(calibrated, tmp_path, monkeypatch, x, broken, at):
    model = calibrated("mse")
    save_quantized(model, tmp_path)
    expected = model(x, 999).sample
    model.conv_in.bias.add_(1)
    plain, calls = getattr(Path, broken), []

    def fail(path, *args):
        calls.append(path)
        if len(calls) > at:
            raise OSError("disk full")
        return plain(path, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, broken, fail)
        save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, expected)
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, model(x, 999).sample)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".part") == [".json", ".safetensors"]


def test_loading_searches_for_no_step_size(calibrated, tmp_path, monkeypatch):
    save_quantized(calibrated("mse"), tmp_path)
    monkeypatch.setattr(layers, "mse_step", None)
    load_quantized(tmp_path)


def test_tied_layers_are_saved_and_loaded(unet, scheduler, tmp_path, x):
    first, second = (unet.up_blocks[1].resnets[i].conv2 for i in range(2))
    second.weight = first.weight
    quantize(unet, 8, 8, "mse")
    calibrate(unet, scheduler, range(2), 4, progress=False)
    for packed in (False, True):
        save_quantized(unet, tmp_path, packed=packed)
        assert torch.equal(load_quantized(tmp_path)(x, 999).sample, unet(x, 999).sample)


def test_what_was_saved_before_tensors_had_a_name_of_their_own(calibrated, tmp_path, x):
    model = calibrated("table")
    save_quantized(model, tmp_path)
    one(tmp_path, "*.safetensors").rename(tmp_path / "model.safetensors")
    edit(lambda settings: (settings.pop("tensors"), settings.update(keep=list(settings["keep"]))))(tmp_path)
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, model(x, 999).sample)
