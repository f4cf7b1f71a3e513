"""The whole model: losses, report and image by their invariances; weights folders."""

import json
import math
import re
import weakref

import pytest
import torch

from ar import ViT, decode, pick, report_loss
from conftest import small_config
from data import UserError
from diffusion import VAE, path, position_ids, sample, shift_time, to_tokens
from joint_attn import rope
from unix import PRESETS, UniX, read_safetensors, released, write_safetensors


def greedy(model, tokens, image, max_new=8, eos=-1):
    row, length = model.pad(tokens)
    return torch.stack([t for t, _ in decode(model.lm, row, length, image, eos, max_new)], 1)


@torch.no_grad()
def test_cached_decoding_equals_reading_everything_again(model, images):
    image, tokens = model.embed_image(images[:1]), [90, 4, 5, 91, 90]
    logits = [l for _, l in decode(model.lm, *model.pad([tokens]), image, -1, 8)]
    written = greedy(model, [tokens], image)[0].tolist()
    hidden, _ = model.lm.read_text(*model.pad([tokens + written[:-1]]), image)
    torch.testing.assert_close(torch.cat(logits), model.lm.lm_head(hidden[0, 4:]), atol=1e-4,
                               rtol=1e-4)


@torch.no_grad()
def test_decoding_keeps_one_copy_of_keys_and_values(model, images, monkeypatch):
    """Those of the context lie in the cache; for `unix` a second copy would be 0.4 MB a token."""
    read, kept = model.lm.read_text, []

    def spy(*args):
        found = read(*args)
        kept.append(weakref.ref(found[1].kv[0][0]))
        return found
    monkeypatch.setattr(model.lm, "read_text", spy)
    steps = decode(model.lm, *model.pad([[90, 4, 91, 90]]), model.embed_image(images[:1]), -1, 8)
    next(steps), next(steps)
    assert kept[0]() is None


@torch.no_grad()
def test_a_batch_with_different_prompts_and_stops_equals_its_samples(model, images):
    image = model.embed_image(images)
    prompts = [[90, 1, 91, 90], [90, 2, 3, 4, 5, 91, 90], [90, 91, 90]]
    alone = [greedy(model, [p], image[i:i + 1])[0].tolist() for i, p in enumerate(prompts)]
    assert greedy(model, prompts, image).tolist() == alone
    eos = alone[0][2]           # the first sample stops at its third token at the latest
    together = greedy(model, prompts, image, eos=eos).tolist()
    for row, want in zip(together, alone):
        n = want.index(eos) + 1 if eos in want else len(want)
        assert row[:n] == want[:n][:len(row)] and set(row[n:]) <= {eos}


@torch.no_grad()
def test_decoding_ends_when_all_have_ended(model, images):
    prompt, image = [[90, 1, 91, 90]], model.embed_image(images[:1])
    first = greedy(model, prompt, image)[0, 0].item()
    assert greedy(model, prompt, image, eos=first).shape == (1, 1)


def test_report_loss_is_the_cross_entropy_of_the_report_alone(model, images):
    """By hand, one sample at a time without padding; prompt and image carry no loss."""
    prompts, reports = [[1, 2], [3], [4, 5, 6]], [[7, 8, 9, 10], [11], []]
    total, count = model.understanding_loss(images, prompts, reports)
    by_hand = 0.0
    for i, (p, r) in enumerate(zip(prompts, reports)):
        row, length = model.pad([model.wrap(p) + model.wrap(r)])
        hidden, _ = model.lm.read_text(row, length, model.embed_image(images[i:i + 1]))
        logits = model.lm.lm_head(hidden[0])
        for j, label in enumerate(r + [91]):
            by_hand -= logits[len(p) + 2 + j].log_softmax(-1)[label]
    assert count == 5 + 2 + 1
    torch.testing.assert_close(total, by_hand, atol=1e-3, rtol=1e-4)


def test_new_weights_are_small_and_biases_zero():
    """N(0, 0.02) for every matrix (GPT-2, LLaMA), 0 for the output of latents. Exceptions are in
    the next test: biases of the text's queries and keys, and what the first layer copies."""
    torch.manual_seed(0)
    model = UniX(small_config(width=128))
    for name, p in model.named_parameters():
        if re.search("und.[qk]_proj.bias", name):
            assert set(p.tolist()) == {0, 1}, name
        elif name == "llm2vae.weight" or name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 2 and not re.match(r"vit|lm.tower.layers.0.und.[vo]_proj", name):
            assert 0.018 < p.std() < 0.022, name


