"""Tables of the tiny model."""

import pytest
import torch

from tdq_utils.lab import reproduce as module
from tdq_utils.lab.tables import ptq


class Pixels:
    """Stands for distances of the classifier's features, which need 28x28 images and more of them than features."""

    frechet = "fcd"

    def __init__(self, features, clean=None, kernel=True, reference=None, device="cpu"):
        self.images, self.clean = [], clean

    def update(self, images):
        self.images.append(images)

    def compute(self):
        images = torch.cat(self.images)
        found = dict(fcd=images.square().mean().item(), kid=0.0, kid_se=0.0, inception_score=1.0, mse_se=0.0, psnr=0.0)
        return found if self.clean is None else found | dict(mse=(images - self.clean).square().mean().item())


@pytest.fixture
def small(monkeypatch):
    """Rows of few 8x8 images, calibrated on few."""
    monkeypatch.setattr(module, "Distances", Pixels)
    monkeypatch.setattr(ptq, "CALIBRATION", 4)
    monkeypatch.setattr(module.Workbench, "check", lambda bench, jobs: None)
