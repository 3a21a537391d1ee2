"""Distances between sets of images: features, Frechet distance, KID and IS through torchmetrics, reference statistics."""

import math
import warnings
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from tdq_utils.denoiser.loading import DATA
from tdq_utils.errors import DataError, TDQError
from tdq_utils.lab.datasets import load_images, to_uint8

CLASSIFIER = DATA / "models" / "classifier"


class FeatureClassifier(nn.Module):
    """A small convolutional classifier of 28x28 grey images; its pooled features carry the distances.

    ``forward`` takes images ``"image 1 28 28"`` in [-1, 1] and returns features ``"image 64"``, the interface
    that torchmetrics expects of a feature extractor.
    """

    num_features = 64

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, 32), *_block(32, 32), nn.MaxPool2d(2),
            *_block(32, 64), *_block(64, 64), nn.MaxPool2d(2),
            *_block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images):
        """Features ``"image 64"``, non-negative."""
        return self.body(images)

    def scores(self, features):
        """Class scores ``"image 10"`` of features."""
        return self.head(features)

    def logits(self, images):
        """Class scores ``"image 10"`` of images."""
        return self.scores(self(images))


def _block(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def load_classifier(folder=CLASSIFIER):
    """The shipped :class:`FeatureClassifier`, in eval mode. DataError: its file is missing or damaged."""
    path = Path(folder) / "model.safetensors"
    classifier = FeatureClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except Exception as error:
        raise DataError(f"{path} must hold the classifier; run python -m tdq_utils train-classifier. ({error})") from error
    return classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class InceptionFeatures(nn.Module):
    """Inception v3 as the FID is defined with: needs the package torch-fidelity and its weights (extra ``inception``).

    The interface of :class:`FeatureClassifier`: ``forward`` takes images ``"image channel height width"`` in [-1, 1].
    """

    num_features = 2048

    def __init__(self):
        super().__init__()
        try:
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except (ModuleNotFoundError, OSError) as error:
            raise TDQError(
                f"features='inception' needs torch-fidelity and, once, the network for its weights ({error}); run "
                "pip install 'tdq-utils[inception]', or use features='classifier'."
            ) from error

    def forward(self, images):
        """Features ``"image 2048"``; one channel is shown as grey."""
        return self.net(to_uint8(images).expand(-1, 3, -1, -1))

    def scores(self, features):
        """Class scores without the bias, as the inception score is defined with."""
        return features @ self.net.fc.weight.T


FEATURES = {"classifier": load_classifier, "inception": InceptionFeatures}


def feature_extractor(features="classifier"):
    """An extractor by name: ``"classifier"`` (ships; gives the FCD) or ``"inception"`` (gives the FID).

    Raises:
        TDQError: unknown name, or the extra is not installed.
    """
    if features not in FEATURES:
        raise TDQError(f"features must be one of {', '.join(FEATURES)}; got {features!r}.")
    return FEATURES[features]()


@torch.no_grad()
def extract_features(images, classifier=None, batch_size=500):
    """Features of images, rounded to 8 bits first, as a saved picture would be.

    Args:
        images: ``"image channel height width"`` in [-1, 1]. classifier: default, the shipped one.

    Returns:
        ``"image feature"`` float64.
    """
    classifier = classifier or load_classifier()
    images = to_uint8(images).float().div_(127.5).sub_(1)
    return torch.cat([classifier(part).double() for part in images.split(batch_size)])


class Statistics:
    """Mean, covariance and count of a set of features: all that the Frechet distance needs.

    Attributes:
        mu: ``"feature"`` float64. sigma: ``"feature feature"`` float64, unbiased. n: number of images.
    """

    def __init__(self, mu, sigma, n):
        self.mu, self.sigma, self.n = np.asarray(mu, np.float64), np.asarray(sigma, np.float64), int(n)

    @staticmethod
    def of(features):
        """From features ``"image feature"``. TDQError: fewer images than features + 1 (singular covariance)."""
        n, width = features.shape
        if n <= width:
            raise TDQError(f"A Frechet distance needs more images than its {width} features; got {n}. Sample more images.")
        features = np.asarray(features, np.float64)
        return Statistics(features.mean(0), np.cov(features, rowvar=False), n)

    def save(self, path):
        """Write mu, sigma and n as npz (no pickles)."""
        np.savez_compressed(path, mu=self.mu, sigma=self.sigma, n=self.n)

    @staticmethod
    def load(path=CLASSIFIER / "fashion-mnist-test.npz"):
        """Read statistics; default: of the 10,000 test images under the shipped classifier."""
        try:
            with np.load(path) as data:
                return Statistics(data["mu"], data["sigma"], data["n"])
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            raise DataError(
                f"{path} must be an npz of mu, sigma and n; run python -m tdq_utils train-classifier. ({error})"
            ) from error


def _metric(kind, width, **options):
    """A torchmetrics metric for features that are there already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "will save all extracted features": 64 numbers an image
        # Processes measure different rows: their features must not be gathered.
        return kind(feature=_Identity(width), sync_on_compute=False, **options).set_dtype(torch.float64)


def frechet_distance(a, b):
    """Frechet distance of two Gaussians given by :class:`Statistics`, through torchmetrics in float64.

    ``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))`` (Heusel et al. 2017). With features of
    the shipped classifier this is the FCD, not the FID. It is biased by about c (1/n_a + 1/n_b): compare only at equal n.
    """
    if a.mu.shape != b.mu.shape:
        raise TDQError(f"Both sets must have the same features; got {len(a.mu)} and {len(b.mu)}. Use one classifier.")
    metric = _metric(FrechetInceptionDistance, len(a.mu))
    for side, stats in (("real", a), ("fake", b)):
        mu, sigma = torch.from_numpy(stats.mu), torch.from_numpy(stats.sigma)
        setattr(metric, f"{side}_features_sum", stats.n * mu)
        setattr(metric, f"{side}_features_cov_sum", (stats.n - 1) * sigma + stats.n * mu.outer(mu))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(stats.n))
    # The states are set, not accumulated: say what update() would have noted.
    metric._update_count, metric.orig_dtype = 1, torch.float64
    return float(metric.compute())


def kernel_distance(features, reference, seed=0):
    """Kernel distance (KID, Binkowski et al. 2018: unbiased in n) of two sets of features ``"image feature"``.

    Cubic polynomial kernel; the mean over 100 subsets of a tenth of the smaller set, at most 1,000 images.

    Returns:
        ``(distance, standard error)``, the spread over subsets scaled to the whole set.
    """
    size = max(2, min(1000, min(len(features), len(reference)) // 10))
    metric = _metric(KernelInceptionDistance, features.shape[1], subset_size=size)
    metric.update(torch.as_tensor(reference), real=True)
    metric.update(torch.as_tensor(features), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = (float(value) for value in metric.compute())
    return mean, spread * math.sqrt(size / len(features))


def inception_score(scores, seed=0):
    """Inception score (Salimans et al. 2016) of class scores ``"image class"``: ``(mean, spread)`` over 10 splits."""
    metric = _metric(InceptionScore, scores.shape[1])
    metric.update(torch.as_tensor(scores))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tuple(float(value) for value in metric.compute())


class _Identity(nn.Module):
    """Stands for the feature extractor where the features are there already."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


