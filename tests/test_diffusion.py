"""Rectified flow against closed forms; autoencoder by properties."""

import math

import pytest
import torch

from diffusion import (VAE, guide, path, position_ids, position_table, repa_loss, sample,
                       sample_time, shift_time, target, time_features, to_latents, to_tokens,
                       to_uint8, velocity_loss)


def test_time_convention():
    """t = 0 is the image, t = 1 the noise, v points from image to noise."""
    x0, eps = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(path(x0, eps, torch.zeros(2)), x0)
    torch.testing.assert_close(path(x0, eps, torch.ones(2)), eps)
    t, h = torch.tensor([0.3, 0.6]), 1e-3
    slope = (path(x0, eps, t + h) - path(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, target(x0, eps), atol=1e-3, rtol=1e-3)


def test_tokens_are_squares_of_latents_row_by_row():
    """As BAGEL's patchify: reshape (c, h, p, w, p), then h w p p c; one latent: flatten."""
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(to_tokens(latents, 1), latents.flatten(2).transpose(1, 2))
    tokens = to_tokens(latents, 2)
    assert tokens.shape == (2, 6, 12)
    for n, (row, column) in enumerate((r, c) for r in (0, 2) for c in (0, 2, 4)):
        square = latents[:, :, row:row + 2, column:column + 2]
        assert torch.equal(tokens[:, n], square.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(to_latents(tokens, 2, 2), latents)


@pytest.mark.parametrize("points", [2, 9])
def test_the_perfect_velocity_returns_the_image(points):
    """v = eps - x0 is constant, so Euler is exact, in one step or many, at any shift."""
    x0, eps = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    steps = list(sample(lambda x, t, guided: target(x0, eps), eps, points, scale=1.0))
    assert len(steps) == points - 1
    torch.testing.assert_close(steps[-1][2], x0, atol=1e-5, rtol=1e-5)
    flipped = list(sample(lambda x, t, guided: -target(x0, eps), eps, points, scale=1.0))[-1][2]
    assert (flipped - x0).abs().max() > 1


def test_euler_converges_to_the_exact_solution_of_a_gaussian():
    """x0 ~ N(0, s^2): the exact velocity is a(t) x, and noise lands on s * eps."""
    s, eps = 0.4, torch.randn(1, 2000, 1)

    def velocity(x, t, guided):
        t = t[0].item()
        return x * (t - (1 - t) * s * s) / (t * t + (1 - t) ** 2 * s * s)
    error = [(list(sample(velocity, eps, n, 1.0, scale=1.0))[-1][2] - s * eps).abs().mean().item()
             for n in (21, 41, 81)]
    assert error[2] < 0.02 and error[0] > 1.6 * error[1] > 2.5 * error[2]     # first order
    torch.manual_seed(0)        # new noise in each step leaves the law as it is, and forgets eps
    eps = torch.randn(1, 20_000, 1)
    new = list(sample(velocity, eps, 400, 1.0, scale=1.0, eta=1.0,
                      noise=lambda: torch.randn_like(eps)))[-1][2]
    assert abs(new.std().item() / s - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([new, eps]).flatten(1))[0, 1].item()) < 0.05


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eta_is_ddims(eta, shift):
    """Each step against Song et al. 2021, Eq. 12 and 16, in their own terms: y = x / sqrt((1-t)^2 +
    t^2) is their variance-preserving x, with alpha_t = (1-t)^2 / ((1-t)^2 + t^2)."""
    torch.manual_seed(1)
    x0, e, z = torch.randn(3, 2, 4, 3).double()
    times = shift_time(torch.linspace(1, 0, 6), shift).double()
    x, steps = e, sample(lambda x, t, guided: e - x0, e, 6, shift, scale=1.0, eta=eta,
                         noise=lambda: z)
    for t, after, (_, _, got) in zip(times, times[1:], steps):
        clean, noise = x - t * (e - x0), x + (1 - t) * (e - x0)     # what the network predicts
        alpha, alpha_after = ((1 - u) ** 2 / ((1 - u) ** 2 + u ** 2) for u in (t, after))
        sigma = eta * ((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)).sqrt()
        rest = (1 - alpha_after - sigma ** 2).clamp(min=0).sqrt()
        y = alpha_after.sqrt() * clean + rest * noise + sigma * z
        x = y * ((1 - after) ** 2 + after ** 2).sqrt()
        torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_any_eta_keeps_the_variance_of_a_gaussian(eta):
    """x0 ~ N(0, s^2): after a step to time u the variance is (1-u)^2 s^2 + u^2, whatever eta."""
    torch.manual_seed(0)
    s, u = 0.4, shift_time(torch.tensor(0.75), 3.0).item()
    x0, e = s * torch.randn(1, 400_000, 1), torch.randn(1, 400_000, 1)
    _, _, x = next(sample(lambda x, t, guided: e - x0, e, 5, scale=1.0, eta=eta,
                          noise=lambda: torch.randn_like(e)))
    assert abs(x.var().item() / ((1 - u) ** 2 * s * s + u * u) - 1) < 0.01


def test_guidance_switches_on_inside_the_interval_and_costs_nothing_outside():
    asked = []

    def velocity(x, t, guided):
        asked.append((round(t[0].item(), 4), guided))
        return (x, x) if guided else x
    list(sample(velocity, torch.randn(1, 4, 2), 11, 1.0, scale=2.0, interval=(0.4, 0.8)))
    assert sorted(t for t, guided in asked if guided) == [0.5, 0.6, 0.7, 0.8]   # lo < t <= hi
    assert len(asked) == 10
    asked.clear()
    list(sample(velocity, torch.randn(1, 4, 2), 11, scale=1.0))
    assert not any(guided for _, guided in asked) and len(asked) == 10


def test_guide():
    """Scale 1 is the conditional velocity; renormed, none is longer than that."""
    c, u = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    torch.testing.assert_close(guide(c, u, 1.0), c)
    torch.testing.assert_close(guide(c, u, 3.0, None), u + 3 * (c - u))
    assert (guide(c, u, 5.0).flatten(1).norm(dim=1) <= c.flatten(1).norm(dim=1) + 1e-4).all()
    assert (guide(c, u, 5.0, "channel").norm(dim=2) <= c.norm(dim=2) + 1e-4).all()
    alone = torch.cat([guide(c[i:i + 1], u[i:i + 1], 3.0) for i in range(3)])
    torch.testing.assert_close(guide(c, u, 3.0), alone)         # each sample by itself


def test_times():
    """Shift fixes 0 and 1 and moves the middle to s / (1 + s); training times are logit-normal."""
    shifted = shift_time(torch.tensor([0., .5, 1.]), 3.0)
    torch.testing.assert_close(shifted, torch.tensor([0., .75, 1.]))
    for shift in (1.0, 4.0):
        z = torch.logit(sample_time(200_000, torch.Generator().manual_seed(0), shift).double())
        assert abs(z.mean() - math.log(shift)) < 0.01 and abs(z.std() - 1) < 0.01


def test_loss_is_the_mean_square_of_the_velocity_error():
    x0, eps = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    loss = velocity_loss(target(x0, eps) + 0.5, x0, eps)
    torch.testing.assert_close(loss, torch.full((2,), 0.25))


def test_repa_compares_what_lies_at_the_same_place():
    """A teacher's 4 x 4 features, no two alike, against states on 2 x 2, 4 x 4 and 8 x 8: the best
    states are the means of squares, the features, and features between which one interpolates."""
    features = torch.randn(1, 16, 8)
    grid = features.view(4, 4, 8)
    means = grid.view(2, 2, 2, 2, 8).mean((1, 3)).reshape(1, 4, 8)
    torch.testing.assert_close(repa_loss(means, features, (2, 2)), torch.tensor([-1.0]))
    torch.testing.assert_close(repa_loss(3 * features, features, (4, 4)), torch.tensor([-1.0]))
    turned = grid.transpose(0, 1).reshape(1, 16, 8)
    assert repa_loss(turned, features, (4, 4)) > -0.9
    corner = grid[:2, :2].mean((0, 1))          # weights 1/4 and 3/4 a side, at row 1, column 1
    inner = (9 * grid[0, 0] + 3 * grid[0, 1] + 3 * grid[1, 0] + grid[1, 1]) / 16
    states = torch.zeros(1, 64, 8)
    states[0, 8 + 1] = inner
    assert abs(64 * repa_loss(states, features, (8, 8)) + 1) < 1e-4
    states[0, 8 + 1] = corner
    assert 64 * repa_loss(states, features, (8, 8)) > -0.999


def test_time_features_and_position_table_by_hand():
    f = time_features(torch.tensor([0.5]), 4)
    want = [math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)]
    torch.testing.assert_close(f[0], torch.tensor(want))
    table = position_table(4, 8)            # row 2, column 3 -> [sin, cos of column | of row]
    want = [f(n * r) for n in (3, 2) for f in (math.sin, math.cos) for r in (1, 0.01)]
    torch.testing.assert_close(table[2 * 4 + 3], torch.tensor(want))


