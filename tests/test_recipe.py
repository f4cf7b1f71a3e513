"""Facts of the recipe (Table 1, Sec. 3.4), each against an independent value: numbers worked out by
hand, torch's own functions, or a property that a wrong edit breaks."""

import math
import shutil

import pytest
import torch
from torch import nn

import train
from data import UserError
from phantoms import write_phantoms
from train import STAGES, Muon, Options, Ours, Processes, Stage
from unix import load_vae, read_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("images"), 12, 4)


def options(folder, out, stage, **more) -> Options:
    return Options(**{**dict(stage=stage, data=str(folder), out=str(out), steps=2, batch_size=4,
                             precision="fp32", sheet_every=100, save_every=100), **more})


@pytest.fixture(scope="module")
def read(folder, tmp_path_factory):
    """A run with an autoencoder and a reader, two steps each."""
    out = tmp_path_factory.mktemp("read")
    for stage in (0, 1):
        train.run(options(folder, out, stage))
    return out


def started(folder, out, stage: int, row: Stage, base=None, **more) -> train.Trainer:
    """A stage with its own row of the table, before its first step."""
    if base:
        shutil.copytree(base, out, dirs_exist_ok=True)
    return train.set_up(options(folder, out, stage, **more), row, Processes(), out)


def by_hand(trainer, batches: list) -> dict:
    """The same steps by the formulas of Table 1's optimizer: AdamW(0.9, 0.95), eps 1e-15, weight
    decay 0, gradients clipped to a norm of 1, linear warm-up."""
    s, names = trainer.stage, [*trainer.trainable]
    first, second = ({k: torch.zeros_like(p) for k, p in trainer.trainable.items()} for _ in "mv")
    kept = {k: p.detach().clone() for k, p in trainer.trainable.items()}
    for step, batch in enumerate(batches):
        sums = trainer.losses(batch, trainer.randomness(step))
        tokens = sum(len(trainer.model.ids(text)) + 1 for text in batch["report"])  # and EOS
        grads = dict(zip(names, torch.autograd.grad(sums["text"] / tokens,
                                                    [*trainer.trainable.values()])))
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert norm > 1.5                                               # so that clipping shows
        with torch.no_grad():
            for k, p in trainer.trainable.items():
                g = grads[k] / max(norm, 1)
                first[k].mul_(0.9).add_(0.1 * g)
                second[k].mul_(0.95).add_(0.05 * g * g)
                m, v = first[k] / (1 - 0.9 ** (step + 1)), second[k] / (1 - 0.95 ** (step + 1))
                p -= s.lr * min(1, (step + 1) / s.warmup) * m / (v.sqrt() + 1e-15)
    found = {k: p.detach().clone() for k, p in trainer.trainable.items()}
    with torch.no_grad():
        for k, p in trainer.trainable.items():
            p.copy_(kept[k])
    return found


def test_two_steps_equal_the_optimizer_of_table_1_by_hand(folder, tmp_path):
    """Rate, warm-up, betas, weight decay, clipping, the token mean, and which step comes first."""
    row = Stage("understanding", 96, 1e-3, 3, 2, 4)
    trainer = started(folder, tmp_path, 1, row)
    stream = trainer.stream()
    batches = [next(stream), next(stream)]
    want = by_hand(trainer, batches)
    for batch in batches:
        tokens = sum(len(trainer.model.ids(text)) + 1 for text in batch["report"])
        mean = trainer.losses(batch, trainer.randomness(trainer.step))["text"] / tokens
        assert math.isclose(trainer.train_step(batch)["text"], mean.item(), rel_tol=1e-5)
    bias = [k for k in want if k.endswith(("qkv.bias", "k_proj.bias"))]     # rounding noise: its
    for k, p in trainer.trainable.items():          # gradient is 0, and eps 1e-15 makes a full step
        if k not in bias:                           # a gradient near 0 has a rounded sign
            assert ((p.detach() - want[k]).abs() > 2e-6).float().mean() < 1e-3, k


