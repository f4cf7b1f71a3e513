"""Our safetensors against files and numbers of the reference library, and against broken files."""

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from data import UserError
from diffusion import VAE
from unix import DTYPES, load_vae, read_safetensors, save_vae, write_safetensors


def test_every_dtype_of_the_reference_file():
    want = np.load(GOLDEN / "safetensors" / "mixed.npz")
    got = read_safetensors(GOLDEN / "safetensors" / "mixed.safetensors")
    assert {k.replace("/", "__") for k in got} == set(want.files)
    for k, v in got.items():
        np.testing.assert_array_equal(v.float().numpy(), want[k.replace("/", "__")])
    assert got["bf16"].dtype == torch.bfloat16 and got["empty"].shape == (0, 4)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_what_is_written_is_read_back(tmp_path, dtype):
    raw = torch.arange(1, 49, dtype=torch.uint8)
    whole = raw % 2 if dtype == torch.bool else raw
    t = whole.view(dtype).reshape(2, -1) if dtype != torch.bool else whole.bool().reshape(2, -1)
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)
    write_safetensors({"t": t, "odd": odd, "part": t[:, :1], "none": torch.empty(0, 3)},
                      tmp_path / "a.safetensors", {"note": "é"})
    got = read_safetensors(tmp_path / "a.safetensors")
    assert got["t"].dtype == dtype and got["t"].shape == t.shape
    assert torch.equal(got["t"].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
    assert torch.equal(got["part"].contiguous().view(torch.uint8),
                       t[:, :1].contiguous().view(torch.uint8))
    assert torch.equal(got["odd"], odd) and got["none"].shape == (0, 3)


def test_the_layout_of_a_written_file(tmp_path):
    """8 bytes of length, a JSON header padded to 8, metadata of strings, then the bytes."""
    write_safetensors({"b": torch.ones(2, 2), "a": torch.zeros(3, dtype=torch.int64)},
                      tmp_path / "a.safetensors", {"note": "x"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    assert n % 8 == 0 and header["__metadata__"] == {"format": "pt", "note": "x"}
    assert header["a"] == {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}
    assert header["b"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [24, 40]}
    assert np.frombuffer(raw[8 + n + 24:], np.float32).tolist() == [1, 1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]     # no temporary file is left


def broken(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"1234", b"\xff" * 8, b"\xff" * 7 + b"\x7f", broken(b"{not json", b"12345678"), broken(b"[1]"),
    broken({"a": ENTRY}), broken({"a": ENTRY}, b"1234"),
    broken({"a": {**ENTRY, "shape": [3]}}, b"12345678"),
    broken({"a": {**ENTRY, "shape": [-2]}}, b"12345678"),
    broken({"a": {**ENTRY, "data_offsets": [-8, 0]}}, b"12345678"),
    broken({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678"),
    broken({"a": {**ENTRY, "dtype": "F31"}}, b"12345678"),
    broken({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"), broken({"a": 3}, b"12345678"),
    broken({"a": {**ENTRY, "data_offsets": "07"}}, b"12345678"),
    broken({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012"),     # overlap
    broken({"a": ENTRY, "b": ENTRY}, b"12345678"),
    broken({"a": {**ENTRY, "data_offsets": [0, 2**70]}}, b"12345678"),
    broken({"a": {**ENTRY, "shape": [0, 2**70], "data_offsets": [0, 0]}}, b"12345678")])
def test_a_cut_or_lying_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="a.safetensors"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="a.safetensors"):
        read_safetensors(tmp_path / "a.safetensors")


def test_autoencoder_files(tmp_path):
    """CompVis .ckpt with its loss.* keys; a file that is none is named; no code in it is run."""
    vae = load_vae(GOLDEN / "A" / "vae.ckpt")
    assert vae.factor == 16 and vae.scale == 0.238092
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"nonsense")

    class Evil:
        def __reduce__(self):
            return (print, ("code of a checkpoint was run",))
    torch.save({"state_dict": Evil()}, tmp_path / "c.ckpt")
    for name in "abc":
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            load_vae(tmp_path / f"{name}.ckpt")


def test_groups_of_an_autoencoders_norms_survive_saving(tmp_path):
    sizes = dict(ch=32, mult=[1, 1], blocks=1, attn=[], z=4, embed=4)
    vae, pixels = VAE(**sizes, groups=8).eval(), torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
    save_vae(vae, tmp_path)
    with torch.no_grad():
        want = vae.moments(pixels)
        assert torch.equal(load_vae(tmp_path / "model.safetensors").moments(pixels), want)
        (tmp_path / "config.json").write_text("{}")
        assert not torch.allclose(load_vae(tmp_path / "model.safetensors").moments(pixels), want)