@torch.no_grad()
def test_half_of_the_heads_of_a_new_model_look_near_and_the_first_layer_copies():
    """Of 100 random tokens the last one gives most of its attention to the last 8 in half of the
    heads of each layer, and about 8% in the others, as if at random. Values and output projection
    of these heads make .05 of a projection on 64 of the 128 dimensions, in the first layer alone."""
    torch.manual_seed(0)
    model = UniX(PRESETS["tiny"])
    cos_sin = rope(torch.arange(100)[None], model.config.head_dim)
    for i, und in enumerate(layer.und for layer in model.lm.tower.layers):
        q, k, _ = und.qkv(model.lm.embed_tokens(torch.randint(1000, (1, 100))), cos_sin)
        near = (q @ k.mT / q.shape[-1] ** 0.5)[0, :, -1].softmax(-1)[:, -8:].sum(-1)
        assert near[:2].min() > 0.6 and near[2:].max() < 0.25
        copy = und.o_proj.weight[:, :64] @ und.v_proj.weight[:64] / 0.05
        assert torch.allclose(copy @ copy, copy, atol=1e-5) == (i == 0)
        assert i or abs(copy.trace() - 64) < 1e-3
    torch.manual_seed(0)            # two queries a key: both heads of the first key copy its values
    und = UniX(small_config(width=64, heads=8, kv_heads=4, head_dim=8)).lm.tower.layers[0].und
    for head in range(4):
        o, v = und.o_proj.weight[:, 8 * head:][:, :8], und.v_proj.weight[8 * (head // 2):][:8]
        torch.testing.assert_close(o, 0.2 * v.T)


def test_the_first_losses_are_as_expected():
    """Untrained: ln V a token, and 1 + E[x0^2] for the flow, whose output layer starts at zero."""
    torch.manual_seed(0)
    model = UniX(small_config())
    pixels = torch.randn(4, 3, 32, 32)
    total, count = model.understanding_loss(pixels, [[1]] * 4, [[2, 3, 4, 5]] * 4)
    assert abs(total / count - math.log(97)) < 0.15
    x0, eps = torch.randn(64, 16, 4, 4) * 0.5, torch.randn(64, 16, 4, 4)
    loss, _ = model.flow_loss(x0, model.read_captions([[1]] * 64), torch.rand(64), eps)
    assert abs(loss.mean() - 1.25) < 0.05


@torch.no_grad()
def test_generation_tower_equals_understanding_tower_after_the_copy(model):
    """Latents whose embedding is a text token's are then treated as that token."""
    model.copy_tower()
    boi_eoi, x = model.boi_eoi(1), torch.randn(1, 5, 32)
    out, _ = model.lm.tower.denoise(boi_eoi, x, None)
    block = torch.cat([boi_eoi, x], dim=1)
    ids, length = torch.zeros(1, 7, dtype=torch.long), torch.tensor([7])
    hidden, _ = model.lm.tower.read_context(block, ids, length, 7)
    torch.testing.assert_close(out, hidden[:, 2:], atol=1e-5, rtol=1e-4)
    pairs = [(layer.gen, layer.und) for layer in model.lm.tower.layers]
    for gen, und in (*pairs, (model.lm.tower.norm_gen, model.lm.tower.norm)):
        for name, p in gen.named_parameters():      # a copy of each, not the same object
            before = und.get_parameter(name).clone()
            assert torch.equal(p, before), name
            p.data += 1
            assert torch.equal(und.get_parameter(name), before), name


def test_branches_are_named_parameter_by_parameter():
    """Table 1: what a stage trains; together they are all, none twice, and it is the parameters
    themselves that requires_grad_ is called on."""
    model = with_vae(UniX(small_config(share_layers=1)))
    parts = {k: model.branch(k) for k in ("understanding", "generation", "vae")}
    every = sorted(dict(model.named_parameters()))
    assert sorted(k for part in parts.values() for k in part) == every
    for name, inside in (
            ("understanding", {"vit.pos_embed", "connector.layers.0.weight",
                               "lm.embed_tokens.weight", "lm.lm_head.weight",
                               "lm.tower.norm.weight",
                               "lm.tower.layers.0.und.q_proj.weight",      # shared, so of this one
                               "lm.tower.layers.1.und.input_layernorm.weight"}),
            ("generation", {"lm.tower.layers.1.gen.q_proj.weight", "lm.tower.norm_gen.weight",
                            "lm.tower.layers.2.gen.q_norm.weight", "vae2llm.bias", "llm2vae.weight",
                            "time_embedder.mlp.0.weight"}),
            ("vae", {"vae.encoder.conv_in.weight", "vae.quant_conv.bias"})):
        assert inside <= parts[name].keys()
    model.requires_grad_(False)
    for p in model.branch("generation").values():
        p.requires_grad_(True)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == parts["generation"].keys()
    assert not any(k.startswith("lm.tower.layers.0.gen") for k in parts["generation"])
    assert "positions" not in dict(model.named_parameters())                # a constant


@torch.no_grad()
def test_repa_states_are_those_after_a_layer_counted_from_1(model):
    """What that layer returned; 0 gives none (Sec. 3.4: the 8th layer)."""
    x, t, n = torch.randn(2, 4, 16), torch.tensor([0.2, 0.7]), len(model.lm.tower.layers)
    context, rows, seen = model.read_captions([[1, 2], [3]]), torch.arange(4), []

    def keep(layer):
        denoise = layer.denoise
        layer.denoise = lambda *a: seen.append(denoise(*a)) or seen[-1]
    for layer in model.lm.tower.layers:
        keep(layer)
    for k in range(n + 1):
        seen.clear()
        v, states = model.velocity(x, t, context, rows, repa_layer=k)
        assert len(seen) == n and (states is None) == (k == 0)
        if k:
            assert torch.equal(states, seen[k - 1][1])
    _, states = model.flow_loss(x.transpose(1, 2).unflatten(2, (2, 2)), context, t,
                                torch.randn(2, 16, 2, 2), repa_layer=2)
    assert torch.equal(states, seen[-2][1])     # of three layers the second


@torch.no_grad()
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_report_ends_before_eos(model, images, stop):
    """The head is made to write 3, 4, 5 ... and EOS as token `stop`; max_new ends it too."""
    model.tokenizer, calls = Letters(), []

    def head(hidden):
        logits = torch.zeros(len(hidden), 97)
        logits[:, 91 if len(calls) == stop else 3 + len(calls)] = 1
        calls.append(1)
        return logits
    model.lm.lm_head.forward = head
    wanted = model.tokenizer.decode(range(3, 3 + stop))
    assert model.report(images, "fine", max_new=9) == [wanted] * 3 and len(calls) == stop + 1
    calls.clear()
    assert model.report(images, "fine", max_new=1) == [wanted[:1]] * 3 and len(calls) == 1


@torch.no_grad()
def test_a_report_is_what_greedy_decoding_writes_after_the_prompt(model, images):
    """[BOS prompt EOS] BOS: as the released code begins it."""
    model.tokenizer = Letters()
    prompt = [90, *model.tokenizer.encode("fine"), 91, 90]
    rows = greedy(model, [prompt] * 3, model.embed_image(images), eos=91).tolist()
    assert model.report(images, "fine", max_new=8) == [
        model.tokenizer.decode([*row, 91][:[*row, 91].index(91)]) for row in rows]


def test_a_text_fills_the_context_with_its_markers(model):
    """max_tokens = 64 holds 62 tokens between BOS and EOS."""
    model.tokenizer = Letters()
    assert len(model.wrap(model.ids("x" * 62))) == 64
    with pytest.raises(UserError, match="63 tokens"):
        model.ids("x" * 63)
    model.config.vocab = 50
    with pytest.raises(UserError, match="tokenizer.json is not that of these weights"):
        model.ids("xO")             # x is 40, O is 79
    model.tokenizer.encode = lambda text: []            # made by hand, without all bytes
    with pytest.raises(UserError, match="it lacks all of '\u5b57'"):
        model.ids("\u5b57")


@torch.no_grad()
def test_images_are_generated_as_the_config_says(model):
    """Scale, eta, interval of the config where none is given; seeds 0, 1, ...; no_context needs
    none of it and ignores the text."""
    with_vae(model).tokenizer, c = Letters(), model.config
    c.guidance, c.eta, c.guidance_interval = 3.0, 0.5, (0.2, 0.9)
    how = {"points": 5, "scale": 3.0, "eta": 0.5, "interval": (0.2, 0.9)}
    want = model.generate(["some", "other"], 32, seeds=[0, 1], **how)
    assert torch.equal(model.generate(["some", "other"], points=5, scale=None), want)
    for k, v in (("scale", 1.0), ("eta", 0.0), ("interval", (0.4, 1.0)), ("points", 6),
                 ("shift", 1.0)):
        assert not torch.equal(model.generate(["some", "other"], 32, **(how | {k: v})), want), k
    c.no_context = True
    a, b = (model.generate([text], 32, seeds=[1], points=4) for text in ("some", "other"))
    assert torch.equal(a, b)
    c.latent_channels = 5
    with pytest.raises(UserError, match="not the one whose latents"):
        model.generate(["some"], 32)


@torch.no_grad()
def test_autocast_gives_no_warning_and_stays_near_fp32(model, images):
    """bf16 rounds to 3 digits; a weight or an input left in fp32 would warn or be slow."""
    import warnings
    context, x, t = model.read_captions([[1, 2, 3]]), torch.randn(1, 4, 16), torch.tensor([0.4])
    want = (model.embed_image(images[:1]), model.velocity(x, t, context, torch.arange(4))[0])
    with warnings.catch_warnings(action="error"), torch.autocast("cpu", torch.bfloat16):
        context = model.read_captions([[1, 2, 3]])
        got = (model.embed_image(images[:1]), model.velocity(x, t, context, torch.arange(4))[0])
        y = model.lm.tower.layers[0].und.input_layernorm(x.new_ones(1, 32).bfloat16())
    assert y.dtype == torch.bfloat16
    for a, b in zip(got, want):
        assert (a.float() - b).norm() < 0.05 * b.norm()


def with_vae(model: UniX) -> UniX:
    torch.manual_seed(3)
    model.vae = VAE(ch=32, mult=[1, 1, 1, 1], blocks=1, attn=[], scale=0.5, latent_mean=0.2).eval()
    return model


class Letters:
    """A tokenizer of letters, for tests that are not about the tokenizer."""

    def encode(self, text):
        return [ord(c) % 80 for c in text]

    def decode(self, ids):
        return "".join(chr(65 + i % 26) for i in ids)


@torch.no_grad()
def test_generated_images_do_not_depend_on_the_batch(model):
    with_vae(model).tokenizer = Letters()
    both = model.generate(["large effusion", "clear"], 32, seeds=[5, 6], points=4)
    assert both.shape == (2, 3, 32, 32) and both.dtype == torch.uint8
    alone = model.generate(["clear"], 32, seeds=[6], points=4)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    other = model.generate(["clear"], 32, seeds=[7], points=4)
    assert (other[0].int() - alone[0].int()).abs().max() > 1
    assert model.generate(["clear"], 48, seeds=[6], points=3).shape == (1, 3, 48, 48)


@torch.no_grad()
def test_guidance_in_one_pass_equals_two(model):
    """A batch of captions of several lengths, against each alone, with and without its caption."""
    captions, rows = [[1, 2, 3], [4]], position_ids(4, 4, 8)
    how = {"points": 4, "scale": 3.0, "interval": (0.7, 1.0)}
    made = list(model.sample_latents(captions, 4, 4, [5, 6], **how))
    for i, (caption, seed) in enumerate(zip(captions, (5, 6))):
        context = model.read_captions([caption])

        def velocity(x, t, guided):
            v, _ = model.velocity(x, t, context, rows)
            return (v, model.velocity(x, t, None, rows)[0]) if guided else v
        noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed))
        steps = sample(velocity, noise, **how)
        for (_, _, x), together in zip(steps, made):
            torch.testing.assert_close(together[i].flatten(1).T, x[0], atol=1e-4, rtol=1e-4)