def test_a_larger_image_reads_more_of_the_same_table():
    assert position_ids(2, 3, 32).tolist() == [0, 1, 2, 32, 33, 34]
    assert set(position_ids(16, 16, 32).tolist()) < set(position_ids(32, 32, 32).tolist())


def test_interpolated_positions_are_the_same_at_every_size():
    """Row and column 2i of an image twice as large are row and column i; the largest has all."""
    small, large = (position_ids(n, n, 16, interpolate=True).view(n, n) for n in (8, 16))
    assert torch.equal(large[::2, ::2], small)
    assert large.flatten().tolist() == list(range(256))


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(ch=32, mult=[1, 2, 2], blocks=1, attn=[2], z=6, embed=5, scale=0.7,
               latent_mean=0.1).eval()


def test_vae_sizes_are_read_off_the_weights(vae):
    assert VAE.sizes(vae.state_dict()) == {"ch": 32, "mult": [1, 2, 2], "blocks": 1, "attn": [2],
                                           "z": 6, "embed": 5}


@torch.no_grad()
def test_vae_shapes_units_and_sampling(vae):
    moments = vae.moments(torch.randn(2, 3, 16, 24))
    assert moments.shape == (2, 10, 4, 6)
    mean, logvar = moments.chunk(2, dim=1)
    torch.testing.assert_close(vae.latents(moments), 0.7 * (mean - 0.1))
    eps = torch.randn_like(mean)
    want = 0.7 * (mean + eps * (logvar / 2).exp() - 0.1)
    torch.testing.assert_close(vae.latents(moments, eps), want)
    images = vae.decode(vae.latents(moments))
    wild = torch.cat([mean, torch.full_like(mean, 10.0)], dim=1)        # within [-30, 20]
    torch.testing.assert_close(vae.latents(wild, eps), 0.7 * (mean + eps * math.exp(5) - 0.1))
    assert images.shape == (2, 3, 16, 24)
    torch.testing.assert_close(images, vae.decoder(vae.post_quant_conv(mean)))


