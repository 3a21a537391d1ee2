"""Images as float tensors in [-1, 1]: the shipped set, a path, a checksummed download."""

import gzip
import hashlib
import lzma
import os
import struct
import urllib.request
from pathlib import Path

import numpy as np
import torch

from tdq_utils.denoiser.loading import DATA
from tdq_utils.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # as named in its README

# split -> (file stem, images, sha256 of the decompressed images, of the decompressed labels).
# The checksums are of the contents, so that plain and compressed copies all pass.
FASHION_MNIST = {
    "test": (
        "t10k",
        10_000,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "train-10k": (
        "train10k",
        10_000,
        "ed2e37ed5a3a57d212141a69fe0a0de5a7126ffba14ac3f7e76f5f52cc04b1f0",
        "a69f2dad024ca220a8c4d85f621fdf929042d40c444abde2868903e9220ad517",
    ),
    "train": (
        "train",
        60_000,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
}

UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress, "": bytes}  # by what a file's name ends with


def load_images(name="fashion-mnist", split="test", root=None, download=False, labels=False):
    """Load a data set as float32 images in [-1, 1].

    Args:
        name: ``"fashion-mnist"`` (Xiao et al. 2017, MIT licence), the one set that ships.
        split: ``"test"`` (10,000, shipped), ``"train-10k"`` (the first 10,000 training images,
            shipped) or ``"train"`` (all 60,000, looked for in ``root``, in Debian's package
            ``dataset-fashion-mnist`` and in the download cache).
        root: folder that holds the official IDX files, plain, .gz or .xz; only it is searched.
        download: fetch a missing official file into the cache (``~/.cache/tdq_utils``).
        labels: return ``(images, labels)`` instead of images alone.

    Returns:
        Tensor ``"image 1 28 28"`` float32; with ``labels`` also a tensor ``"image"`` int64.

    Raises:
        DataError: unknown name or split, file not found, or contents with a wrong checksum.
    """
    if name != "fashion-mnist":
        raise DataError(f"load_images knows 'fashion-mnist'; got {name!r}.")
    if split not in FASHION_MNIST:
        raise DataError(f"split must be one of {', '.join(FASHION_MNIST)}; got {split!r}.")
    stem, count, images_sha, labels_sha = FASHION_MNIST[split]
    raw = _read(f"{stem}-images-idx3-ubyte", root, download, images_sha)
    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).copy())
    images = pixels.view(count, 1, 28, 28).float().div_(127.5).sub_(1)
    if not labels:
        return images
    raw = _read(f"{stem}-labels-idx1-ubyte", root, download, labels_sha)
    return images, torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))


def to_uint8(images):
    """Images in [-1, 1] -> uint8 in 0..255, the rounding that saved pictures go through."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _cache():
    return Path(os.environ.get("TDQ_CACHE", Path.home() / ".cache" / "tdq_utils"))


def _read(stem, root, download, sha256):
    """Decompressed contents of one IDX file, verified."""
    official = not stem.startswith("train10k")  # the subset is this repository's own
    path = _find(stem, root) or (_download(stem, root) if download and official else None)
    if path is None:
        where = root or f"{DATA / 'fashion-mnist'}, {DEBIAN} and {_cache()}"
        raise DataError(
            f"Fashion-MNIST file {stem}[.gz] was not found in {where}. Pass root= with a folder that "
            "holds it, install Debian's package dataset-fashion-mnist, or pass download=True."
        )
    try:
        raw = UNPACK[path.suffix](path.read_bytes())
    except (OSError, EOFError, struct.error, gzip.zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is corrupted ({error}); delete it and fetch it again.") from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != sha256:
        raise DataError(
            f"{path} is corrupted: sha256 of its contents must be {sha256}, got {digest}; delete it and fetch it again."
        )
    return raw


def _find(stem, root):
    folders = [Path(root)] if root else [DATA / "fashion-mnist", DEBIAN, _cache()]
    candidates = (folder / (stem + end) for folder in folders for end in UNPACK)
    return next((path for path in candidates if path.is_file()), None)


def _download(stem, root):
    folder = Path(root) if root else _cache()
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{stem}.gz", folder / f"{stem}.gz.part"
    try:
        urllib.request.urlretrieve(OFFICIAL + path.name, part)
    except OSError as error:
        raise DataError(f"No network for {OFFICIAL}{path.name} ({error}); fetch it elsewhere and pass root=.") from error
    part.replace(path)
    return path
