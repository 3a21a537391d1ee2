"""What every fitted model must do."""

import pytest
import torch

from tdq_utils import freeze, load_quantized, restore, save_quantized


@pytest.fixture
def comes_back(unet, scheduler, tmp_path):
    """Called on the fitted ``unet``: frozen, and read from disk, it predicts the same; then it is the one that went in."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    def check():
        x = torch.randn(2, 1, 8, 8)
        expected = unet(x, 999).sample
        freeze(unet, scheduler, 4)
        assert torch.equal(unet(x, 999).sample, expected)
        save_quantized(unet, tmp_path)
        assert torch.equal(load_quantized(tmp_path)(x, 999).sample, expected)
        restore(unet)
        after = unet.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())

    return check
