"""The statistics that the explorer shows are the profile's; its page needs nothing else."""

import json
import lzma

import numpy as np
import pytest
import torch

from tdq_utils import kept_layers
from tdq_utils.__main__ import main
from tdq_utils.errors import DataError, TDQError
from tdq_utils.method.grid import squared_error
from tdq_utils.show import explorer


@pytest.fixture
def found(profile):
    """In the place of TDQ's s(t), a table by hand: nothing is fitted."""
    steps = {bits: {name: 1.1 * profile.best_steps(name, bits)[1] for name in profile.layers[2::2]} for bits in (4, 5)}
    return explorer.statistics(profile, steps, "tiny <b>", "8 images")


def test_a_histogram_comes_back_with_its_shares():
    counts = np.zeros(4096)
    counts[1000:3000] = np.random.default_rng(0).integers(0, 50_000, 2000)
    edges, share = explorer.decoded(*explorer.encoded(counts, 8.0))
    assert len(share) == 250 and np.allclose([edges[0], edges[-1]], [-8 + 1000 / 256, -8 + 3000 / 256])
    assert np.isclose(share.sum(), 1) and np.allclose(share, counts[1000:3000].reshape(-1, 8).sum(1) / counts.sum(), rtol=0.05)


def test_a_rare_value_is_not_lost():
    counts = np.zeros(4096)
    counts[2048], counts[4000] = 2e6, 1
    share = explorer.decoded(*explorer.encoded(counts, 1.0))[1]
    assert (share > 0).sum() == 2 and 2e-7 < share[-1] < 1e-6


def test_the_step_sizes_are_those_of_the_profile(found, profile):
    assert [layer["name"] for layer in found["layers"]] == profile.layers[2::2]
    assert found["t"] == profile.t.tolist() and found["bits"] == [4, 5]
    for layer in found["layers"]:
        static, table = profile.best_steps(layer["name"], 4)
        assert np.isclose(layer["mse"][4], float(static), rtol=1e-4)
        assert np.allclose(layer["table"][4], table, rtol=1e-4)
        assert layer["low"] == profile.grid(layer["name"], 4).low
        assert np.allclose(layer["tdq"][4], 1.1 * table, rtol=1e-4)
        assert len(layer["tdq"][5]) == len(layer["cells"]) == len(profile.t)


def test_errors_of_the_exported_histogram_are_the_profiles(found, profile):
    """To a few per cent, although bins were joined: here every bin counts at 64 places."""
    for layer in found["layers"]:
        name, grid, (values, counts) = layer["name"], profile.grid(layer["name"], 5), profile.values(layer["name"])
        steps = profile.best_steps(name, 5)[1]
        true = squared_error(values, counts, steps, grid) / counts.sum(1)
        for i, cell in enumerate(layer["cells"]):
            edges, share = explorer.decoded(*cell)
            inner = edges[:-1, None] + np.diff(edges)[:, None] * (np.arange(64) + 0.5) / 64
            weights = np.repeat(share / 64, 64)
            error = squared_error(*(torch.from_numpy(v.ravel()).float()[None] for v in (inner, weights)), steps[i : i + 1], grid)
            assert np.isclose(float(error), float(true[i]), rtol=0.05)


def test_each_quantized_layer_gets_its_steps_and_the_model_comes_back(unet, profile):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    kept = set(kept_layers(unet))
    steps = explorer.generated_steps(unet, profile, [5])[5]
    assert set(steps) == set(profile.layers) - kept
    assert all(s.shape == profile.t.shape and (s > 0).all() for s in steps.values())
    after = unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_layers_are_the_same_at_all_bits(profile):
    name = profile.layers[3]
    with pytest.raises(TDQError, match="same layers, at least one"):
        explorer.statistics(profile, {4: {name: torch.ones(4)}, 5: {}}, "tiny")
    with pytest.raises(TDQError, match="same layers, at least one"):
        explorer.statistics(profile, {}, "tiny")


def test_the_page_holds_its_data_and_loads_nothing(found, tmp_path):
    explorer.write([found, found], tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert '"title":"tiny <b>"' in page and page.count("</script>") == 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_one_model_is_kept_as_packed_json(found, tmp_path):
    explorer.write([found], tmp_path / "one.json.xz")
    assert json.loads(lzma.decompress((tmp_path / "one.json.xz").read_bytes()))["title"] == "tiny <b>"
    with pytest.raises(TDQError, match="of one model; got 2"):
        explorer.write([found, found], tmp_path / "two.json.xz")


def test_what_ships_is_small_and_written_by_the_command(tmp_path, capsys):
    models = explorer.shipped()
    assert len(json.dumps(models)) < 1_000_000
    assert all(len(model["t"]) == 20 and model["bits"] == list(range(3, 9)) for model in map(dict, models))
    assert main(["explorer", "--out", str(tmp_path / "page.html")]) == 0
    assert "fashion-mnist" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size < 1_100_000


def test_without_statistics_it_says_how_to_measure_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(explorer, "ASSETS", tmp_path)
    with pytest.raises(DataError, match="explorer --measure fashion-mnist"):
        explorer.shipped()
    assert main(["explorer", "--out", str(tmp_path / "page.html")]) == 2


def test_measure_records_and_calibrates(unet, scheduler, monkeypatch):
    monkeypatch.setattr(explorer, "load_model", lambda name: (unet, scheduler))
    found = explorer.measure("tiny", images=4, steps=2, bits=[5])
    assert found["title"] == "tiny (UNet)" and found["note"] == "4 images, 2 steps of DDIM" and found["t"] == [999, 499]
