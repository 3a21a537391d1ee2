"""Images from the shipped files, from a folder and by download; damaged and missing files."""

import gzip
import hashlib
import lzma

import numpy as np
import pytest
import torch

from tdq_utils import load_images
from tdq_utils.errors import DataError
from tdq_utils.lab import datasets
from tdq_utils.lab.datasets import to_uint8

IMAGES, LABELS = "tiny-images-idx3-ubyte", "tiny-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
IMAGES_RAW, LABELS_RAW = bytes(16) + PIXELS.tobytes(), bytes(8) + bytes([7, 0, 9])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Three images stand for the split "train"; nothing but this empty folder is searched by default."""
    checksums = (hashlib.sha256(raw).hexdigest() for raw in (IMAGES_RAW, LABELS_RAW))
    monkeypatch.setitem(datasets.FASHION_MNIST, "train", ("tiny", 3, *checksums))
    monkeypatch.setattr(datasets, "DATA", tmp_path / "data")
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("TDQ_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("split", ["test", "train-10k"])
def test_shipped_split(split):
    images, labels = load_images("fashion-mnist", split=split, labels=True)
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.dtype == torch.int64
    assert (labels.bincount(minlength=10) > 900).all() and len(labels) == 10_000


@pytest.mark.parametrize(("end", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_folder_with_plain_or_compressed_files(tiny, end, pack):
    (tiny / (IMAGES + end)).write_bytes(pack(IMAGES_RAW))
    (tiny / (LABELS + end)).write_bytes(pack(LABELS_RAW))
    images, labels = load_images(split="train", root=tiny, labels=True)
    np.testing.assert_allclose(images.numpy(), PIXELS / 127.5 - 1, atol=1e-6)
    assert labels.tolist() == [7, 0, 9]


def flipped(raw):
    return raw[:400] + bytes([raw[400] ^ 1]) + raw[401:]


@pytest.mark.parametrize(
    ("end", "contents"),
    [
        ("", flipped(IMAGES_RAW)),
        ("", IMAGES_RAW[:-1]),
        (".gz", flipped(gzip.compress(IMAGES_RAW))),
        (".gz", gzip.compress(IMAGES_RAW)[:-100]),
        (".gz", gzip.compress(flipped(IMAGES_RAW))),
        (".gz", b"<html>not found</html>"),
        (".xz", lzma.compress(IMAGES_RAW)[:-100]),
        (".xz", b"<html>not found</html>"),
    ],
    ids=["flipped", "truncated", "flipped-gz", "truncated-gz", "gz-of-flipped", "not-gz", "truncated-xz", "not-xz"],
)
def test_damaged_file_is_named(tiny, end, contents):
    (tiny / (IMAGES + end)).write_bytes(contents)
    with pytest.raises(DataError, match=f"{IMAGES + end} is corrupted.*delete it"):
        load_images(split="train", root=tiny)


def test_unknown_name_and_split_list_what_there_is():
    with pytest.raises(DataError, match="'fashion-mnist'; got 'mnist'"):
        load_images("mnist")
    with pytest.raises(DataError, match="test, train-10k, train; got 'validation'"):
        load_images(split="validation")


@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_missing_file_says_what_to_do(tiny, root):
    with pytest.raises(DataError, match=r"root=.*dataset-fashion-mnist.*download=True"):
        load_images(split="train", root=root and tiny / root)


def test_download_goes_to_the_cache_once(tiny, monkeypatch):
    fetched = []

    def urlretrieve(url, path):
        fetched.append(url)
        path.write_bytes(gzip.compress(IMAGES_RAW))

    monkeypatch.setattr("urllib.request.urlretrieve", urlretrieve)
    first = load_images(split="train", download=True)
    assert torch.equal(first, load_images(split="train", download=True))
    assert fetched == [f"{datasets.OFFICIAL}{IMAGES}.gz"]
    assert [path.name for path in (tiny / "cache").iterdir()] == [f"{IMAGES}.gz"]


def test_download_without_network(tiny, monkeypatch):
    def urlretrieve(url, path):
        path.write_bytes(b"half a fi")
        raise OSError("unreachable")

    monkeypatch.setattr("urllib.request.urlretrieve", urlretrieve)
    with pytest.raises(DataError, match=r"No network for .*tiny-images.*unreachable.*root="):
        load_images(split="train", download=True)
    assert not (tiny / "cache" / f"{IMAGES}.gz").exists()  # the half that came is not taken for the file


def test_to_uint8_inverts_the_scaling_and_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
