"""Files: safetensors against the reference library, checkpoints of other programs, config.json;
and all of them broken, lying or malicious."""

import copy
import io
import json
import os
import pickle
import subprocess
import zipfile
from itertools import product

import numpy as np
import pytest
import torch

from conftest import GOLDEN, small_config
from data import UserError
from diffusion import VAE
from unix import (DTYPES, JsonFile, TensorUnpickler, UniX, infer_config, load_rad_dino, load_vae,
                  read_safetensors, read_tensors, read_weights, save_vae, write_safetensors)


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


def test_tensors_at_odd_offsets_are_read(tmp_path):
    """Other programs need not pad the header: then no tensor lies at a multiple of its size."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for pad in range(4):
        raw = (len(text) + pad).to_bytes(8, "little") + text + b" " * pad
        (tmp_path / "a.safetensors").write_bytes(raw + np.float32([1, 2]).tobytes())
        assert read_safetensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 2]


def broken(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"1234", b"\xff" * 8, b"\xff" * 7 + b"\x7f", broken(b"{not json", b"12345678"),
    broken(b"[1]"),
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


# ---------------------------------------------------------------- checkpoints

class Does:
    """Pickled, it is a call of a function of the file's choice."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def foreign_checkpoint(path, monkeypatch, legacy: bool, protocol=2) -> dict:
    """A Lightning 1.x checkpoint: beside the tensors the classes of callbacks, objects with a
    state, subclasses of list and dict, functions. The classes are gone when it is read."""
    names = {}

    def foreign(name, *bases, **inside):
        names[name] = type(name, bases, {"__module__": __name__, **inside})
        monkeypatch.setitem(globals(), name, names[name])
        return names[name]
    state = {"encoder.w": torch.arange(6.).view(2, 3), "b": torch.ones(2, dtype=torch.float16),
             "p": torch.nn.Parameter(torch.tensor([3.0])), "view": torch.arange(9.)[2:5:2]}
    callback = foreign("Checkpoint")()
    callback.best, callback.other = 0.5, [callback]
    many = foreign("Many", list)([1, 2])
    mapping = foreign("Mapping", dict)(a=1)
    content = {"state_dict": torch.nn.Module().state_dict() | state, "epoch": 3,
               "callbacks": {names["Checkpoint"]: {"best": 0.5}, "made": callback},
               "hyper_parameters": [many, mapping, {1, 2}, os.path.join, b"bytes", 1 + 2j]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    for name in names:
        monkeypatch.delitem(globals(), name)
    return state


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("error")
def test_tensors_of_a_checkpoint_with_foreign_classes(tmp_path, monkeypatch, legacy, protocol):
    want = foreign_checkpoint(tmp_path / "a.ckpt", monkeypatch, legacy, protocol)
    got = read_tensors(tmp_path / "a.ckpt")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in want.items())
    assert all(type(v) is torch.Tensor and not v.requires_grad for v in got.values())


@pytest.mark.parametrize("legacy", [False, True])
def test_torchs_older_format_is_read(tmp_path, legacy):
    want = VAE(ch=32, mult=[1, 1], blocks=1, attn=[], z=4, embed=4)
    torch.save({"state_dict": want.state_dict()}, tmp_path / "a.ckpt",
               _use_new_zipfile_serialization=not legacy)
    got = load_vae(tmp_path / "a.ckpt")
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in got.state_dict().items())


def attacks(made):
    """Objects that would create the file `made` if reading them ran any code of theirs."""
    code = f"open({str(made)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Does(os.system, f"touch {made}"), inner)
    yield "system", Does(os.system, f"touch {made}")
    yield "eval", Does(eval, code)
    yield "exec", Does(exec, code)
    yield "open", Does(open, str(made), "w")
    yield "popen", Does(subprocess.Popen, ["touch", str(made)])
    yield "getattr", Does(getattr, Does(__import__, "os"), "system")
    yield "nested load", Does(torch.storage._load_from_bytes, inner.getvalue())
    yield "torch.load", Does(torch.load, str(made) + ".inner")
    yield "torch.save", Does(torch.save, 1, str(made))
    yield "hub", Does(torch.hub.load_state_dict_from_url, f"file://{made}")
    yield "numpy", Does(np.save, str(made), 1)
    yield "method", Does(made.write_text, "x")
    yield "call of a result", Does(Does, Does(eval, code))
    yield "in the state", Does(list, state={"a": Does(eval, code)})
    yield "import", Does(__import__, "antigravity")


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_checkpoint_runs(tmp_path, legacy, monkeypatch):
    made, path = tmp_path / "made", tmp_path / "a.ckpt"
    monkeypatch.chdir(tmp_path)
    for name, attack in attacks(made):
        torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": [attack]}, path,
                   _use_new_zipfile_serialization=not legacy)
        try:
            assert read_tensors(path)["x"].tolist() == [1, 1], name
        except UserError as e:          # refused is as good
            assert "\n" not in str(e), name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt"], name
    try:        # the attack is one: pickle itself does what it says
        pickle.loads(pickle.dumps(dict(attacks(made))["eval"]))
    except TypeError:
        pass
    assert made.exists()