def test_guidance_is_on_when_the_weights_folder_says(model, tmp_path):
    model.config.guidance_interval = (0.5, 0.8)
    model.save(tmp_path)
    loaded = UniX.load(tmp_path)
    made, said, other = (
        list(loaded.sample_latents([[1, 2]], 4, 4, [5], points=4, scale=3.0, **how))[-1]
        for how in ({}, {"interval": (0.5, 0.8)}, {"interval": (0.4, 1.0)}))
    assert torch.equal(made, said) and not torch.allclose(made, other)


def test_bad_texts_and_sizes_are_named(model):
    with_vae(model).tokenizer = Letters()
    for text, word in (("  ", "empty"), ("x" * 80, "80 tokens")):
        with pytest.raises(UserError, match=word):
            model.generate([text], 32)
    for size in (0, 20, 128):
        with pytest.raises(UserError, match="multiple of 8 up to 64"):
            model.generate(["fine"], size)


def test_nucleus_sampling_keeps_the_smallest_set():
    """p = .5 .3 .15 .05: top_p .6 leaves the first two, in proportion 5 : 3."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().repeat(20000, 1)
    made = pick(logits, 1.0, 0.6, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    torch.testing.assert_close(made, torch.tensor([0, 0.625, 0, 0.375]), atol=0.015, rtol=0)
    assert (pick(logits, 0.0, 1.0) == 1).all()
    cold = pick(logits, 0.5, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    want = torch.tensor([0.05, 0.5, 0.15, 0.3]).square()
    torch.testing.assert_close(cold, want / want.sum(), atol=0.015, rtol=0)


def test_report_loss_function_ignores_what_has_no_label():
    head, hidden = torch.nn.Linear(4, 7, bias=False), torch.randn(2, 3, 4)
    labels = torch.tensor([[-100, 2, -100], [-100, -100, 5]])
    total, count = report_loss(hidden, head, labels)
    hidden[0, 0] += 100
    torch.testing.assert_close(report_loss(hidden, head, labels)[0], total)
    assert count == 2
    assert report_loss(hidden, head, labels.clamp(max=0))[1] == 2       # id 0 is a token as others


def test_the_paper_preset_builds_on_the_meta_device():
    """24 layers, 2048 wide, vocabulary 102400, SigLIP-L/16-384; 3B, half of it per branch."""
    with torch.device("meta"):
        model = UniX(PRESETS["unix"])
    assert len(model.lm.tower.layers) == 24 and model.lm.embed_tokens.weight.shape == (102400, 2048)
    assert model.vit.pos_embed.shape == (1, 576, 1024) and len(model.vit.blocks) == 24
    size = {k: sum(p.numel() for p in model.branch(k).values()) / 1e9
            for k in ("understanding", "generation")}
    assert 1.8 < size["understanding"] < 2.1 and 1.1 < size["generation"] < 1.4
    names = {released(k) for k in model.state_dict()}
    assert "language_model.model.layers.23.mlp_moe_gen.down_proj.weight" in names
    assert "vit_model.vision_tower.blocks.23.attn.qkv.bias" in names


# ---------------------------------------------------------------- weights folders


def same(a: UniX, b: UniX):
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_saved_and_loaded_again_is_the_same_model(model, tmp_path):
    with_vae(model).save(tmp_path)
    again = UniX.load(tmp_path)
    same(model, again)
    assert again.config.__dict__ | {"vae": 0} == model.config.__dict__ | {"vae": 0}
    assert (again.vae.scale, again.vae.latent_mean) == (0.5, 0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "vae"]


def test_shared_layers_stay_shared_on_disk(tmp_path):
    model = UniX(small_config(share_layers=2))
    model.save(tmp_path)
    again = UniX.load(tmp_path)
    assert [layer.und is layer.gen for layer in again.lm.tower.layers] == [True, True, False]
    same(model, again)


def rewrite(folder, change):
    tensors = {k: v.clone() for k, v in read_safetensors(folder / "model.safetensors").items()}
    change(tensors)
    write_safetensors(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop("llm2vae.bias"), "missing: llm2vae.bias"),
    (lambda t: t.update(surprise=torch.ones(2)), "unexpected: surprise"),
    (lambda t: t.update({"llm2vae.bias": torch.ones(3)}), r"llm2vae.bias is \[3\], not \[16\]"),
    (lambda t: t.pop("language_model.model.embed_tokens.weight"),
     "embed_tokens.weight is missing")])
def test_wrong_tensors_are_named(model, tmp_path, change, said):
    model.save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=said):
        UniX.load(tmp_path)


def test_tensors_that_no_forward_uses_may_be_there_or_not(model, tmp_path):
    model.save(tmp_path)
    rewrite(tmp_path, lambda t: t.update({
        "vit_pos_embed.pos_embed": torch.ones(2),
        "vit_model.vision_tower.attn_pool.q.bias": torch.ones(2)}))
    same(model, UniX.load(tmp_path))


def test_weights_folders_that_are_none(model, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        UniX.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no model.safetensors"):
        UniX.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        UniX.load(tmp_path)


def janus_names(model: UniX) -> dict:
    """Our understanding branch under Janus-Pro's names: no QK-norm, no QKV bias, gen_* besides."""
    found = {"gen_vision_model.x": torch.ones(1), "gen_head.y": torch.ones(1)}
    for k, v in model.state_dict().items():
        if k in model.branch("understanding") and "_norm." not in k and not \
                ("_proj.bias" in k):
            name = released(k).replace("vit_model.", "vision_model.")
            name = name.replace("connector.", "aligner.")
            found[name] = v.clone()
    found["language_model.model.norm.weight"] = model.lm.tower.norm.weight.data.clone()
    return found


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_a_janus_folder_is_a_starting_point(model, images, tmp_path, kind):
    """Understanding as given (norms 1, biases 0), the generation tower a copy of it."""
    tensors = janus_names(model)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "multi_modality", "language_config": {
            "num_hidden_layers": 3, "vocab_size": 97, "num_attention_heads": 4}}))
    if kind == "safetensors":
        write_safetensors(tensors, tmp_path / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        shards = {"a.bin": names[::2], "b.bin": names[1::2]}
        for shard, keys in shards.items():
            torch.save({k: tensors[k] for k in keys}, tmp_path / shard)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"weight_map": {k: s for s, keys in shards.items() for k in keys}}))
    loaded = UniX.load(tmp_path)
    layer = loaded.lm.tower.layers[1]
    torch.testing.assert_close(layer.und.q_proj.weight, model.lm.tower.layers[1].und.q_proj.weight)
    assert torch.equal(layer.gen.down_proj.weight, layer.und.down_proj.weight)
    assert layer.gen is not layer.und and (layer.und.q_norm.weight == 1).all()
    assert not layer.und.k_proj.bias.any() and not loaded.llm2vae.weight.any()
    assert loaded.config.kv_heads == 2 and loaded.config.head_dim == 10
    loaded.requires_grad_(False)
    before = layer.und.down_proj.weight.clone()
    layer.gen.down_proj.weight += 1                             # a copy, not the same memory
    assert torch.equal(layer.und.down_proj.weight, before)
    loaded.requires_grad_(True)
    total, count = loaded.understanding_loss(images, [[1]] * 3, [[2, 3]] * 3)
    assert math.isfinite(total.item()) and count == 9


