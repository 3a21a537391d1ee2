"""Distances between sets of images: features, Frechet distance, KID and IS through torchmetrics, reference statistics."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from tdq_utils.denoiser.loading import AWAY, DATA
from tdq_utils.errors import DataError, TDQError, checked_path
from tdq_utils.lab.datasets import to_uint8
from tdq_utils.lab.protocol import Reference

CLASSIFIER = DATA / "models" / "classifier"


class FeatureClassifier(nn.Module):
    """A small convolutional classifier of grey images ``"image 1 28 28"`` in [-1, 1]; its pooled features carry the distances."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        halves = *_block(1, 32), *_block(32, 32), nn.MaxPool2d(2), *_block(32, 64), *_block(64, 64), nn.MaxPool2d(2)
        self.body = nn.Sequential(*halves, *_block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``"image 64"``, non-negative."""
        return self.body(images)

    def scores(self, features: Tensor) -> Tensor:
        """Class scores ``"image 10"`` of features."""
        return self.head(features)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``"image 10"`` of images."""
        return self.scores(self(images))


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def load_classifier(folder: str | Path = CLASSIFIER) -> FeatureClassifier:
    """The shipped :class:`FeatureClassifier`, in eval mode. DataError: its file is missing or damaged."""
    path = checked_path(folder) / "model.safetensors"
    classifier = FeatureClassifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        classifier.load_state_dict(load_file(path))
    except Exception as error:
        raise DataError(f"{path} must hold the classifier; run python -m tdq_utils train-classifier ({error}). {AWAY}") from error
    return classifier.eval().requires_grad_(False)


class InceptionFeatures(nn.Module):
    """Inception v3 as the FID is defined with, in the shape of :class:`FeatureClassifier`; needs the extra ``inception``."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except (ModuleNotFoundError, OSError) as error:
            raise TDQError(f"features='inception' needs torch-fidelity and, once, the network ({error}); run pip install "
                           "'tdq-utils[inception]', or use features='classifier'.") from error  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Features ``"image 2048"``; one channel is shown as grey."""
        return self.net(to_uint8(images).expand(-1, 3, -1, -1))

    def scores(self, features: Tensor) -> Tensor:
        """Class scores without the bias, as the inception score is defined with."""
        return features @ self.net.fc.weight.T


DEFAULT = Reference()
FEATURES: dict[str, Callable[[], Any]] = {"classifier": load_classifier, "inception": InceptionFeatures}


@cache
def feature_extractor(features: str = "classifier", device: str | torch.device = "cpu") -> FeatureClassifier | InceptionFeatures:
    """An extractor by name: ``"classifier"`` (ships; gives the FCD) or ``"inception"`` (gives the FID); built once on a device.

    TDQError: another name."""
    if features not in tuple(FEATURES):
        raise TDQError(f"features must be one of {', '.join(FEATURES)}; got {features!r}.")
    return FEATURES[features]().to(device)


@torch.no_grad()
def extract_features(images: Tensor, classifier: Callable[[Tensor], Tensor] | None = None, batch_size: int = 500) -> Tensor:
    """Features ``"image feature"`` float64 (default: the shipped classifier's) of images in [-1, 1], rounded to 8 bits first."""
    classifier, parts = classifier or load_classifier(), to_uint8(images).float().div_(127.5).sub_(1).split(batch_size)
    device = next(classifier.parameters()).device if isinstance(classifier, nn.Module) else images.device
    return torch.cat([classifier(part.to(device)).cpu().double() for part in parts])


class Statistics:
    """All that the Frechet distance needs: mean ``"feature"``, unbiased covariance ``"feature feature"`` (float64), and count."""

    def __init__(self, mu: ArrayLike, sigma: ArrayLike, n: int) -> None:
        self.mu, self.sigma, self.n = np.asarray(mu, np.float64), np.asarray(sigma, np.float64), int(n)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """From features ``"image feature"``. TDQError: fewer images than features + 1 (singular covariance)."""
        n, width = features.shape
        if n <= width:
            raise TDQError(f"A Frechet distance needs more images than its {width} features; got {n}. Sample more images.")
        values = np.asarray(features, np.float64)
        return cls(values.mean(0), np.cov(values, rowvar=False), n)

    def save(self, path: str | Path) -> None:
        """Write mu, sigma and n as npz (no pickles)."""
        np.savez_compressed(path, mu=self.mu, sigma=self.sigma, n=self.n)

    @classmethod
    def load(cls, path: str | Path = CLASSIFIER / "fashion-mnist-test.npz") -> Self:
        """Read statistics; default: of the 10,000 test images under the shipped classifier."""
        try:
            with np.load(path) as data:
                return cls(data["mu"], data["sigma"], data["n"])
        except Exception as error:  # whatever another kind of file makes of the reader
            raise DataError(f"{path} must hold mu, sigma and n; run python -m tdq_utils train-classifier. {AWAY}") from error


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))`` of two Gaussians, float64 (Heusel et al. 2017).

    With features of the shipped classifier: the FCD, not the FID. Biased by about c (1/n_a + 1/n_b): compare only at equal n."""
    if a.mu.shape != b.mu.shape:
        raise TDQError(f"Both sets must have the same features; got {len(a.mu)} and {len(b.mu)}. Use one classifier.")
    # The trace of a root is the sum of the roots of the eigenvalues; rounding can leave them slightly negative, or complex.
    roots = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).astype(complex)).real
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * roots.sum())


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """``(kernel distance, standard error)`` of two sets of features ``"image feature"`` (KID, Binkowski et al. 2018: unbiased).

    Cubic kernel; the mean over 100 subsets of a tenth of the smaller set, at most 1,000 images; its spread, scaled to the set."""
    size = max(2, min(1000, min(len(features), len(reference)) // 10))
    mean, spread = _measured(KernelInceptionDistance, [(reference, True), (features, False)], seed, subset_size=size)
    return mean, spread * math.sqrt(size / len(features))


def inception_score(scores: Tensor, seed: int = 0) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016) of class scores ``"image class"``: ``(mean, spread)`` over 10 splits."""
    return _measured(InceptionScore, [(scores,)], seed)


