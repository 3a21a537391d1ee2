"""Files from anybody: they are refused with a message, and nothing in them runs, is followed or fills the memory."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tdq_utils as tdq
from tdq_utils.errors import DataError
from tdq_utils.fit.loop import state_path
from tdq_utils.lab import datasets, fid

ROOT = Path(__file__).parents[1]


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def saved(calibrated, tmp_path):
    """A saved model, to be tampered with."""
    tdq.save_quantized(calibrated("tdq"), tmp_path / "saved")
    return tmp_path / "saved"


def tampered(folder, **changes):
    path = folder / "quantization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


READERS = {"profile": tdq.Profile.load, "set": tdq.CalibrationSet.load, "statistics": fid.Statistics.load}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["pickle", "objects", "huge shape", "bare array"])
def test_arrays_with_pickles_or_beyond_memory_are_refused(read, kind, tmp_path):
    path, trap = tmp_path / "file.npz", Trap(tmp_path / "ran")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif kind == "objects":
        names = (
            "layers",
            "t",
            "least",
            "greatest",
            "mean",
            "std",
            "counts",
            "limit",
            "x_t",
            "seeds",
            "model",
            "mu",
            "sigma",
            "n",
        )
        np.savez(path, **{name: np.array([trap], dtype=object) for name in names})
    elif kind == "bare array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000, 10000000), }"
        array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with __import__("zipfile").ZipFile(path, "w") as opened:
            for name in ("counts", "x_t", "mu", "layers", "t", "seeds", "model"):
                opened.writestr(f"{name}.npy", array)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_a_model_as_a_pickle_runs_nothing(unet, scheduler, tmp_path):
    unet.save_pretrained(tmp_path / "model" / "unet")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    (weights,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save(Trap(tmp_path / "ran"), tmp_path / "model" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be read"):
        tdq.load_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_the_state_of_a_training_as_a_pickle_runs_nothing(unet, tmp_path):
    from tdq_utils.fit.loop import Trainer

    torch.save(Trap(tmp_path / "ran"), tmp_path / "state.pt")
    trainer = Trainer(unet, torch.optim.SGD(unet.parameters()), 0.9, tmp_path / "state.pt")
    with pytest.raises(DataError, match=r"must be a state of this training"):
        trainer.run(lambda generator: torch.zeros(()), lambda i: 1.0, 1, 0, "", progress=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["quantization.json", "tensors"])
def test_links_out_of_a_folder_are_not_followed(name, saved, tmp_path):
    path = saved / name if name.endswith("json") else next(saved.glob("*.safetensors"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"must hold its files itself; .* leads to .*elsewhere. Copy the file there"):
        tdq.load_quantized(saved)


def test_names_out_of_a_folder_are_not_followed(saved, tmp_path):
    (tensors,) = saved.glob("*.safetensors")
    tensors.rename(tmp_path / tensors.name)
    tampered(saved, tensors=f"../{tensors.name}")
    with pytest.raises(DataError, match=re.escape(str(saved))):
        tdq.load_quantized(saved)


HOSTILE = {
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "not text": "\udcff",
    "many digits": '{"format": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused(text, saved, tmp_path):
    (saved / "quantization.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="must hold a JSON|must be settings as JSON"):
        tdq.load_quantized(saved)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").touch()
    (tmp_path / "run" / "settings.json").write_bytes((saved / "quantization.json").read_bytes())
    with pytest.raises(tdq.TDQError):
        state_path(tmp_path / "run", {"seed": 0})


def test_enormous_json_is_not_read(saved):
    os.truncate(saved / "quantization.json", 2**33)  # a hole: it takes no place
    with pytest.raises(DataError, match=f"it has {2**33} bytes, more than"):
        tdq.load_quantized(saved)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model="utils"), dict(model="DDIMPipeline"), dict(model="__file__"), dict(model=3), dict(model=None),
        dict(config=[]), dict(config=None), dict(config={"block_out_channels": [2**20, 2**20]}), dict(config={"sample_size": {}}),
        dict(layers=3), dict(layers={}), dict(keep=3), dict(weights="8"), dict(weights=10**30), dict(method=["tdq"]),
        dict(dtype="load"), dict(dtype=3), dict(tensors=3), dict(tensors=""), dict(sha256=3), dict(format="1"), dict(visited=3),
        dict(balance=["range"]), dict(split_skips={}), dict(frozen="yes please", packed=True),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_wrong_types_and_sizes_are_refused(changes, saved):
    if "visited" in changes or "split_skips" in changes:
        changes |= dict(weights_per=3)
    tampered(saved, **changes)
    with pytest.raises(DataError, match=re.escape(str(saved))):
        tdq.load_quantized(saved)


@pytest.mark.parametrize("step", [{"depth": 10**9}, {"hidden": 10**9}, {"width": 10**12}, {"kind": "Trap"}, {"kind": ["x"]}])
def test_generators_of_any_size_are_refused(step, saved):
    layers = json.loads((saved / "quantization.json").read_text())["layers"]
    for layer in layers.values():
        layer["step"] |= step
    tampered(saved, layers=layers)
    with pytest.raises(DataError, match=re.escape(str(saved))):
        tdq.load_quantized(saved)


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "a gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "offsets beyond the file": (h := b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}')
    and struct.pack("<Q", len(h)) + h,
    "empty": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_hostile_headers_of_safetensors_are_refused(content, saved, unet, scheduler, tmp_path):
    (tensors,) = saved.glob("*.safetensors")
    tensors.write_bytes(content)
    tampered(saved, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match=re.escape(str(saved))):
        tdq.load_quantized(saved)
    tdq.restore(unet)
    unet.save_pretrained(tmp_path / "model" / "unet")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    next((tmp_path / "model" / "unet").glob("*.safetensors")).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        tdq.load_model(tmp_path / "model")


def archive(folder, monkeypatch, members):
    """CIFAR-10's archive with these members, whose checksum passes."""
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        for member, content in members:
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(datasets, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    return member, b""


TEST = "cifar-10-batches-bin/test_batch.bin"


@pytest.mark.parametrize("kind", ["link", "hard link", "device", "folder", "too large"])
def test_members_that_are_no_files_are_refused(kind, tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(bytes(3073))
    member = {
        "link": link(TEST, tmp_path / "secret"),
        "hard link": link(TEST, tmp_path / "secret", tarfile.LNKTYPE),
        "device": link(TEST, "", tarfile.CHRTYPE),
        "folder": link(TEST, "", tarfile.DIRTYPE),
        "too large": (tarfile.TarInfo(TEST), bytes(10_001 * 3073)),
    }[kind]
    archive(tmp_path, monkeypatch, [member])
    with pytest.raises(DataError, match="must hold CIFAR-10's binary files"):
        tdq.load_images("cifar10", root=tmp_path)


def test_an_archive_is_read_and_never_unpacked(tmp_path, monkeypatch):
    """Its other members lead out of the folder, over a file, and into links; nothing of them appears."""
    (tmp_path / "root").mkdir()
    (tmp_path / "precious").write_text("mine")
    evil = [
        (tarfile.TarInfo(name), b"evil") for name in ("../precious", str(tmp_path / "precious"), "cifar-10-batches-bin/../../x")
    ]
    rows = (tarfile.TarInfo(TEST), bytes([3]) + bytes(3072))
    archive(tmp_path / "root", monkeypatch, [*evil, link("out", tmp_path), (tarfile.TarInfo("out/y"), b"evil"), rows])
    before = sorted(tmp_path.rglob("*"))
    images, labels = tdq.load_images("cifar10", root=tmp_path / "root", labels=True)
    assert images.shape == (1, 3, 32, 32) and labels.tolist() == [3]
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "precious").read_text() == "mine"


def test_a_picture_that_claims_to_be_enormous_is_refused(tmp_path):
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="cannot be read as a picture"):
        tdq.load_images(tmp_path)


def test_nothing_unpickles_or_unpacks():
    """From the code itself: every ``torch.load`` says ``weights_only=True``; no pickles, no unpacking over paths."""
    for path in (ROOT / "tdq_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called != "torch.load" or given.get("weights_only") == "True", path
                assert "allow_pickle" not in given and called.split(".")[-1] not in ("extractall", "extract"), path
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & set(names), path
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        assert not re.search(r"torch\.load\((?!.*weights_only=True)|allow_pickle|import pickle", path.read_text()), path
