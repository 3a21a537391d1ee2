"""Images as float tensors in [-1, 1]: the shipped set, a path, a checksummed download."""

import gzip
import hashlib
import lzma
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdq_utils.denoiser.files import beside
from tdq_utils.denoiser.loading import AWAY, DATA
from tdq_utils.errors import DataError, checked_path

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


# name -> the split that distances compare with, another that shows what as many real images get, and what is trained on
SPLITS = {"fashion-mnist": ("test", "train-10k", "train-10k"), "cifar10": ("train", "test", "train")}

CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as its page says
CIFAR_FILES = {"test": ["test_batch"], "train-10k": ["data_batch_1"], "train": [f"data_batch_{i}" for i in range(1, 6)]}
PICTURES = (".png", ".jpg", ".jpeg")


def load_images(name: str | Path = "fashion-mnist", split: str = "test", root: str | Path | None = None, download: bool = False,
                labels: bool = False) -> Any:  # fmt: skip
    """Load a data set: images ``"image channel height width"`` float32 in [-1, 1]; with ``labels``, also these, int64.

    Args:
        name: ``"fashion-mnist"`` (Xiao et al. 2017, MIT licence; ``1 28 28``), of which a part ships; ``"cifar10"`` (Krizhevsky
            2009; ``3 32 32``), from the official binary archive; or a folder of PNG or JPEG pictures, all grey or all RGB, of
            one size, sorted by path, whose labels are the numbers of the folders that they lie in.
        split: ``"test"`` (10,000), ``"train-10k"`` (the first 10,000 training images) or ``"train"`` (60,000, or CIFAR's 50,000).
            Of Fashion-MNIST the first two ship; the third is looked for in ``root``, or in Debian's package
            ``dataset-fashion-mnist`` and the cache. Of a folder: that subfolder; or all, if it has neither of them.
        root: folder that holds the official files (IDX: plain, .gz or .xz; or the archive); only it is searched.
        download: fetch a missing official file into the cache (``~/.cache/tdq_utils``).

    DataError: unknown name or split, file not found, contents with a wrong checksum, pictures that are not alike."""
    root = None if root is None else checked_path(root)
    if str(name) not in SPLITS and not checked_path(name).is_dir():
        raise DataError(f"load_images knows {', '.join(map(repr, SPLITS))}, and folders of pictures; got {str(name)!r}.")
    if split not in tuple(FASHION_MNIST):
        raise DataError(f"split must be one of {', '.join(FASHION_MNIST)}; got {split!r}.")
    classes: np.ndarray | None
    if str(name) not in SPLITS:
        if root or download:
            raise DataError("root and download are for sets that are known by name; a folder of pictures is named alone.")
        raw, classes = _read_pictures(Path(name), split)
    elif name == "cifar10":
        raw, classes = _read_cifar(split, root, download)
    else:
        stem, count, images_sha, labels_sha = FASHION_MNIST[split]
        raw = _read(f"{stem}-images-idx3-ubyte", root, download, images_sha, offset=16).reshape(count, 1, 28, 28)
        classes = _read(f"{stem}-labels-idx1-ubyte", root, download, labels_sha, offset=8) if labels else None
    images = torch.from_numpy(raw).float().div_(127.5).sub_(1)
    return (images, torch.from_numpy(classes).long()) if labels else images


def splits_of(name: str | Path) -> tuple[str, str | None, str]:
    """Of a data set: the split that distances compare with; another, if there is one, of real images; the one to train on."""
    if str(name) in SPLITS:
        return SPLITS[str(name)]
    return "train", "test" if (Path(name) / "test").is_dir() else None, "train"


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0..255, the rounding that saved pictures go through."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _cache() -> Path:
    return Path(os.environ.get("TDQ_CACHE", Path.home() / ".cache" / "tdq_utils"))


