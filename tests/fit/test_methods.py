"""Every method says what it is, and quantize takes those that say so."""

from tdq_utils import METHODS, NEIGHBOURS
from tdq_utils.fit.calibration import CHOOSERS
from tdq_utils.fit.methods import CALIBRATED, DYNAMIC


def test_each_has_a_sentence_and_a_source():
    assert set(METHODS) == {*CALIBRATED, *DYNAMIC} and set(CALIBRATED) == set(CHOOSERS)
    for text in METHODS.values():
        assert text.endswith(")") and ("standard" in text or "arXiv" in text)
    assert all("(" in text for text in NEIGHBOURS.values())
