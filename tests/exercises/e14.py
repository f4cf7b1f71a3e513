"""Exercise 14: REPA, in two dimensions."""

import torch
import torch.nn.functional as F

import oracles_training as oracle
import pictures
from course import close, install

TITLE = "REPA in two dimensions"
EQUATION = "Sec. 3.4"
LAB = "training"
MINUTES = 25
DIFFICULTY = 2
TARGETS = ["diffusion.repa_loss"]
TEXT = """
REPA teaches the generation tower what a pretrained encoder knows: the states of the latent tokens
after some layer, sent through a small projector, should point where the encoder's features of the
clean image point. The loss is the **negative cosine**: -1 where they agree.

`repa_loss(states, features, grid)` gets projected states `(b, n, d)`, which lie row by row on a
grid of `grid = (h, w)` tokens, n = h w, and the teacher's features `(b, m, d)`, which lie row by
row on a square of `sqrt(m)` a side. Return one value **a sample**, `(b,)`: the mean over the n
tokens of minus the cosine between a state and the feature at its place.

Both cover the whole image, so the teacher's square is resized to `(h, w)` **as an image**, with
rows and columns: by the average of the area that a token covers where tokens are coarser than the
teacher's patches, and by bilinear interpolation where they are finer (`h` decides for both axes: it
is smaller than the side, or it is not). If the grids are equal, nothing is resized. `F.interpolate`
does both (`mode="area"`, `mode="bilinear"` with centres on centres, its default). Resize features
as they are; only the cosine normalises. Features are fp32; states may be bf16, so take the cosine
in fp32. The teacher is frozen, so its features carry no gradient to detach.

The released code has two faults here. It stretches the list of states from 256 to 1369 entries (the
teacher has 37 x 37 patches) along the raster line, so that states are compared with features of
other rows. And it divides by
the batch twice, so that the weight depends on the batch size.

Worked example: the teacher sees 4 x 4 patches, the grid is 2 x 2. State 1 (top right; counted from 0) is compared
with the mean of patches 2, 3, 6 and 7. Along the raster line it would have been 4, 5, 6, 7.
"""
HINTS = (
    "A list of tokens is an image whose rows were put one behind the other. Make it an image again.",
    "`F.interpolate` wants channels first, `(b, d, side, side)`. What has to happen after it, so "
    "that features and states lie alike?",
    "rearrange to `b d h w`, `F.interpolate(features, grid, mode=...)`, rearrange to `b (h w) d`, "
    "then `-F.cosine_similarity(states.float(), features, dim=-1).mean(1)`.",
)
SEES = ("The cosine of one token's state with every place: red where features agree, blue where they "
        "are opposite. The pattern is that of the image; along the raster line it would be stripes.")


def slow_repa_loss(states, features, grid):
    side, (h, w) = round(features.shape[1] ** 0.5), grid
    out = []
    for s, f in zip(states.float(), features.float()):
        f = f.reshape(side, side, -1)
        if (side, side) != (h, w):
            f = oracle.area(f, h, w) if h < side else oracle.bilinear(f, h, w)
        total = 0
        for a, b in zip(s, f.reshape(h * w, -1)):
            total = total - (a @ b) / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-8)
        out.append(total / (h * w))
    return torch.stack(out)


def inputs(seed, b, grid, side, d=6):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(b, grid[0] * grid[1], d, generator=rng),
            torch.randn(b, side * side, d, generator=rng))


def check_batch(lib, seed):
    """The loss of a sample does not depend on the batch around it."""
    states, features = inputs(seed, 5, (2, 2), 4)
    both = lib.diffusion.repa_loss(states, features, (2, 2))
    assert both.shape == (5,), ("repa_loss() must return one value a sample, (b,), not "
                                f"{tuple(both.shape)}")
    one = lib.diffusion.repa_loss(states[3:4], features[3:4], (2, 2))
    close(both[3:4], one, "the loss of a sample must not depend on the batch: the released code "
          "divides by the batch once too often")


def check_sign(lib, seed):
    """The loss is -1 where states point as the features do, +1 where they point away."""
    _, features = inputs(seed, 3, (4, 4), 1)
    features = features.expand(3, 16, -1)                       # alike at every place
    got = lib.diffusion.repa_loss(2.5 * features, features, (4, 4))
    assert not float(got.mean()) > 0, ("repa_loss() must pull states towards the features: the "
                                       "cosine counts with a minus sign")
    assert not bool((got < -15).all()), "the loss must be the mean over tokens, not their sum"
    close(got, -torch.ones(3), "where states are a multiple of the features, the loss must be -1, "
          "whatever their lengths and the batch size")
    close(lib.diffusion.repa_loss(-features, features, (4, 4)), torch.ones(3),
          "where states point away from the features, the loss must be +1")