def test_a_new_image_encoder_attends_to_neighbours():
    torch.manual_seed(0)
    vit = ViT(96, 16, 64, 64, 2, 1)
    normed = torch.nn.functional.layer_norm(vit.pos_embed, (64,))
    q, k, _ = vit.blocks[0].attn["qkv"](normed).chunk(3, -1)
    p = (q[0, :, :32] @ k[0, :, :32].T / 32 ** 0.5).softmax(-1)     # first head, positions alone
    at = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    far = (at[:, None] - at[None]).abs().amax(-1)
    assert p[far <= 1].mean() > 2 * p[far >= 3].mean()


def test_a_saved_model_has_the_same_positions(tmp_path):
    """Positions spread over the table survive saving; other ones are those of the corner."""
    torch.manual_seed(0)
    for spread in (True, False):
        model = UniX(small_config(interpolate_pos=spread))
        model.save(tmp_path / str(spread))
        again = UniX.load(tmp_path / str(spread))
        assert again.latent_positions(2, 4).tolist() == model.latent_positions(2, 4).tolist()
        assert again.latent_positions(2, 4)[:3].tolist() == ([0, 2, 4] if spread else [0, 1, 2])


def test_a_token_of_four_latents(tmp_path):
    """The loss is the mean over the same numbers, a step of the sampler is Euler's on tokens and
    their positions, an image of its own seed does not depend on the batch, saving keeps the size
    of a token, and an image that tokens do not divide is refused."""
    torch.manual_seed(0)
    model = with_vae(UniX(small_config(latent_patch=2)).eval())
    assert model.vae2llm.in_features == 4 * model.config.latent_channels
    x0, eps = torch.randn(2, 2, model.config.latent_channels, 4, 6)[:, :1]
    loss, _ = model.flow_loss(x0, None, torch.tensor([0.5]), eps)       # the velocity is still 0
    torch.testing.assert_close(loss[0], (eps - x0).square().mean())
    torch.nn.init.normal_(model.llm2vae.weight)
    first = next(model.sample_latents([[1]], 4, 4, [5], points=3, scale=1.0))
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))[None]
    t, after = (shift_time(torch.tensor([x]), 3.0) for x in (1.0, 0.5))
    v, _ = model.velocity(noise, t, model.read_captions([[1]]), torch.tensor([0, 1, 8, 9]))
    torch.testing.assert_close(to_tokens(first, 2), noise - v * (t - after))
    model.tokenizer = Letters()
    both = model.generate(["large effusion", "clear"], 32, seeds=[5, 6], points=3, eta=0.5)
    alone = model.generate(["clear"], 32, seeds=[6], points=3, eta=0.5)
    assert not torch.equal(alone, model.generate(["clear"], 32, seeds=[6], points=3, eta=0.0))
    assert both.shape == (2, 3, 32, 32) and (both[1].int() - alone[0].int()).abs().max() <= 1
    model.tokenizer = None
    model.save(tmp_path)
    assert UniX.load(tmp_path).config == model.config
    with pytest.raises(UserError, match="multiple of 16"):
        model.latent_rows(24)


