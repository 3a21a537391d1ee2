"""Images from the shipped files, from a folder and by download; damaged and missing files."""

import gzip
import hashlib
import io
import lzma
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tdq_utils import load_images
from tdq_utils.errors import DataError
from tdq_utils.lab import datasets
from tdq_utils.lab.datasets import splits_of, to_uint8

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
    with pytest.raises(DataError, match="'fashion-mnist', 'cifar10', and folders of pictures; got 'mnist'"):
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


RECORDS = {stem: np.random.default_rng(i).integers(0, 10, (4, 3073), dtype=np.uint8) for i, stem in enumerate(
    ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))])}  # fmt: skip


def archive(records, folder="cifar-10-batches-bin"):
    """The bytes of an archive like CIFAR-10's."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for stem, rows in records.items():
            entry = tarfile.TarInfo(f"{folder}/{stem}.bin")
            entry.size = rows.size
            tar.addfile(entry, io.BytesIO(rows.tobytes()))
    return out.getvalue()


@pytest.fixture
def cifar(tiny, monkeypatch):
    """``cifar(bytes)``: a folder with an archive that passes for the official one."""

    def write(contents, known=True):
        (tiny / "cifar-10-binary.tar.gz").write_bytes(contents)
        if known:
            monkeypatch.setattr(datasets, "CIFAR_MD5", hashlib.md5(contents).hexdigest())
        return tiny

    return write


def test_cifar_from_its_archive(cifar):
    root = cifar(archive(RECORDS))
    images, labels = load_images("cifar10", "train", root=root, labels=True)
    rows = np.concatenate([RECORDS[f"data_batch_{i}"] for i in range(1, 6)])
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == rows[:, 0].tolist()
    np.testing.assert_array_equal(to_uint8(images).numpy().reshape(20, -1), rows[:, 1:])
    assert torch.equal(load_images("cifar10", "train-10k", root=root), images[:4])
    assert len(load_images("cifar10", root=root)) == 4
    assert [path.name for path in root.iterdir()] == ["cifar-10-binary.tar.gz"]  # nothing was unpacked


@pytest.mark.parametrize(("contents", "message"), [
    (archive(RECORDS, folder="elsewhere"), "must hold CIFAR-10's binary files"), (b"no archive", "must hold CIFAR-10's binary"),
    (archive({**RECORDS, "test_batch": np.zeros((1, 3000), np.uint8)}), "must hold CIFAR-10's binary files"),
    (archive({**RECORDS, "test_batch": np.full((2, 3073), 10, np.uint8)}), "a label must be from 0 to 9; got 10"),
    (archive(RECORDS)[:-200], "must hold CIFAR-10's binary files"),
])  # fmt: skip
def test_an_archive_of_something_else(cifar, contents, message):
    with pytest.raises(DataError, match=message):
        load_images("cifar10", root=cifar(contents))


def test_an_archive_with_another_checksum_is_not_read(cifar):
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is corrupted: its md5 must be c32a1d4ab5d03f1284b67883e8d87530"):
        load_images("cifar10", root=cifar(archive(RECORDS), known=False))


def test_cifar_is_downloaded_once(tiny, cifar, monkeypatch):
    contents, fetched = archive(RECORDS), []
    cifar(contents)
    monkeypatch.setattr("urllib.request.urlretrieve", lambda url, path: fetched.append(url) or path.write_bytes(contents))
    with pytest.raises(DataError, match=r"was not found in .*cache. Pass root=.*download=True"):
        load_images("cifar10")
    for _ in range(2):
        assert len(load_images("cifar10", download=True)) == 4
    assert fetched == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]


def pictures(folder, n, mode="RGB", size=(6, 5), end="png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size[1], size[0], *([3] if mode == "RGB" else [])), dtype=np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{i}.{end}")
    return pixels


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_pictures(tmp_path, mode):
    pixels = np.concatenate([pictures(tmp_path / name, 2, mode, seed=i) for i, name in enumerate(("cats", "dogs"))])
    (tmp_path / "cats" / "notes.txt").write_text("no picture")
    images, labels = load_images(tmp_path, labels=True)
    assert images.shape == (4, len(mode), 5, 6) and labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(to_uint8(images).permute(0, 2, 3, 1).numpy().reshape(pixels.shape), pixels)
    assert torch.equal(load_images(tmp_path, "train"), images)  # one set, whatever the split


def test_a_folder_with_splits(tmp_path):
    pictures(tmp_path / "train", 3)
    assert splits_of(tmp_path) == ("train", None, "train")
    pictures(tmp_path / "test", 2, end="jpg")
    assert splits_of(tmp_path) == ("train", "test", "train")
    assert [len(load_images(tmp_path, split)) for split in ("train", "train-10k", "test")] == [3, 3, 2]


@pytest.mark.parametrize(("other", "message"), [
    (dict(size=(7, 5)), "must be of one size and kind"), (dict(mode="L"), "must be of one size and kind"),
])  # fmt: skip
def test_pictures_that_are_not_alike(tmp_path, other, message):
    pictures(tmp_path / "a", 1)
    pictures(tmp_path / "b", 1, **other)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


def test_pictures_that_are_none(tmp_path):
    with pytest.raises(DataError, match="must hold pictures, .png, .jpg, .jpeg; it holds none"):
        load_images(tmp_path)
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    with pytest.raises(DataError, match=r"must be grey \(L\) or RGB; .*clear.png is RGBA. Convert it"):
        load_images(tmp_path)
    (tmp_path / "clear.png").write_bytes((tmp_path / "clear.png").read_bytes()[:40])
    with pytest.raises(DataError, match="clear.png cannot be read as a picture"):
        load_images(tmp_path)
    with pytest.raises(DataError, match="root and download are for sets that are known by name"):
        load_images(tmp_path, root=tmp_path)
