from tdq_utils.bench import bench, machine, time_ratios


def test_ratios_are_to_the_first_variant():
    rows = time_ratios({"short": lambda: sum(range(20_000)), "long": lambda: sum(range(2_000_000))}, repeats=3)
    assert rows.ratio[0] == rows.ratio_min[0] == 1
    assert rows.ratio[1] > 5
    assert (rows.ratio_min <= rows.ratio).all()
    assert (rows.ratio <= rows.ratio_max).all()


def test_bench_leaves_the_model_as_it_was(unet, scheduler):
    rows = bench(unet, scheduler, images=2, steps=2, repeats=1)
    assert list(rows.variant)[:2] == ["full precision", "profiled"]
    assert not hasattr(unet, "quantization")


def test_the_machine_is_named():
    assert "torch" in machine()
