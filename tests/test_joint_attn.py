"""Two experts, one softmax: the layer against a slow one written from Eq. 3-5; invariances."""

import math

import pytest
import torch

from joint_attn import Context, Expert, Linear, Tower, rope, rotate


def slow_attention(q, k, v, see):
    """softmax(Q K^T / sqrt(d)) V with a dense mask: q (h, l, k), k and v (g, m, k), see (l, m)."""
    k, v = (a.repeat_interleave(q.shape[0] // a.shape[0], 0) for a in (k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~see, -math.inf)
    return scores.softmax(-1) @ v


def slow_layer(layer, x, ids, is_gen, see):
    """One layer over one packed sequence x (l, d), token by token, each with its own expert."""
    cos_sin = rope(ids[None], layer.und.head_dim)
    experts = [layer.gen if g else layer.und for g in is_gen]
    parts = [expert.qkv(x[None, i:i + 1], tuple(a[:, :, i:i + 1] for a in cos_sin))
             for i, expert in enumerate(experts)]
    q, k, v = (torch.cat([p[j][0] for p in parts], dim=1) for j in range(3))
    mixed = slow_attention(q, k, v, see)
    return torch.cat([expert.finish(x[None, i:i + 1], mixed[None, :, i:i + 1])[0]
                      for i, expert in enumerate(experts)])


def test_denoising_equals_the_equations_with_a_dense_mask(model):
    """[text | BOI latents EOI]: text causal, the block sees all, experts by token (Eq. 3-5)."""
    tower, n_text, n = model.lm.tower, 5, 6
    text, boi_eoi, x = torch.randn(1, n_text, 32), torch.randn(1, 2, 32), torch.randn(1, n, 32)
    length = torch.tensor([n_text])
    hidden, context = tower.read_context(text, torch.arange(n_text)[None], length)
    out, _ = tower.denoise(boi_eoi, x, context)
    s = torch.cat([text[0], boi_eoi[0, :1], x[0], boi_eoi[0, 1:]])
    ids = torch.cat([torch.arange(n_text), torch.full((n + 2,), n_text)])
    see = torch.ones(len(s), len(s)).tril().bool()
    see[n_text:] = True
    is_gen = [False] * (n_text + 1) + [True] * n + [False]
    for layer in tower.layers:
        s = slow_layer(layer, s, ids, is_gen, see)
    torch.testing.assert_close(out[0], tower.norm_gen(s[n_text + 1:-1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden[0], tower.norm(s[:n_text]), atol=1e-5, rtol=1e-4)


def test_reading_equals_the_equations_with_a_dense_mask(model):
    """[image block | text]: the block bidirectional at one RoPE id, text causal after it."""
    tower, n_image, n_text = model.lm.tower, 6, 5
    x = torch.randn(1, n_image + n_text, 32)
    ids = torch.cat([torch.zeros(n_image), torch.arange(1, n_text + 1)]).long()
    hidden, _ = tower.read_context(x, ids[None], torch.tensor([11]), n_image)
    see = torch.ones(11, 11).tril().bool()
    see[:n_image, :n_image] = True
    s = x[0]
    for layer in tower.layers:
        s = slow_layer(layer, s, ids, [False] * 11, see)
    torch.testing.assert_close(hidden[0], tower.norm(s), atol=1e-5, rtol=1e-4)


def test_latents_never_change_text(model):
    """What is read before a noisy block is the same whatever the block holds."""
    context = model.read_captions([[1, 2, 3]])
    before = [(k.clone(), v.clone()) for k, v in context.kv]
    for seed in (0, 1):
        x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(seed))
        model.velocity(x, torch.tensor([0.5]), context, torch.arange(4))
    for (k, v), (k0, v0) in zip(context.kv, before):
        assert torch.equal(k, k0) and torch.equal(v, v0)


def test_order_inside_a_block_does_not_matter(model):
    """One RoPE id: permuting latents with their positions permutes the velocities."""
    context, x, t = model.read_captions([[5, 6]]), torch.randn(1, 6, 16), torch.tensor([0.3])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    a, _ = model.velocity(x, t, context, torch.arange(6))
    b, _ = model.velocity(x[:, order], t, context, order)
    torch.testing.assert_close(a[:, order], b, atol=1e-5, rtol=1e-4)


def test_a_ragged_batch_equals_its_samples(model):
    """Padding, dropped captions and neighbours change nothing."""
    captions = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    x, t, position_ids = torch.randn(3, 4, 16), torch.tensor([0.2, 0.5, 0.9]), torch.arange(4)
    context = model.read_captions(captions).drop(torch.tensor([False, False, True]))
    together, _ = model.velocity(x, t, context, position_ids)
    for i, caption in enumerate(captions):
        alone = None if i == 2 else model.read_captions([caption])
        v, _ = model.velocity(x[i:i + 1], t[i:i + 1], alone, position_ids)
        torch.testing.assert_close(together[i:i + 1], v, atol=1e-5, rtol=1e-4)


def test_images_of_two_sizes_in_one_batch(model):
    """`latent_mask` hides padding latents, whatever is in them."""
    x, t = torch.randn(2, 6, 16), torch.tensor([0.2, 0.7])
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    context, position_ids = model.read_captions([[1, 2], [3, 4, 5]]), torch.arange(6)
    together, _ = model.velocity(x, t, context, position_ids, latent_mask=keep)
    alone, _ = model.velocity(x[1:, :4], t[1:], model.read_captions([[3, 4, 5]]), position_ids[:4])
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-4)


def test_frozen_understanding_gets_no_gradient_and_changes_no_value(model):
    x, t, position_ids = torch.randn(2, 4, 16), torch.tensor([0.2, 0.5]), torch.arange(4)
    context = model.read_captions([[1, 2], [3, 4]])
    free, _ = model.velocity(x, t, context, position_ids, frozen=False)
    with torch.no_grad():
        context = model.read_captions([[1, 2], [3, 4]])
    frozen, _ = model.velocity(x, t, context, position_ids, frozen=True)
    torch.testing.assert_close(frozen, free)
    frozen.square().sum().backward()
    assert all(p.grad is None for p in model.branch("understanding").values())
    assert all(p.grad.abs().sum() > 0 for k, p in model.branch("generation").items()
               if "k_proj.bias" not in k)     # softmax does not change with a bias of all keys


def test_shared_layers_are_one_object_and_own_layers_are_not():
    tower = Tower(3, 16, 2, 2, 8, 24, share=2)
    assert [layer.und is layer.gen for layer in tower.layers] == [True, True, False]
    assert tower.norm is not tower.norm_gen
    whole = Tower(2, 16, 2, 2, 8, 24, share=2)
    assert whole.norm is whole.norm_gen


def test_rope_turns_by_the_id_and_keeps_lengths():
    """Dot products depend on the difference of ids only; id 0 changes nothing."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = lambda x, i: rotate(x, rope(torch.tensor([[i]]), 8))      # noqa: E731
    torch.testing.assert_close(at(q, 0), q)
    torch.testing.assert_close((at(q, 7) * at(k, 4)).sum(), (at(q, 13) * at(k, 10)).sum())
    torch.testing.assert_close(at(q, 9).norm(), q.norm())
    assert (at(q, 1) - q).abs().max() > 0.01


@pytest.mark.parametrize("out, bias", [(512, True), (1408, False), (701, True)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 2), (8, 1), (2, 4), (9,)])
def test_few_rows_are_multiplied_as_many_are(shape, out, bias):
    """The way of few rows equals F.linear, gradients too, whatever the rows and the parts."""
    torch.manual_seed(0)
    layer, found = Linear(512, out, bias=bias), []
    for way in (layer.forward, torch.nn.Linear.forward.__get__(layer)):
        x = torch.randn(*shape, 512, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = way(x)
        assert y.shape == (*shape, out)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_documented_shapes(kv_heads):
    expert = Expert(32, 4, kv_heads, 10, 44)
    q, k, v = expert.qkv(torch.randn(2, 5, 32), rope(torch.arange(5)[None], 10))
    assert q.shape == (2, 4, 5, 10) and k.shape == v.shape == (2, kv_heads, 5, 10)
    assert expert.finish(torch.randn(2, 5, 32), q).shape == (2, 5, 32)
    context = Context([(k, v)], torch.tensor([5, 3]), torch.tensor([5, 3]), True)
    assert context.mask(4).shape == (2, 1, 1, 9) and context.mask(4).sum().item() == 9 + 7


def test_denoising_a_large_block_never_allocates_tokens_by_tokens():
    """4,096 latents over a padded 1,024-token context: below a third of one (l, l) fp32 matrix."""
    from torch.profiler import ProfilerActivity, profile
    torch.manual_seed(0)
    tower = Tower(1, 16, 1, 1, 16, 16)
    with torch.no_grad():
        _, context = tower.read_context(torch.randn(1, 1024, 16), torch.arange(1024)[None],
                                        torch.tensor([1000]))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            tower.denoise(torch.randn(1, 2, 16), torch.randn(1, 4096, 16), context)
    largest = max(e.cpu_memory_usage for e in seen.events())
    assert 0 < largest < 4096 * 5122 * 4 / 3
