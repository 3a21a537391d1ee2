"""Tables as a reader wants them."""

import pandas as pd

from tdq_utils.show.names import NAMES


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The table of a comparison: setting, bits, images, steps, distances to two significant digits."""
    bits = [f"W{w:.0f}A{a:.0f}" if w and w == w else "-" for w, a in zip(table.weights, table.activations, strict=True)]
    return pd.DataFrame(
        {
            "intervals": [NAMES.get(method, method) for method in table.method],
            "bits": bits,
            "images": table.images,
            "steps": [f"{s:.0f}" if s == s else "-" for s in table.steps],
            "distance to full precision": [f"{v:.2g}" if v == v else "-" for v in table.mse],
            "FCD": [f"{v:.2g}" for v in table.fcd],
        }
    )
