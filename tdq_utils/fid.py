"""Distances between sets of images: features of a classifier, Frechet distance, reference statistics."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tdq_utils.datasets import DATA, to_uint8
from tdq_utils.errors import DataError, TDQError

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

    def logits(self, images):
        """Class scores ``"image 10"``."""
        return self.head(self.body(images))


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


def frechet_distance(a, b):
    """Frechet distance of two Gaussians given by :class:`Statistics`, through torchmetrics in float64.

    ``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))`` (Heusel et al. 2017). With features of
    the shipped classifier this is the FCD, not the FID; compare only at equal n.
    """
    if a.mu.shape != b.mu.shape:
        raise TDQError(f"Both sets must have the same features; got {len(a.mu)} and {len(b.mu)}. Use one classifier.")
    metric = FrechetInceptionDistance(feature=_Identity(len(a.mu))).set_dtype(torch.float64)
    for side, stats in (("real", a), ("fake", b)):
        mu, sigma = torch.from_numpy(stats.mu), torch.from_numpy(stats.sigma)
        setattr(metric, f"{side}_features_sum", stats.n * mu)
        setattr(metric, f"{side}_features_cov_sum", (stats.n - 1) * sigma + stats.n * mu.outer(mu))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(stats.n))
    # The states are set, not accumulated: say what update() would have noted.
    metric._update_count, metric.orig_dtype = 1, torch.float64
    return float(metric.compute())


class _Identity(nn.Module):
    """Stands for the feature extractor where the features are there already."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


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
    return 10 * torch.log10(4 / paired_mse(images, clean).mean().clamp_min(1e-12)).item()