def _measured(kind: type[Metric], updates: list[tuple], seed: int, **options: Any) -> tuple[float, float]:
    """Mean and spread by a metric of torchmetrics, of features that are there already."""
    extractor: Any = nn.Identity()
    extractor.num_features = updates[0][0].shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # "will save all extracted features": 64 numbers an image
        torch.manual_seed(seed)
        # Processes measure different rows: their features must not be gathered.
        metric = kind(feature=extractor, sync_on_compute=False, **options).set_dtype(torch.float64)
        for values, *real in updates:
            metric.update(torch.as_tensor(values), *real)
        mean, spread = metric.compute()
    return float(mean), float(spread)


@cache
def reference_features(
    features: str = "classifier", reference: Reference = DEFAULT, device: str | torch.device = "cpu"
) -> Tensor:
    """Features of a reference set (default: the 10,000 test images), float32 ``"image feature"``: what the KID compares with."""
    return extract_features(reference.images(), feature_extractor(features, device)).float()


@cache
def _reference_statistics(features: str, reference: Reference, device: str | torch.device) -> Statistics:
    if (features, reference) == ("classifier", DEFAULT):
        return Statistics.load()
    return Statistics.of(reference_features(features, reference, device))


class Distances:
    """All distances of a stream of images to a reference set and, pair by pair, to full precision. Keeps features alone.

    ``features``: of :func:`feature_extractor`; ``clean``: full-precision images of the same seeds, in the same order, or none;
    ``kernel``: whether the kernel distance and the inception score are wanted beside the Frechet distance; ``reference``:
    default: the test images of Fashion-MNIST; ``device``: where features are extracted."""

    def __init__(self, features: str = "classifier", clean: Tensor | None = None, kernel: bool = True,
                 reference: Reference = DEFAULT, device: str | torch.device = "cpu") -> None:  # fmt: skip
        self.clean, self.kernel, self.extractor = clean, kernel, feature_extractor(features, device)
        self.compared = features, reference, device
        self.frechet = "fcd" if features == "classifier" else "fid"
        self.features, self.errors = list[Tensor](), list[Tensor]()

    def update(self, images: Tensor) -> None:
        """Take in a batch ``"image channel height width"`` in [-1, 1]."""
        if self.clean is not None:
            seen = sum(map(len, self.errors))
            self.errors.append(paired_mse(images, self.clean[seen : seen + len(images)]))
        self.features.append(extract_features(images, self.extractor).float())

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """By name: ``fcd`` (or ``fid``); ``kid``, ``kid_se`` (standard error) and ``inception_score``; and, with pairs, ``mse``,
        ``mse_se`` and ``psnr`` (dB) of pixels. TDQError: not more images than features."""
        features = torch.cat(self.features)
        found = {self.frechet: frechet_distance(Statistics.of(features), _reference_statistics(*self.compared))}
        if self.kernel:
            found["kid"], found["kid_se"] = kernel_distance(features, reference_features(*self.compared))
            scores = self.extractor.scores(features.to(self.compared[2]))
            found["inception_score"], _ = inception_score(scores.cpu())
        if self.errors:
            error = torch.cat(self.errors)
            found |= dict(mse=error.mean().item(), mse_se=(error.std() / len(error) ** 0.5).item())
            found["psnr"] = 10 * torch.log10(4 / error.mean().clamp_min(1e-12)).item()
        return found


def paired_mse(images: Tensor, clean: Tensor) -> Tensor:
    """Mean squared difference to the full-precision image of the same seed, over pixels in [-1, 1]; one value an image."""
    if images.shape != clean.shape:
        raise TDQError(f"Images must pair up, seed by seed; got shapes {tuple(images.shape)} and {tuple(clean.shape)}.")
    return (images.clamp(-1, 1) - clean.clamp(-1, 1)).square().flatten(1).mean(1)