def check_rows_and_columns(lib, seed):
    """Features are resized as an image: a token is compared with what lies at its place."""
    side, d = 6, 6
    features = torch.zeros(1, side, side, d)
    for i in range(side):
        for j in range(side):                       # each third of the image has its own direction
            features[0, i, j, (i // 3) * 2 + (j // 3)] = 1.0
    states = torch.eye(4, d)[None]
    got = lib.diffusion.repa_loss(states, features.flatten(1, 2), (2, 2))
    flipped = lib.diffusion.repa_loss(states[:, [0, 2, 1, 3]], features.flatten(1, 2), (2, 2))
    assert not float(flipped[0]) < float(got[0]) - 0.1, (
        "rows and columns are exchanged: tokens are row-major, and so are features")
    close(got, -torch.ones(1), "features must be resized in two dimensions, rows and columns: along "
          "the raster line a token meets features of another row")


def check_equal_grids(lib, seed):
    """On equal grids it is minus the mean over tokens of the cosine."""
    states, features = inputs(seed, 3, (4, 4), 4)
    got = lib.diffusion.repa_loss(states, features, (4, 4))
    close(got, slow_repa_loss(states, features, (4, 4)), "on equal grids the loss of a sample must "
          "be minus the mean of its tokens' cosines, taken token by token over the channels")


def check_coarser(lib, seed):
    """Where tokens are coarser, a token takes the average of the area that it covers."""
    for side, grid in ((4, (2, 2)), (6, (3, 3)), (7, (3, 3)), (8, (2, 4)), (6, (3, 2))):
        states, features = inputs(seed + side, 2, grid, side)
        got = lib.diffusion.repa_loss(states, features, grid)
        close(got, slow_repa_loss(states, features, grid), "where tokens are coarser than patches, "
              f"a token's feature must be the average of the area it covers ({side} x {side} to "
              f"{grid[0]} x {grid[1]})")


def check_finer(lib, seed):
    """Where tokens are finer, features are interpolated between the centres of patches."""
    for side, grid in ((3, (6, 6)), (2, (5, 5)), (3, (4, 7))):
        states, features = inputs(seed + side, 2, grid, side)
        got = lib.diffusion.repa_loss(states, features, grid)
        close(got, slow_repa_loss(states, features, grid), "where tokens are finer than patches, "
              "features must be interpolated bilinearly, centres on centres (align_corners=False; "
              f"{side} x {side} to {grid[0]} x {grid[1]})")


def check_gradient(lib, seed):
    """The loss teaches the states; in bf16 it is still taken in fp32."""
    states, features = inputs(seed, 2, (2, 2), 4)
    states.requires_grad_(True)
    loss = lib.diffusion.repa_loss(states, features, (2, 2)).sum()
    assert loss.requires_grad, "the loss must teach the states: it has no gradient"
    loss.backward()
    assert states.grad is not None and bool(states.grad.any()), "the loss must teach the states"
    half = states.detach().bfloat16()
    got = lib.diffusion.repa_loss(half, features, (2, 2))
    assert got.dtype == torch.float32, f"with bf16 states the loss must be fp32, not {got.dtype}"
    close(got, slow_repa_loss(half, features, (2, 2)), "with bf16 states the cosine must be taken "
          "in fp32")


def expected(lib):
    return install(lib, {"diffusion.repa_loss": slow_repa_loss})


def show(lib):
    """The cosine of every token, measured by giving one token at a time a state."""
    image = torch.from_numpy(lib.data.phantom("val", 3, 64).image).float()
    side, grid = 16, (8, 8)
    patches = image.reshape(side, 4, side, 4).transpose(1, 2).reshape(side * side, 16)
    patches = (patches - patches.mean(0)) / 40
    states = F.adaptive_avg_pool2d(patches.T.reshape(1, 16, side, side), grid)
    states = states.flatten(2).transpose(1, 2)              # (1, 64, 16): a perfect student
    probe = states[0, 27].expand(64, 1, 16)                 # one token's state, at each place
    found = torch.zeros(64, 64, 16)
    found[torch.arange(64), torch.arange(64)] = probe[:, 0]
    cosine = -64 * lib.diffusion.repa_loss(found, patches[None].expand(64, -1, -1), grid)
    best = -float(lib.diffusion.repa_loss(states, patches[None], grid)[0])
    shown = pictures.matrix(cosine.reshape(grid), low=-1.0, high=1.0, signed=True)
    return pictures.beside([
        pictures.images([image.numpy()], ["image"], 1, 176),
        pictures.titled(shown, "cosine of the state of one token (row 3, column 3) with each place"),
        pictures.message(f"a student who is right at every place: cosine {best:.3f}", 230)])


RIGHT = {"diffusion.repa_loss": """
def repa_loss(states, features, grid):
    b, m, d = features.shape
    side, (h, w) = int(round(m ** 0.5)), grid
    maps = features.float().permute(0, 2, 1).reshape(b, d, side, side)
    if (h, w) != (side, side):
        maps = (F.adaptive_avg_pool2d(maps, (h, w)) if h < side else
                F.interpolate(maps, size=(h, w), mode="bilinear", align_corners=False))
    a = F.normalize(states.float(), dim=-1)
    c = F.normalize(maps.reshape(b, d, h * w).permute(0, 2, 1), dim=-1)
    return -torch.einsum("bnd,bnd->b", a, c) / (h * w)
"""}


def _wrong(how: str, loss: str) -> dict:
    return {"diffusion.repa_loss": f"""
def repa_loss(states, features, grid):
    side = math.isqrt(features.shape[1])
    {how}
    return {loss}
"""}


_LIST = "features = rearrange(features, 'b (h w) d -> b d h w', h=side); "
_BACK = "; features = rearrange(features, 'b d h w -> b (h w) d')"
_RESIZE = (_LIST + "features = F.interpolate(features, grid, mode='area' if grid[0] < side else "
           "'bilinear')" + _BACK)
_LOSS = "-F.cosine_similarity(states.float(), features, dim=-1).mean(1)"
WRONG = {
    "stretched along the raster line": _wrong(
        "features = F.interpolate(features.transpose(1, 2), states.shape[1], "
        "mode='linear').transpose(1, 2)", _LOSS),
    "cut along the raster line": _wrong(
        "features = F.adaptive_avg_pool1d(features.transpose(1, 2), "
        "states.shape[1]).transpose(1, 2)", _LOSS),
    "divided by the batch twice": _wrong(_RESIZE, _LOSS + " / len(states)"),
    "one value for the batch": _wrong(_RESIZE, _LOSS + ".mean()"),
    "pushes away": _wrong(_RESIZE, _LOSS[1:]),
    "one minus the cosine": _wrong(_RESIZE, "1 " + _LOSS),
    "not normalised": _wrong(_RESIZE, "-(states.float() * features).sum(-1).mean(1)"),
    "cosine of the whole image": _wrong(
        _RESIZE, "-F.cosine_similarity(states.float().flatten(1), features.flatten(1), dim=1)"),
    "cosine over tokens": _wrong(
        _RESIZE, "-F.cosine_similarity(states.float(), features, dim=1).mean(1)"),
    "sum over tokens": _wrong(_RESIZE, "-F.cosine_similarity(states.float(), features, "
                                       "dim=-1).sum(1)"),
    "columns for rows": _wrong(
        _RESIZE.replace("b d h w -> b (h w) d", "b d h w -> b (w h) d"), _LOSS),
    "nearest": _wrong(_LIST + "features = F.interpolate(features, grid)" + _BACK, _LOSS),
    "bilinear to coarser grids": _wrong(
        _LIST + "features = F.interpolate(features, grid, mode='bilinear')" + _BACK, _LOSS),
    "area to finer grids": _wrong(
        _LIST + "features = F.interpolate(features, grid, mode='area')" + _BACK, _LOSS),
    "corners on corners": _wrong(
        _LIST + "features = F.interpolate(features, grid, mode='area') if grid[0] < side else "
        "F.interpolate(features, grid, mode='bilinear', align_corners=True)" + _BACK, _LOSS),
    "squared distance": _wrong(
        _RESIZE, "(states.float() - features).square().mean(-1).mean(1) - 1"),
    "states without gradient": _wrong(
        _RESIZE, "-F.cosine_similarity(states.detach().float(), features, dim=-1).mean(1)"),
}