@pytest.mark.parametrize("opcodes", [
    b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\0\0\0__defaults__)stb.",     # BUILD of a function
    b"cany\nthing\n(N}X\x05\0\0\0thing)stb0cany\nthing\n.",                     # and of a class
    b"cany\nthing\n(K\x01K\x02u.", b"cposix\nsystem\n(X\x04\0\0\0truetR.",
    b"(X\x04\0\0\0trueiposix\nsystem\n.", b"(cposix\nsystem\nX\x04\0\0\0trueo."])
def test_what_a_checkpoint_can_name_cannot_be_changed(opcodes):
    import torch._utils as utils
    before, ran = utils._rebuild_tensor_v2.__defaults__, []
    try:
        found = TensorUnpickler(io.BytesIO(b"\x80\x02" + opcodes)).load()
        assert not hasattr(found, "thing") and not isinstance(found, int), ran
    except (TypeError, AttributeError):
        pass
    assert utils._rebuild_tensor_v2.__defaults__ == before


def test_a_torchscript_archive_is_refused(tmp_path):
    """torch.load would hand it to torch.jit.load, which runs its code."""
    torch.save({"x": torch.ones(1)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt", "a") as z:
        z.writestr("a/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match="a.ckpt"):
        read_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize("shard", ["../other.bin", "/etc/other.bin", "sub/other.bin", 3, None,
                                   ["a"]])
def test_shards_lie_in_their_folder(tmp_path, shard):
    torch.save({"x": torch.ones(1)}, tmp_path / "other.bin")
    (tmp_path / "w").mkdir()
    index = tmp_path / "w" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(UserError, match="index.json: weight_map"):
        read_weights(tmp_path / "w")


# ---------------------------------------------------------------- settings

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights folder with an autoencoder."""
    torch.manual_seed(0)
    model = UniX(small_config(layers=1, vit_layers=1))
    model.vae = VAE(ch=32, mult=[1, 1], blocks=1, attn=[], z=16, embed=16)
    at = tmp_path_factory.mktemp("weights")
    model.save(at)
    return model, at


def places(found, at=()):
    """Where a parsed JSON file has a value: all keys, at all depths."""
    if isinstance(found, list):
        found = dict(enumerate(found))
    for k, v in found.items() if isinstance(found, dict) else ():
        yield *at, k
        yield from places(v, (*at, k))


def changed(found, at, value):
    found = copy.deepcopy(found)
    holder = found
    for k in at[:-1]:
        holder = holder[k]
    if value == "removed":
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return found


WRONG = [None, -1, 0, 1e9, "x", [], {}, True, 3.5, "removed", 10**400]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["config.json", "vae/config.json"])
def test_a_wrecked_config_is_loaded_or_refused_in_one_line(folder, tmp_path, name):
    """Each key at each depth, with values of the wrong kind or size."""
    model, at = folder
    good, refused, weights = json.loads((at / name).read_text()), 0, read_weights(at)
    try:
        for key, value in product(places(good), WRONG):
            (at / name).write_text(json.dumps(changed(good, key, value)))
            try:
                config = infer_config(weights, JsonFile(at / "config.json"))
                if value in (0, "x", 3.5) and (config != model.config or "vae" in f"{name} {key}"):
                    UniX.load(at)       # else it is loaded as before
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 300
    finally:
        (at / name).write_text(json.dumps(good))
    assert refused > 5 and UniX.load(at).config == model.config


@pytest.mark.parametrize("key, value", [
    ("vit_config.num_attention_heads", -1), ("vit_config.num_attention_heads", 7),
    ("vit_config", []),
    ("vit_config.num_attention_heads", "x"), ("latent_patch_size", 3), ("latent_patch_size", True),
    ("interpolate_pos", 1), ("language_config", "x"),
    ("language_config.max_position_embeddings", 0),
    ("special_token_ids.bos_token_id", 97), ("special_token_ids", 3), ("ours", True),
    ("ours.eta", 1.5), ("ours.no_context", "x"), ("ours.taught_on", 3), ("ours.resolution", 3.5),
    ("ours.surprise", 1), ("inference_config.generation.cfg_text_scale", float("nan")),
    ("inference_config.generation.cfg_interval", 0.5),
    ("inference_config.generation.cfg_interval.0", "x"),
    ("inference_config.generation", [3]), ("vae_path", 3), ("vae_config.path", {}),
    ("vae_config.scale_factor", 0), ("vae_config.norm_groups", 0)])
def test_the_key_of_a_wrong_setting_is_named(folder, key, value):
    _, at = folder
    good = json.loads((at / "config.json").read_text())
    parts = [int(k) if k.isdigit() else k for k in key.split(".")]
    try:
        (at / "vae" / "config.json").rename(at / "aside")       # else it wins over vae_config
        (at / "config.json").write_text(json.dumps(changed(good, parts, value)))
        with pytest.raises(UserError, match=f"config.json: {key.removesuffix('.generation')}") as e:
            UniX.load(at)
        assert "\n" not in str(e.value)
    finally:
        (at / "aside").rename(at / "vae" / "config.json")
        (at / "config.json").write_text(json.dumps(good))


def test_groups_that_do_not_divide_the_channels_are_refused(folder):
    _, at = folder
    good = (at / "vae" / "config.json").read_text()
    try:
        (at / "vae" / "config.json").write_text('{"norm_groups": 7}')
        with pytest.raises(UserError, match="7 groups of 32 channels"):
            UniX.load(at)
    finally:
        (at / "vae" / "config.json").write_text(good)


def test_older_settings_load_and_new_ones_come_back(folder, tmp_path):
    model = UniX(small_config(layers=1, vit_layers=1, taught_on="phantom", predict_x0=True,
                              eta=0.5))
    model.save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["ours"]["taught_on"] == "phantom" and UniX.load(tmp_path).config == model.config
    about["ours"] = {"predict_film": True, "resolution": None}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = UniX.load(tmp_path).config
    assert config.predict_x0 and config.taught_on == "" and config.eta == 0
    assert config.resolution == 512


def test_what_tensors_tell_need_not_be_in_the_config(tmp_path):
    """Heads too, by QK-norm; the units of latents are in both files, and either is enough."""
    torch.manual_seed(0)
    model = UniX(small_config(layers=1, vit_layers=1))
    model.vae = VAE(ch=32, mult=[1, 1], blocks=1, attn=[], z=16, embed=16, scale=0.5,
                    latent_mean=-2.0, groups=8)
    model.save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    told = "language_config", "llm_config", "vae_config", "max_latent_size"
    slim = {k: v for k, v in about.items() if k not in told}
    (tmp_path / "config.json").write_text(json.dumps(slim))
    again = [UniX.load(tmp_path)]
    (tmp_path / "vae" / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(about))
    again.append(UniX.load(tmp_path))
    for m in again:
        assert (m.config.heads, m.config.kv_heads, m.config.head_dim) == (4, 2, 10)
        assert m.config.latent_side == 8
        assert (m.vae.scale, m.vae.latent_mean, m.vae.groups) == (0.5, -2.0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_the_bytes(folder, tmp_path, dtype):
    """Half the file; each value rounded, the constant position table exact; fp32 in memory."""
    model, at = folder
    model.save(tmp_path, dtype)
    names = "model.safetensors", "vae/model.safetensors"
    sizes = [sum((f / name).stat().st_size for name in names) for f in (at, tmp_path)]
    table = model.positions.nbytes
    assert sizes[1] - table < 0.6 * (sizes[0] - table)
    half = UniX.load(tmp_path)
    assert torch.equal(half.positions, model.positions)
    for k, v in half.state_dict().items():
        assert v.dtype == torch.float32
        if k != "positions":
            assert torch.equal(v, model.state_dict()[k].to(dtype).float())


@pytest.mark.parametrize("name, key, value", [
    ("config.json", "num_attention_heads", "x"), ("preprocessor_config.json", "crop_size", 3),
    ("preprocessor_config.json", "crop_size", {"height": []}),
    ("preprocessor_config.json", "image_std", [0]),
    ("preprocessor_config.json", "image_mean", ["x"])])
def test_wrong_settings_of_rad_dino_are_named(tmp_path, name, key, value):
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes((GOLDEN / "dinov2" / file).read_bytes())
    about = json.loads((tmp_path / name).read_text()) if name == "config.json" else {}
    (tmp_path / name).write_text(json.dumps(about | {key: value}))
    with pytest.raises(UserError, match=f"{name}: {key}"):
        load_rad_dino(tmp_path)