def test_latents_of_another_autoencoder():
    """Tokens cover 16 x 16 pixels of the autoencoder that is given; the first velocity is 0."""
    model = UniX(small_config())
    for factor, channels in ((16, 16), (8, 16), (4, 5)):
        mult = [1] * factor.bit_length()
        model.vae = VAE(ch=32, mult=mult, blocks=1, attn=[], z=channels, embed=channels)
        before = model.vae2llm
        model.resize_projections()
        assert (model.vae2llm is before) == (factor == 16)      # made for these already
        assert model.config.latent_patch * factor == 16 and model.latent_rows(32) == 32 // factor
        assert model.vae2llm.in_features == channels * (16 // factor) ** 2
        latents = torch.randn(1, channels, 2 * 16 // factor, 2 * 16 // factor)
        loss, _ = model.flow_loss(latents, None, torch.tensor([0.5]), torch.zeros_like(latents))
        torch.testing.assert_close(loss[0], latents.square().mean())


def test_a_tower_that_predicts_x0(tmp_path):
    """If x0 is right, the velocity is Eq. 2's target up to t = 0.5 from noise, and
    half that at t = 0.25; one step of the sampler from noise is the image; saving keeps it."""
    torch.manual_seed(0)
    model = UniX(small_config(predict_x0=True))
    eps, image = torch.randn(4, 4, 16), torch.randn(16)
    with torch.no_grad():
        model.llm2vae.bias.copy_(image)          # its weights are 0: every token predicts it
        t, position_ids = torch.tensor([1.0, 0.8, 0.5, 0.25]), model.latent_positions(2, 2)
        v, _ = model.velocity(path(image.expand_as(eps), eps, t), t, None, position_ids)
    want = (eps - image) * torch.tensor([1, 1, 1, 0.5])[:, None, None]
    torch.testing.assert_close(v, want, atol=1e-5, rtol=1e-5)
    made, = model.sample_latents([[1]], 2, 2, [0], points=2, scale=1.0, eta=0.0)
    torch.testing.assert_close(to_tokens(made, 1)[0], image.expand(4, 16), atol=1e-5, rtol=1e-5)
    model.save(tmp_path)
    assert UniX.load(tmp_path).config.predict_x0