def test_to_uint8_truncates():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(pixels).tolist() == [0, 0, 127, 254, 255, 255]


def test_a_new_autoencoder_starts_with_orthogonal_convolutions_and_empty_residuals():
    vae = VAE(ch=32, mult=(1, 2), blocks=1, attn=(1,), z=4, embed=4)
    for conv in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.quant_conv):
        s = torch.linalg.svdvals(conv.weight.flatten(1))
        torch.testing.assert_close(s, torch.ones_like(s), atol=1e-4, rtol=0)
    mean, logvar = vae.moments(torch.randn(2, 3, 8, 8)).chunk(2, dim=1)
    assert abs(logvar.mean() + 8) < 0.5 and mean.std() > 0.1        # a sample is near its mean
    x = torch.randn(2, 64, 4, 4)
    for part in vae.encoder.mid.values():
        assert torch.equal(part(x), x)


@pytest.mark.parametrize("shift", [0.14, 0.2, 0.4, 1.0, 3.0])
def test_the_first_step_is_guided_at_any_shift(shift):
    """Some shifts below 1 gave t = 1.0000001, where guidance up to t = 1 is off."""
    seen = []
    def velocity(x, t, guided):
        seen.append(guided)
        return (x, x) if guided else x
    for t, _, _ in sample(velocity, torch.zeros(1, 2, 3), points=3, shift=shift):
        assert t <= 1
    assert seen[0]