def _read_cifar(split: str, root: str | Path | None, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """``(images, labels)`` from the archive, which is read where it lies: nothing of it is unpacked, and nothing is a pickle."""
    path = (Path(root) if root else _cache()) / CIFAR.rpartition("/")[2]
    if not path.is_file() and download:
        _download(path, CIFAR)
    if not path.is_file():
        raise DataError(
            f"{path.name} was not found in {path.parent}. Pass root= with the folder that holds it, or download=True."
        )
    with open(path, "rb") as file:
        if (digest := hashlib.file_digest(file, "md5").hexdigest()) != CIFAR_MD5:
            raise DataError(f"{path} is corrupted: its md5 must be {CIFAR_MD5}, got {digest}; delete it, fetch it again.")
    try:
        with tarfile.open(path) as archive:
            members = [archive.getmember(f"cifar-10-batches-bin/{stem}.bin") for stem in CIFAR_FILES[split]]
            if odd := [m.name for m in members if not m.isfile() or m.size > 10_000 * (1 + 3 * 32 * 32)]:
                raise ValueError(f"{odd[0]} is no file, or larger than 10,000 images")
            files = [archive.extractfile(member).read() for member in members]
        rows = np.frombuffer(b"".join(files), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, then the planes
        if rows[:, 0].max() > 9:
            raise ValueError(f"a label must be from 0 to 9; got {rows[:, 0].max()}")
    except (OSError, EOFError, KeyError, ValueError, AttributeError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} must hold CIFAR-10's binary files ({error}); delete it and fetch it again.") from error
    return rows[:, 1:].reshape(-1, 3, 32, 32).copy(), rows[:, 0].copy()


def _read_pictures(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """``(images, labels)`` of a folder of pictures."""
    from PIL import Image  # only here

    parts = [part for part in ("train", "test") if (folder / part).is_dir()]
    folder = folder / split.removesuffix("-10k") if parts else folder
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise DataError(f"{folder} must hold pictures, {', '.join(PICTURES)}; it holds none.")
    paths, found = paths[:10_000] if split == "train-10k" else paths, list[np.ndarray]()
    for path in paths:
        try:
            with Image.open(path) as picture:
                mode, pixels = picture.mode, np.asarray(picture)
        except Exception as error:  # also of kinds of its own: a picture that claims to be enormous
            raise DataError(f"{path} cannot be read as a picture ({error}); delete it, or write it again.") from error
        if mode not in ("L", "RGB"):
            raise DataError(f"Pictures must be grey (L) or RGB; {path} is {mode}. Convert it: picture.convert('RGB').")
        if found and pixels.shape != found[0].shape:
            raise DataError(f"Pictures must be of one size and kind; {paths[0]} is {found[0].shape}, {path} {pixels.shape}. "
                            "Crop or resize them first.")  # fmt: skip
        found.append(pixels)
    homes = sorted({path.parent for path in paths})
    images = np.stack(found).reshape(len(found), *found[0].shape[:2], -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.array([homes.index(path.parent) for path in paths])


def _read(stem: str, root: str | Path | None, download: bool, sha256: str, offset: int) -> np.ndarray:
    """Bytes of one IDX file after its header, verified."""
    folders = [Path(root)] if root else [DATA / "fashion-mnist", DEBIAN, _cache()]
    path = next((path for folder in folders for end in UNPACK if (path := folder / (stem + end)).is_file()), None)
    if path is None and download and not stem.startswith("train10k"):  # the subset is this repository's own
        path = _download(folders[-1] / f"{stem}.gz", f"{OFFICIAL}{stem}.gz")
    if path is None:
        where = ", ".join(map(str, folders))
        raise DataError(f"Fashion-MNIST file {stem}[.gz] was not found in {where}. Pass root= with a folder that holds it, "
                        f"install Debian's package dataset-fashion-mnist, or pass download=True. {AWAY}")  # fmt: skip
    try:
        raw = UNPACK[path.suffix](path.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is corrupted ({error}); delete it and fetch it again.") from error
    if (digest := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(f"{path} is corrupted: sha256 of its contents must be {sha256}, got {digest}; delete it, fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=offset).copy()


def _download(path: Path, url: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside(path) as part:
            urllib.request.urlretrieve(url, part)
    except OSError as error:
        raise DataError(f"No network for {url} ({error}); fetch it elsewhere and pass root=.") from error
    return path
