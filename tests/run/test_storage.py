"""A quantized model as a folder: exact round trips, damaged files."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tdq_utils import calibrate, freeze, load_quantized, quantize, sample, save_quantized
from tdq_utils.denoiser.loading import DATA
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit import layers
from tdq_utils.fit.quantize import METHODS, quantized_layers
from tdq_utils.method.generator import RawTime
from tdq_utils.run import storage
from tdq_utils.run.storage import pack, unpack

SHIPPED = {"lsq": "306a0b6d08aa", "tdq": "6f6cd6cdcd25"}  # what the first version of this kit loaded

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


STEPS_OF_SAVING = [(storage, "save_file"), (storage, "_sha256"), (Path, "write_text"), (Path, "replace"), (Path, "unlink")]


@pytest.mark.parametrize(("holder", "step"), STEPS_OF_SAVING, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["instead-of-it", "after-it"])
def test_an_interrupted_save_leaves_a_model_that_is_whole(calibrated, tmp_path, monkeypatch, x, holder, step, at, late):
    """The old one, until all of the new one is there; and no rest of what went wrong."""
    model = calibrated("mse")
    save_quantized(model, tmp_path)
    model.conv_in.bias.add_(1)
    expected = [load_quantized(tmp_path)(x, 999).sample, model(x, 999).sample]
    plain, calls = getattr(holder, step), []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) <= at:
            return plain(*args, **options)
        if late:
            plain(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(holder, step, fail)
        save_quantized(model, tmp_path)
    done = len(calls) <= at or step == "unlink" or (step, at, late) == ("replace", 1, True)
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, expected[done])
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, expected[1])
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_again_the_same_keeps_it(calibrated, tmp_path, x):
    model = calibrated("mse")
    for _ in range(2):
        save_quantized(model, tmp_path)
        assert torch.equal(load_quantized(tmp_path)(x, 999).sample, model(x, 999).sample)


def test_saving_takes_nothing_away_that_is_not_its_own(calibrated, tmp_path):
    """Other models in the folder stay; a damaged description does not stand in the way."""
    others = ["model.safetensors", "model-00001-of-00002.safetensors", "model.fp16.safetensors", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text(name)
    model = calibrated("mse")
    for damaged in ("[1, 2]", "{}", "half"):
        (tmp_path / "quantization.json").write_text(damaged)
        save_quantized(model, tmp_path)
        assert all((tmp_path / name).read_text() == name for name in others)
        assert len(list(tmp_path.iterdir())) == len(others) + 2


def test_what_was_saved_under_the_old_name_is_replaced(calibrated, tmp_path, x):
    model = calibrated("mse")
    save_quantized(model, tmp_path)
    one(tmp_path, "*.safetensors").rename(tmp_path / "model.safetensors")
    edit(lambda settings: settings.pop("tensors"))(tmp_path)
    model.conv_in.bias.add_(1)
    save_quantized(model, tmp_path)
    assert one(tmp_path, "*.safetensors").name.startswith("model-")
    assert torch.equal(load_quantized(tmp_path)(x, 999).sample, model(x, 999).sample)


def test_loading_draws_no_random_weights(calibrated, tmp_path, monkeypatch):
    save_quantized(calibrated("mse"), tmp_path)
    drawn, plain = [], torch.nn.init.kaiming_uniform_
    record = lambda tensor, *args, **options: drawn.append(tensor.is_meta) or plain(tensor, *args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", record)
    before = torch.get_rng_state()
    loaded = load_quantized(tmp_path)
    assert all(drawn) and torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("name", ["lsq", "tdq"])
def test_shipped_models_load_as_they_always_did(name):
    """From the format of before: the very weights, rounded, and step sizes."""
    loaded = load_quantized(DATA / "models" / f"fashion-mnist-w4a4-{name}")
    digest = hashlib.sha256()
    for key, value in sorted(loaded.state_dict().items()):
        if key.endswith(("weight", "bias", "rounded", ".s")):
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:12] == SHIPPED[name]


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


@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_comes_back_as_it_was(denoiser, scheduler, tmp_path, packed, caplog):
    """Parameters and buffers in bfloat16, step sizes in float32; the same bits."""
    model, condition = denoiser
    model.to(torch.bfloat16)
    quantize(model, 4, 8, "table")
    how = dict(condition=condition, progress=False, batch_size=3)
    calibrate(model, scheduler, range(3), 2, **how)
    freeze(model)
    save_quantized(model, tmp_path, packed=packed)
    caplog.clear()
    back = load_quantized(tmp_path)
    assert not caplog.records  # nor a warning of casting
    assert {name: p.dtype for name, p in back.named_parameters()} == {name: p.dtype for name, p in model.named_parameters()}
    assert all(layer.weight_step.dtype == torch.float32 for layer in quantized_layers(back).values())
    assert torch.equal(sample(back, scheduler, range(3), 2, **how), sample(model, scheduler, range(3), 2, **how))