@cache
def reference_features(features="classifier"):
    """Features of the 10,000 test images, float32 ``"image feature"``: what the KID compares with."""
    return extract_features(load_images(split="test"), feature_extractor(features)).float()


class Distances:
    """All distances of a stream of images to the test images and, pair by pair, to full precision.

    Images are not kept: 64 numbers an image are (2,048 with Inception's features).

    Args:
        features: ``"classifier"`` or ``"inception"``, as for :func:`feature_extractor`.
    """

    def __init__(self, features="classifier"):
        self.name, self.extractor = features, feature_extractor(features)
        self.frechet = "fcd" if features == "classifier" else "fid"
        self.features, self.errors = [], []

    def update(self, images, clean=None):
        """Take in a batch ``"image channel height width"`` in [-1, 1] and the full-precision images of the same seeds."""
        self.features.append(extract_features(images, self.extractor).float())
        if clean is not None:
            self.errors.append(paired_mse(images, clean))

    @torch.no_grad()
    def compute(self):
        """Dict of ``fcd`` (or ``fid``), ``kid``, ``kid_se``, ``inception_score``; with pairs ``mse``, ``mse_se``, ``psnr`` (dB).

        Raises:
            TDQError: not more images than features.
        """
        features = torch.cat(self.features)
        reference = reference_features(self.name)
        statistics = Statistics.load() if self.name == "classifier" else Statistics.of(reference)
        distance = frechet_distance(Statistics.of(features), statistics)
        kid, kid_se = kernel_distance(features, reference)
        score, _ = inception_score(self.extractor.scores(features))
        found = {self.frechet: distance, "kid": kid, "kid_se": kid_se, "inception_score": score}
        if self.errors:
            error = torch.cat(self.errors)
            spread = (error.std() / math.sqrt(len(error))).item()
            found |= dict(mse=error.mean().item(), mse_se=spread, psnr=_decibel(error))
        return found


def fcd(images, reference=None, classifier=None):
    """Frechet classifier distance of images to the test set (or ``reference``): lower is better.

    Args:
        images: ``"image 1 28 28"`` in [-1, 1], more of them than features (64).
        reference: :class:`Statistics`, default the shipped ones. classifier: what the reference was made with.
    """
    return frechet_distance(Statistics.of(extract_features(images, classifier)), reference or Statistics.load())


def paired_mse(images, clean):
    """Mean squared difference to the full-precision image of the same seed, over pixels in [-1, 1]; one value an image."""
    if images.shape != clean.shape:
        raise TDQError(f"Images must pair up, seed by seed; got shapes {tuple(images.shape)} and {tuple(clean.shape)}.")
    return (images.clamp(-1, 1) - clean.clamp(-1, 1)).square().flatten(1).mean(1)


def psnr(images, clean):
    """Peak signal-to-noise ratio in dB, ``10 log10(2^2 / mean squared difference)``, for pixels in [-1, 1]."""
    return _decibel(paired_mse(images, clean))


def _decibel(error):
    return 10 * torch.log10(4 / error.mean().clamp_min(1e-12)).item()
