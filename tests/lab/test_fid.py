"""Frechet distance against scipy and against closed forms; statistics as files; distances between pairs."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from tdq_utils import load_images
from tdq_utils.errors import DataError, TDQError
from tdq_utils.lab import fid
from tdq_utils.lab.fid import (
    Distances,
    Statistics,
    extract_features,
    feature_extractor,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_classifier,
    paired_mse,
)


def correlated(n, seed, width=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def fcd(images):
    """Frechet classifier distance to the test images."""
    return frechet_distance(Statistics.of(extract_features(images)), Statistics.load())


def test_statistics_of_features():
    features = correlated(50, seed=0)
    statistics = Statistics.of(torch.from_numpy(features))
    centred = features - features.mean(0)
    np.testing.assert_allclose(statistics.mu, features.mean(0))
    np.testing.assert_allclose(statistics.sigma, centred.T @ centred / 49)
    assert statistics.n == 50


def test_frechet_distance_against_scipy():
    a, b = Statistics.of(correlated(50, seed=1)), Statistics.of(correlated(70, seed=2))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_that_of_torchmetrics():
    """With more features than images have rank, too: eigenvalues that rounding makes negative or complex."""
    metric = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(1, 2, 2)).set_dtype(torch.float64)
    flat = lambda features: torch.from_numpy(features).view(-1, 1, 2, 2)  # noqa: E731
    a, b = correlated(60, seed=1, width=4), correlated(40, seed=2, width=4)
    metric.update(flat(a), real=True)
    metric.update(flat(b), real=False)
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(float(metric.compute()), rel=1e-9)
    twice = [Statistics.of(np.repeat(x, 2, axis=1) + [0, 1] * 4) for x in (a, b)]
    single = [Statistics.of(x) for x in (a, b)]
    assert frechet_distance(*twice) == pytest.approx(2 * frechet_distance(*single), rel=1e-6)


def test_frechet_distance_in_closed_form():
    """Shifted Gaussians: the squared shift. Scaled ones: the squared difference of standard deviations, an axis each."""
    shift, eye = np.array([3.0, -4.0, 0.0]), np.eye(3)
    centre = Statistics(np.zeros(3), eye, 100)
    assert frechet_distance(centre, Statistics(shift, eye, 100)) == pytest.approx(25)
    assert frechet_distance(centre, Statistics(np.zeros(3), 9 * eye, 100)) == pytest.approx(3 * (3 - 1) ** 2)
    assert frechet_distance(centre, centre) == pytest.approx(0, abs=1e-9)


def test_too_few_images_and_other_features():
    with pytest.raises(TDQError, match="more images than its 8 features; got 8. Sample more"):
        Statistics.of(correlated(8, seed=0))
    with pytest.raises(TDQError, match="same features; got 8 and 5. Use one classifier"):
        frechet_distance(Statistics.of(correlated(9, 0)), Statistics.of(correlated(9, 0, width=5)))


def test_statistics_save_and_load(tmp_path):
    statistics = Statistics.of(correlated(20, seed=3))
    statistics.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert (loaded.mu == statistics.mu).all() and (loaded.sigma == statistics.sigma).all() and loaded.n == 20


@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-30]), lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"garbage"), lambda file: np.savez(file, mu=np.zeros(2)),
], ids=["missing", "truncated", "empty", "garbage", "no-sigma"])  # fmt: skip
def test_damaged_statistics(tmp_path, damage):
    file = tmp_path / "s.npz"
    Statistics.of(correlated(20, seed=3)).save(file)
    damage(file)
    with pytest.raises(DataError, match=r"s\.npz must hold mu, sigma and n; run python -m tdq_utils train-classifier"):
        Statistics.load(file)


def test_features_are_those_of_saved_pictures():
    """Rounded to 8 bits, clipped, in any batch."""
    images = torch.rand(5, 1, 2, 2) * 2.4 - 1.2
    features = extract_features(images, lambda batch: batch.flatten(1), batch_size=2)
    levels = (features + 1) * 127.5
    assert features.dtype == torch.float64 and features.shape == (5, 4)
    np.testing.assert_allclose(levels, levels.round().clamp(0, 255), atol=1e-4)
    np.testing.assert_allclose(features, images.clamp(-1, 1).flatten(1), atol=0.004)


def test_shipped_classifier_knows_real_from_noise():
    classifier = load_classifier()
    images, labels = (part[:256] for part in load_images(split="test", labels=True))
    assert not classifier.training
    assert (classifier.logits(images).argmax(1) == labels).float().mean() > 0.88
    assert classifier(images).shape == (256, classifier.num_features)
    real, blurred, noise = (fcd(x) for x in (images, torch.nn.functional.avg_pool2d(images, 5, 1, 2), torch.randn_like(images)))
    assert 0 < real < blurred < noise


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_missing_or_damaged_classifier(tmp_path, content):
    if content:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="must hold the classifier; run python -m tdq_utils train-classifier"):
        load_classifier(tmp_path)


def test_paired_distances():
    clean = torch.zeros(2, 1, 4, 4)
    images = clean.clone()
    images[0, 0, 0, 0], images[1] = 0.8, 5.0  # one pixel of sixteen; clipped to 1
    assert paired_mse(images, clean).tolist() == pytest.approx([0.04, 1.0])
    with pytest.raises(TDQError, match=r"must pair up, seed by seed; got shapes \(1, 1, 4, 4\) and \(2, 1, 4, 4\)"):
        paired_mse(images[:1], clean)


def cubic_kernel_distance(x, y):
    """Unbiased squared MMD with the kernel (x . y / d + 1)^3, from the definition."""
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = lambda v, n: (k(v, v).sum() - k(v, v).diagonal().sum()) / (n * (n - 1))  # noqa: E731
    return float(within(x, n) + within(y, m) - 2 * k(x, y).mean())


def test_kernel_distance_against_its_definition():
    x, y = torch.from_numpy(correlated(400, seed=1)), torch.from_numpy(correlated(400, seed=2))
    distance, error = kernel_distance(x, y)
    assert distance == pytest.approx(cubic_kernel_distance(x, y), abs=4 * error)
    assert error < 0.2 * distance
    same, error = kernel_distance(x[::2], x[1::2])
    assert abs(same) < 4 * error  # unbiased: around zero, not above it


def test_kernel_distance_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    assert kernel_distance(torch.rand(30, 4), torch.rand(40, 4)) is not None
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    x, y = torch.ones(30, 4), torch.zeros(40, 4)
    kernel_distance(x, y)
    assert torch.equal(torch.rand(1), expected)


def test_inception_score_in_closed_form():
    classes = torch.eye(10).repeat(100, 1) * 100
    assert inception_score(classes)[0] == pytest.approx(10, rel=0.06)  # sure, and all classes alike often
    assert inception_score(classes[:1].repeat(100, 1))[0] == pytest.approx(1)  # always the same class


def test_a_stream_gives_what_all_images_at_once_give():
    images = load_images(split="train-10k")[:150]
    clean = images.flip(0)
    stream, few = Distances(clean=clean), Distances(clean=clean, kernel=False)
    for part in images.split(40):
        stream.update(part)
        few.update(part)
    found = stream.compute()
    assert found["fcd"] == pytest.approx(fcd(images), rel=1e-4)
    error = paired_mse(images, clean)
    assert found["mse"] == pytest.approx(error.mean().item(), rel=1e-6)
    assert found["mse_se"] == pytest.approx(error.std().item() / 150**0.5, rel=1e-6)
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / error.mean().item()), rel=1e-6)  # two is the range of a pixel
    assert few.compute() == {name: found[name] for name in ("fcd", "mse", "mse_se", "psnr")}
    assert found["kid_se"] > 0 and 5 < found["inception_score"] < 10
    noisy = Distances()
    noisy.update(images + 0.5 * torch.randn_like(images))
    worse = noisy.compute()
    assert worse["fcd"] > found["fcd"] and worse["kid"] > found["kid"] + 4 * found["kid_se"] and "mse" not in worse


def test_streamed_images_are_as_many_as_features_need():
    few = Distances()
    few.update(torch.zeros(20, 1, 28, 28))
    with pytest.raises(TDQError, match="more images than its 64 features; got 20"):
        few.compute()


class StandIn(torch.nn.Module):
    """The interface of torchmetrics' Inception: uint8 images of three channels in, features out, a last layer ``fc``."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.fc = torch.nn.Linear(2048, 1008)

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return images.float().flatten(1)[:, :2048]


@pytest.fixture
def anew():
    """Extractors are built anew, and not kept."""
    feature_extractor.cache_clear()
    yield
    feature_extractor.cache_clear()


@pytest.mark.usefixtures("anew")
def test_inception_features(monkeypatch):
    monkeypatch.setattr(fid, "NoTrainInceptionV3", StandIn)
    extractor = feature_extractor("inception")
    features = extract_features(torch.rand(3, 1, 28, 28) * 2 - 1, extractor)
    assert features.shape == (3, extractor.num_features)
    assert extractor.scores(features.float()).shape == (3, 1008)


@pytest.mark.usefixtures("anew")
def test_inception_without_its_package_says_what_to_install(monkeypatch):
    def missing(*args):
        raise ModuleNotFoundError("no torch-fidelity")

    monkeypatch.setattr(fid, "NoTrainInceptionV3", missing)
    with pytest.raises(TDQError, match=r"pip install 'tdq-utils\[inception\]', or use features='classifier'"):
        feature_extractor("inception")
    with pytest.raises(TDQError, match="features must be one of classifier, inception; got 'vgg'"):
        feature_extractor("vgg")
