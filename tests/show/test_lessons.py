"""What the lessons show of measured tables is what the tables hold."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from tdq_utils import TDQError, freeze, quantize, quantized_layers, record, timesteps
from tdq_utils.show import lessons

matplotlib.use("Agg")
HOW = dict(steps=20, images=1000, sampler="DDIM", engine="integer", batch_size=64, threads=2)


@pytest.fixture
def table():
    """Two methods at two pairs of bits, two repeats; TDQ is ahead by 1 at W8A5, and by 1 and -1 at W4A5."""
    rows = [
        dict(method=method, weights=w, activations=5, repeat=r, weights_method="nearest", fcd=10 - w + r - ahead)
        for w, leads in ((4, (1, -1)), (8, (1, 1)))
        for r, lead in enumerate(leads) for method, ahead in (("mse", 0), ("tdq", lead))
    ]  # fmt: skip
    rows += [dict(rows[0], weights_method="adaround", fcd=0.0)]
    rows += [dict(rows[0], method=name, weights=0, activations=0, fcd=0.5) for name in lessons.REFERENCES]
    return pd.DataFrame(rows).assign(**HOW)


@pytest.fixture
def ablations():
    rows = [
        dict(question="depth", method=method, variant=variant, repeat=r, fcd=fcd * (1 + method.count("q")))
        for method in ("mse", "tdq") for variant, fcds in (("4", (10, 20)), ("1", (11, 18))) for r, fcd in enumerate(fcds)
    ]  # fmt: skip
    return pd.DataFrame([dict(rows[0], question="another", fcd=99), *rows])


def test_captions_tell_the_protocol_of_the_quantized_rows(table):
    table.loc[table.weights == 0, "engine"] = "eager"
    assert lessons.protocol(table) == "1,000 images a row, DDIM, 20 steps; engine: integer, batches of 64, 2 threads."
    assert lessons.repeats(table) == "2 repeats of W4A5, W8A5"


def test_by_bits_means_over_repeats_widest_weights_first_and_references_in_every_column(table):
    found = lessons.by_bits(table)
    assert list(found) == ["method", "W8A5", "W4A5"]
    assert found.method.tolist() == ["mse", "tdq", *lessons.REFERENCES]
    assert found.W8A5.tolist() == [2.5, 1.5, 0.5, 0.5] and found.W4A5.tolist() == [6.5, 6.5, 0.5, 0.5]


def test_judged_by_repeat_with_the_share_of_the_gap(table):
    found = lessons.judged(table).set_index("bits")
    assert found["TDQ better in every repeat"].to_dict() == {"W8A5": "yes", "W4A5": "no"}
    assert found["gap closed"].to_dict() == {"W8A5": pytest.approx(100 * 1 / 2), "W4A5": 0}


def test_compared_with_the_first_variant_of_the_same_method(ablations):
    found = lessons.compared(ablations, "depth")
    assert list(found) == ["method", "variant", "FCD", "change", "repeat 0", "repeat 1"]
    assert found.variant.tolist() == ["4", "1", "4", "1"] and found.FCD.tolist() == [15, 14.5, 30, 29]
    assert found.iloc[3, 3:].tolist() == pytest.approx([100 * (14.5 / 15 - 1), 10, -10])
    assert not found[found.variant == "4"].iloc[:, 3:].any(axis=None)


def test_pivoted_has_one_line_of_heads_for_readers(ablations):
    assert list(lessons.pivoted(ablations, "variant", "method", "fcd")) == ["variant", "static, MSE", "TDQ"]
    rows = ablations.assign(loss=1.0)
    heads = ["repeat", "FCD, static, MSE", "FCD, TDQ", "loss, static, MSE", "loss, TDQ"]
    assert list(lessons.pivoted(rows, "repeat", "method", ["fcd", "loss"])) == heads


def test_trainings_stand_together_by_bits_those_without_first():
    row = dict(method="lsq", weights=4, activations=4, repeat=0, iterations=10, step_rate=100, split_skips=False)
    row |= dict(fcd=2.0, kid=0.1, mse=0.2, loss=0.3)
    others = (dict(repeat=1, fcd=4.0), dict(weights=3), dict(weights=0, activations=0, method="fine-tuned"), dict(iterations=20))
    found = lessons.trainings(pd.DataFrame([row, *(row | other for other in others)]))
    assert found.bits.tolist() == ["–", "W4A4", "W4A4", "W3A4"]
    assert found.training.tolist() == ["full precision, fine-tuned", "LSQ", "LSQ, 20 iterations", "LSQ"]
    assert found.iloc[1, 2:6].tolist() == [2, 3, 2, 4]


@pytest.mark.parametrize("method", ["mse", "tdq"])
def test_step_sizes_of_a_frozen_model_are_those_at_each_step_noise_first(calibrated, scheduler, method):
    model, visited = calibrated(method), torch.tensor(timesteps(scheduler, 4))
    steps = {name: layer.activation.step for name, layer in quantized_layers(model).items()}
    with torch.no_grad():
        expected = {name: step.at(visited) if method == "tdq" else step.s.expand(4) for name, step in steps.items()}
    freeze(model, scheduler, 4)
    found = lessons.step_sizes(model, 4)
    assert found.keys() == expected.keys()
    for name, s in found.items():
        torch.testing.assert_close(s, expected[name])


def test_recorded_sees_every_quantized_layer_and_leaves_no_hook(calibrated):
    model, x = calibrated("mse"), torch.randn(2, 1, 8, 8)
    with pytest.raises(KeyboardInterrupt), lessons.recorded(model) as seen, torch.no_grad():
        model(x, 999)
        raise KeyboardInterrupt
    assert set(seen) == set(quantized_layers(model))
    for name, layer in quantized_layers(model).items():
        assert len(seen[name]) == 2 and not layer._forward_hooks


def test_real_against_real_draws_what_was_measured_beside_the_law():
    sizes = np.array([100, 1000])
    dots, law = lessons.real_against_real(sizes, [0.5, 0.1], c=10).axes[0].lines
    plt.close("all")
    assert dots.get_ydata().tolist() == [0.5, 0.1]
    assert law.get_ydata() == pytest.approx(10 * (1 / sizes + 1e-4))


def test_refused_prints_the_message_less_fingerprints_and_wants_one(capsys):
    with lessons.refused():
        raise TDQError(f"A profile serves the model that made it, 43046e177b20. {'Record it again. ' * 9}")
    printed = capsys.readouterr().out
    assert printed.startswith("A profile serves the model that made it, <fingerprint>. Record")
    assert max(map(len, printed.splitlines())) <= 110
    with pytest.raises(AssertionError, match="should have been refused"), lessons.refused():
        pass
    with pytest.raises(ValueError, match="another"), lessons.refused():
        raise ValueError("another")


def test_reasons_count_the_layers_that_are_kept(unet):
    quantize(unet, keep=["conv_in", "conv_out"])
    unet.quantization.kept["mid_block.resnets.0.conv1"] = "measured"
    found = lessons.reasons(unet)
    assert found.to_dict("list") == {
        "reason": ["as asked", "measured"], "layers": [2, 1], "example": ["conv_in", "mid_block.resnets.0.conv1"]
    }  # fmt: skip


@pytest.mark.parametrize("family, calls", [("SDXL", 3), ("Flux", 3), ("Z-Image", 3), ("Wan 2.2", 6)])
def test_a_tiny_pipeline_runs_and_is_the_same_every_time(family, calls):
    pytest.importorskip("transformers")
    assert set(lessons.TINY) == {"SDXL", "Flux", "Z-Image", "Wan 2.2"}
    lessons.quiet()
    made, state = [], torch.get_rng_state()
    for _ in range(2):
        pipe, prompt = lessons.tiny_pipeline(family)
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's noise changes
        with record(getattr(pipe, "unet", None) or pipe.transformer) as recorded:
            made.append(pipe(**prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(0))[0])
    assert len(recorded.t) == calls and torch.equal(*made) and torch.isfinite(made[0]).all()


def test_a_page_in_a_frame_is_whole():
    """Its quotes do not end the attribute that holds it."""
    shown = lessons.framed('<p title="a">b & c</p>').data
    assert 'srcdoc="&lt;p title=&quot;a&quot;&gt;b &amp; c&lt;/p&gt;"' in shown and 'height="640"' in shown