def test_the_optimizers_constants(folder, tmp_path):
    trainer = started(folder, tmp_path, 1, STAGES["unix"][1])
    only, = trainer.optimizers                      # the paper's preset has no second optimizer
    d = only.defaults
    assert (d["lr"], d["betas"], d["eps"], d["weight_decay"]) == (1e-4, (0.9, 0.95), 1e-15, 0)
    assert [trainer.rate(k) for k in (0, 39, 79, 80, 3839)] == [1 / 80, 0.5, 1, 1, 1]
    third = started(folder, tmp_path / "b", 1, train.replace(STAGES["unix"][3], trains="understanding"))
    assert third.rate(0) == 1                       # stage 3 has no warm-up
    fall = Ours(cooldown=0.5)
    trainer.stage = Stage("understanding", 96, 1e-3, 0, 100, 4, ours=fall)
    assert [trainer.rate(k) for k in (0, 50, 75, 99)] == [1, 1, 0.5, 0.02]


def test_the_averaged_weights_are_a_running_mean_and_are_what_is_saved(read, folder, tmp_path):
    """The first steps count more: after step k a weight of 9 / (k + 9) goes to the newest."""
    row = Stage("generation", 64, 1e-2, 0, 3, 4, ours=Ours(ema=0.9))
    trainer = started(folder, tmp_path, 2, row, read)
    name = "lm.tower.layers.0.gen.o_proj.weight"
    mean, stream = trainer.trainable[name].detach().clone(), trainer.stream()
    for new in (9 / 10, 9 / 11, 9 / 12):
        trainer.train_step(next(stream))
        mean += new * (trainer.trainable[name].detach() - mean)
    torch.testing.assert_close(trainer.average()[name], mean)
    assert not torch.allclose(trainer.trainable[name], mean)
    trainer.save_checkpoint()
    saved = read_safetensors(tmp_path / "model.safetensors")
    torch.testing.assert_close(
        saved["language_model.model.layers.0.self_attn.o_proj_moe_gen.weight"], mean)
    trainer.step = 10_000                           # later the decay is the table's
    before = trainer.average()[name].clone()
    trainer.train_step(next(stream))
    change = trainer.average()[name] - before
    torch.testing.assert_close(change, 0.1 * (trainer.trainable[name].detach() - before))


@pytest.mark.parametrize("stage", [2, 3])
def test_tiny_generates_from_many_noisy_images_and_from_its_last_weights(stage):
    """At batch 16 most of a step is not spent on images: less is learned in the same time. And the
    mean age of the averaged weights, 1 / (1 - ema) steps, is short beside a rate that falls to 0:
    at .998 the average of stage 3 had a higher loss than the weights themselves (tests/README)."""
    row = STAGES["tiny"][stage]
    assert row.batch >= 32 and row.steps * row.batch >= 150_000
    assert row.ours.cooldown == 1 and 1 / (1 - row.ours.ema) <= 0.05 * row.steps


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_repa_has_its_weight_and_its_layer(read, folder, tmp_path, weight):
    """Half of the mean over images (Table 1), from the first third of the layers (8 of 24)."""
    row = train.replace(STAGES["tiny"][2], batch=4, repa_weight=weight)
    trainer = started(folder, tmp_path, 2, row, read)
    batch, seen, real = next(trainer.stream()), [], trainer.model.flow_loss

    def spy(*args):
        flow, states = real(*args)
        seen.append((args[-1], states))
        return flow, states
    trainer.model.flow_loss = spy
    sums = trainer.losses(batch, trainer.randomness(0))
    assert seen[0][0] == 1 and round(24 * train.REPA_DEPTH) == 8
    data = train.open_data(str(folder), "train", 64)        # its 6 x 6 patches, onto 4 x 4 latents
    images = torch.stack([torch.from_numpy(data[i]["image"]) for i in batch["index"].tolist()])
    with torch.no_grad():
        features = trainer.model.vit.patches(images).transpose(1, 2).unflatten(2, (6, 6))
    to = nn.functional.interpolate(features, (4, 4), mode="area").flatten(2).transpose(1, 2)
    torch.testing.assert_close(batch["features"], to, atol=5e-3, rtol=1e-3)     # kept in fp16
    states = trainer.projector(seen[0][1])
    want = -nn.functional.cosine_similarity(states, batch["features"], dim=-1)
    torch.testing.assert_close(sums["repa"], want.mean(1).sum())
    logged = trainer.train_step(batch)
    assert math.isclose(logged["repa"], weight * want.mean().item(), rel_tol=1e-4)
    assert len(trainer.projector) == 5              # three linear layers with SiLU between


