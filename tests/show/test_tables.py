"""Tables as a reader wants them."""

import pandas as pd

from tdq_utils.show.tables import headline


def test_headline_rounds_to_two_digits():
    row = dict(method="tdq", weights=8, activations=5, images=256, steps=20, mse=0.012345, fcd=4.5678)
    real = dict(method="real images", weights=None, activations=None, images=256, steps=None, mse=None, fcd=2.0)
    shown = headline(pd.DataFrame([row, real]))
    assert shown.iloc[0].tolist() == ["TDQ", "W8A5", 256, "20", "0.012", "4.6"]
    assert shown.iloc[1].tolist() == ["real images", "-", 256, "-", "-", "2"]
    assert headline(pd.DataFrame([dict(row, weights=0, activations=0)])).bits[0] == "-"
