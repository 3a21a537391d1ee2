"""Images as float tensors in [-1, 1]: the shipped set, a path, a checksummed download."""

import gzip
import hashlib
import lzma
import os
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdq_utils.denoiser.files import beside
from tdq_utils.denoiser.loading import DATA
from tdq_utils.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # as named in its README

# split -> (file stem, images, sha256 of the images, of the labels: both decompressed, so that all kinds of copies pass).
FASHION_MNIST = {
    "test": ("t10k", 10_000, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
             "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    "train-10k": ("train10k", 10_000, "ed2e37ed5a3a57d212141a69fe0a0de5a7126ffba14ac3f7e76f5f52cc04b1f0",
                  "a69f2dad024ca220a8c4d85f621fdf929042d40c444abde2868903e9220ad517"),
    "train": ("train", 60_000, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
              "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
}  # fmt: skip
UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress, "": bytes}  # by ending


def load_images(name: str = "fashion-mnist", split: str = "test", root: str | Path | None = None, download: bool = False,
                labels: bool = False) -> Any:  # fmt: skip
    """Load a data set: images ``"image 1 28 28"`` float32 in [-1, 1]; with ``labels``, also these, ``"image"`` int64.

    Args:
        name: ``"fashion-mnist"`` (Xiao et al. 2017, MIT licence), the one set that ships.
        split: ``"test"`` (10,000, shipped), ``"train-10k"`` (the first 10,000 training images, shipped) or ``"train"``
            (all 60,000, looked for in ``root``, or in Debian's package ``dataset-fashion-mnist`` and the download cache).
        root: folder that holds the official IDX files, plain, .gz or .xz; only it is searched.
        download: fetch a missing official file into the cache (``~/.cache/tdq_utils``).

    DataError: unknown name or split, file not found, or contents with a wrong checksum."""
    if name != "fashion-mnist":
        raise DataError(f"load_images knows 'fashion-mnist'; got {name!r}.")
    if split not in FASHION_MNIST:
        raise DataError(f"split must be one of {', '.join(FASHION_MNIST)}; got {split!r}.")
    stem, count, images_sha, labels_sha = FASHION_MNIST[split]
    raw = _read(f"{stem}-images-idx3-ubyte", root, download, images_sha, offset=16)
    images = torch.from_numpy(raw).view(count, 1, 28, 28).float().div_(127.5).sub_(1)
    if not labels:
        return images
    return images, torch.from_numpy(_read(f"{stem}-labels-idx1-ubyte", root, download, labels_sha, offset=8)).long()


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0..255, the rounding that saved pictures go through."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _read(stem: str, root: str | Path | None, download: bool, sha256: str, offset: int) -> np.ndarray:
    """Bytes of one IDX file after its header, verified."""
    cache = Path(os.environ.get("TDQ_CACHE", Path.home() / ".cache" / "tdq_utils"))
    folders = [Path(root)] if root else [DATA / "fashion-mnist", DEBIAN, cache]
    path = next((path for folder in folders for end in UNPACK if (path := folder / (stem + end)).is_file()), None)
    if path is None and download and not stem.startswith("train10k"):  # the subset is this repository's own
        path = _download(folders[-1] / f"{stem}.gz")
    if path is None:
        where = ", ".join(map(str, folders))
        raise DataError(f"Fashion-MNIST file {stem}[.gz] was not found in {where}. Pass root= with a folder that holds it, "
                        "install Debian's package dataset-fashion-mnist, or pass download=True.")  # fmt: skip
    try:
        raw = UNPACK[path.suffix](path.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is corrupted ({error}); delete it and fetch it again.") from error
    if (digest := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(f"{path} is corrupted: sha256 of its contents must be {sha256}, got {digest}; delete it, fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=offset).copy()


def _download(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside(path) as part:
            urllib.request.urlretrieve(OFFICIAL + path.name, part)
    except OSError as error:
        raise DataError(f"No network for {OFFICIAL}{path.name} ({error}); fetch it elsewhere and pass root=.") from error
    return path