def test_stage_2_starts_from_a_copy_of_the_reader_and_stage_3_does_not(read, folder, tmp_path):
    out = tmp_path / "run"
    trainer = started(folder, out, 2, train.replace(STAGES["tiny"][2], batch=4, steps=2), read)
    tower = trainer.model.lm.tower
    pairs = [(x.und, x.gen) for x in tower.layers] + [(tower.norm, tower.norm_gen)]
    for und, gen in pairs:
        assert und is not gen
        for a, b in zip(und.parameters(), gen.parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    trainer.fit()
    third = started(folder, out, 3, train.replace(STAGES["tiny"][3], batch=4, steps=2))
    tower = third.model.lm.tower
    assert not torch.equal(tower.layers[0].und.o_proj.weight, tower.layers[0].gen.o_proj.weight)
    again = started(folder, out, 2, train.replace(STAGES["tiny"][2], batch=4, steps=2))
    tower = again.model.lm.tower                    # a stage that was begun is not copied again
    assert not torch.equal(tower.layers[0].und.o_proj.weight, tower.layers[0].gen.o_proj.weight)


@pytest.mark.parametrize("stage, trained", [(1, "understanding"), (2, "generation")])
def test_requires_grad_is_the_table(read, folder, tmp_path, stage, trained):
    trainer = started(folder, tmp_path, stage, train.replace(STAGES["tiny"][stage], batch=4),
                      read if stage > 1 else None)
    generation = ("gen.", "norm_gen", "vae2llm", "llm2vae", "time_embedder")
    for name, p in trainer.model.named_parameters():
        is_generation = any(part in name for part in generation)
        branch = "vae" if name.startswith("vae.") else (
            "generation" if is_generation else "understanding")
        assert p.requires_grad == (branch == trained), name
    inside = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert inside == {id(p) for p in [*trainer.model.parameters(), *(
        trainer.projector.parameters() if trainer.projector else ())] if p.requires_grad}


def test_flags_that_could_change_nothing_are_refused(read, folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(read, out)
    with pytest.raises(UserError, match="weights was None, now [0-9a-f]{12}"):    # over a finished stage
        train.run(options(folder, out, 1, weights=str(read)))
    train.run(options(folder, out, 2))
    other = tmp_path / "vae"
    vae = load_vae(out / "vae" / "model.safetensors")
    vae.encoder.conv_in.weight.data += 0.1
    train.save_vae(vae, other)
    with pytest.raises(UserError, match="latents of this autoencoder"):
        train.run(options(folder, out, 3, vae=str(other / "model.safetensors")))
    with pytest.raises(UserError, match="--share-layers 9: the model has 3"):
        train.run(options(folder, tmp_path / "new", 1, share_layers=9))
    with pytest.raises(UserError, match="--accumulate 5: a batch has only 4"):
        train.run(options(folder, tmp_path / "new", 1, accumulate=5))


def test_muon_equals_torchs():
    """torch.optim.Muon does the same in bf16, matrix by matrix: three steps of gradients that
    differ; a gradient that is missing moves nothing."""
    rng = torch.Generator().manual_seed(0)
    shapes = (12, 30), (30, 12), (12, 30), (12, 12), (30, 12)
    ours, theirs = ([nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    optimizers = Muon(ours, 0.1), torch.optim.Muon(
        theirs, lr=0.1, momentum=0.95, weight_decay=0, nesterov=True, ns_steps=3)
    for missing in (None, 2, None):
        before = [p.detach().clone() for p in ours + theirs]
        for i, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = None if i == missing else torch.randn(shapes[i], generator=rng) * 10.0 ** i
            b.grad = None if a.grad is None else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        steps = [p.detach() - old for p, old in zip(ours + theirs, before)]
        for i, (a, b) in enumerate(zip(steps, steps[len(shapes):])):
            assert (a - b).norm() < 0.03 * b.norm() or i == missing and not a.any()


def test_matrices_inside_the_networks_go_to_muon_in_tiny_alone(folder, tmp_path):
    """Not embeddings, heads and vectors, and nothing in the paper's preset."""
    trainer = started(folder, tmp_path, 1, train.replace(STAGES["tiny"][1], batch=4))
    adamw, muon = ({id(p) for group in o.param_groups for p in group["params"]}
                   for o in trainer.optimizers)
    for name, p in trainer.trainable.items():
        inside = p.dim() > 1 and not any(x in name for x in ("embed_tokens", "lm_head", "pos_embed"))
        assert id(p) in (muon if inside else adamw) and not id(p) in adamw & muon, name
    assert trainer.optimizers[1].defaults["lr"] == STAGES["tiny"][1].ours.muon


def test_stage_0(folder, tmp_path):
    """Every 16th batch is twice as large; the pull to N(0, 1) is light; the loss is a mean."""
    trainer = started(folder, tmp_path, 0, train.replace(STAGES["tiny"][0], batch=2, steps=20))
    stream = trainer.stream()
    sizes = [next(stream)["image"].shape[1:] for _ in range(18)]
    assert sizes == [(64, 64)] * 15 + [(128, 128)] + [(64, 64)] * 2
    trainer.step = 14
    assert [next(x)["image"].shape[1] for x in [trainer.stream()] * 3] == [64, 128, 64]
    trainer.step = 0
    batch = next(trainer.stream())
    weights = trainer.loss_weights(batch, trainer.randomness(0))
    assert weights["mse"] == 1 / 2 and math.isclose(weights["kl"], 1e-5 / 2)


def test_random_numbers_depend_on_seed_stage_and_step(folder, tmp_path):
    rows = train.replace(STAGES["tiny"][1], batch=4)
    trainer = started(folder, tmp_path, 1, rows)
    first = trainer.randomness(3)["time"]
    assert torch.equal(first, trainer.randomness(3)["time"])
    seen = [first, trainer.randomness(4)["time"]]
    for change in ({"stage": 3}, {"seed": 1}):
        trainer.options = train.replace(trainer.options, **{"stage": 1, "seed": 0} | change)
        seen.append(trainer.randomness(3)["time"])
    assert len({tuple(x.tolist()) for x in seen}) == 4


def test_latents_are_sampled_anew_in_each_step(read, folder, tmp_path):
    """x0 is a sample of the autoencoder's distribution, not its mean."""
    row = train.replace(STAGES["tiny"][2], batch=4, repa_weight=0.0)
    trainer = started(folder, tmp_path, 2, row, read)
    batch, random, seen = next(trainer.stream()), trainer.randomness(0), []
    trainer.model.flow_loss = lambda x0, *_: seen.append(x0) or (x0.flatten(1).mean(1), None)
    for z in (random["z"], random["z"] + 1):
        trainer.losses(batch, random | {"z": z})
    mean, logvar = batch["moments"].chunk(2, dim=1)
    want = trainer.vae.scale * (0.5 * logvar).exp()
    torch.testing.assert_close(seen[1] - seen[0], want, atol=1e-4, rtol=1e-3)
