"""Exercise 5: what is added to a latent token, its time and its position."""

import math

import torch

import pictures
from course import close, install

TITLE = "Where is a token, and when"
EQUATION = "Sec. 3.3 and 3.4"
LAB = "flow"
MINUTES = 30
DIFFICULTY = 2
TARGETS = ["diffusion.time_features", "diffusion.position_table", "diffusion.position_ids"]
TEXT = """
A latent token enters the tower as `Linear(x_t) + time + position`. Both are made of sines and
cosines. The paper is silent on details; these are the released code's.

**`time_features(t, dim)`**: t `(b,)` in [0, 1], *unscaled* (not times 1000), gives `(b, dim)`,
first all cosines, then all sines:

    rate_i = 10000^(-i / (dim/2)),   i = 0 ... dim/2 - 1
    [cos(t rate_0), cos(t rate_1), ..., sin(t rate_0), sin(t rate_1), ...]

**`position_table(side, width)`**: a table `(side * side, width)`, float32, one row for each place
of a square. Place (row, column) is table row `row * side + column`. The **first half** of the
channels says the **column**, the second half the row. Each half, of a number `p`, is first all
**sines**, then all cosines (the other way round than for time):

    rate_i = 10000^(-i / (width/4)),   i = 0 ... width/4 - 1
    [sin(p rate_0), sin(p rate_1), ..., cos(p rate_0), cos(p rate_1), ...]

**`position_ids(h, w, side, interpolate)`**: which table rows the tokens of an image of h x w tokens
use, `(h w,)`, integers; tokens are row by row. Without `interpolate` the image takes the corner of
the table: token (r, c) has `r * side + c`. So a larger image needs no new weights (stage 3). With
`interpolate` it is spread over the whole table: row `r * side // h` and column `c * side // w`
(integer division).

Worked examples:

```
time_features([0.5], dim=4)  = [cos .5, cos .005, sin .5, sin .005]
position_table(4, 8)[2*4 + 3] = [sin 3, sin .03, cos 3, cos .03, sin 2, sin .02, cos 2, cos .02]
position_ids(2, 3, side=32) = [0, 1, 2, 32, 33, 34]
position_ids(2, 2, side=8, interpolate=True) = [0, 4, 32, 36]
```
"""
HINTS = (
    "Write the worked examples as a test first; each choice (order of sines and cosines, row or "
    "column first) shows in them.",
    "An outer product gives all angles at once: `t[:, None] * rate`, then `torch.cat` of two "
    "halves. For the table make one line of `side` places, then use it for columns and rows.",
    "`line[None].expand(side, -1, -1)` varies with the column, `line[:, None].expand(-1, side, "
    "-1)` with the row. Concatenate on the last axis, then flatten the first two.",
)
SEES = ("Left: how alike two places are to all others: darkest at the place itself, and in a cross "
        "along its row and its column. Middle: the table's rows that 4 x 4 tokens use with "
        "`interpolate`. Right: the features of time, fast channels first.")


def slow_time(t, dim=256):
    rates = [10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return torch.tensor([[math.cos(x * r) for r in rates] + [math.sin(x * r) for r in rates]
                         for x in t.tolist()])


def slow_table(side, width):
    rates, table = [10000 ** (-i / (width // 4)) for i in range(width // 4)], []
    for row in range(side):
        for column in range(side):
            table.append([f(p * r) for p in (column, row) for f in (math.sin, math.cos)
                          for r in rates])
    return torch.tensor(table)


def slow_ids(h, w, side, interpolate=False):
    if interpolate:
        return torch.tensor([(r * side // h) * side + c * side // w
                             for r in range(h) for c in range(w)])
    return torch.tensor([r * side + c for r in range(h) for c in range(w)])


def check_time(lib, seed):
    """time_features(): [cosines | sines] of t at falling rates."""
    t = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    for dim in (4, 64):
        got, want = lib.diffusion.time_features(t, dim), slow_time(t, dim)
        if isinstance(got, torch.Tensor) and got.shape == want.shape:
            flipped = torch.cat(want.chunk(2, 1)[::-1], 1)
            assert not torch.allclose(got.float(), flipped, atol=1e-4), (
                "time_features() must put the cosines first, then the sines")
            assert not torch.allclose(got.float(), slow_time(t * 1000, dim), atol=1e-2), (
                "time_features() must take t as it is, in [0, 1]: not times 1000")
        close(got, want, f"time_features() must be [cos | sin] of t * 10000^(-i / (dim/2)), dim = "
              f"{dim}")
    close(lib.diffusion.time_features(t), slow_time(t), "time_features() must have 256 channels by "
          "default")


def check_time_end(lib, seed):
    """At t = 0 cosines are 1 and sines 0."""
    got = lib.diffusion.time_features(torch.zeros(2), 8)
    close(got, torch.tensor([[1.0] * 4 + [0.0] * 4] * 2), "at t = 0 the features must be four ones "
          "(cosines), then four zeros (sines)")


def check_table_shape(lib, seed):
    """position_table(): (side * side, width), float32."""
    for side, width in ((3, 8), (5, 16)):
        got = lib.diffusion.position_table(side, width)
        assert got.shape == (side * side, width), (
            f"position_table({side}, {width}) must have shape ({side * side}, {width}), not "
            f"{tuple(got.shape)}")
        assert got.dtype == torch.float32, "position_table() must be float32"


def check_table(lib, seed):
    """The first half of the channels is the column, the second the row; each [sin | cos]."""
    for side, width in ((4, 8), (7, 32)):
        got, want = lib.diffusion.position_table(side, width), slow_table(side, width)
        a, b = want.chunk(2, 1)
        assert differs_from(got, torch.cat([b, a], 1)), (
            "the first half of the channels must be the column, the second half the row: they are "
            "swapped, or the places are column by column")
        halves = [torch.cat(h.chunk(2, 1)[::-1], 1) for h in (a, b)]
        assert differs_from(got, torch.cat(halves, 1)), (
            "each half of the table must be [sines | cosines]: they are swapped")
        close(got, want, "row (row * side + column) of the table must be [sin | cos of the column, "
              "sin | cos of the row] at rates 10000^(-i / (width/4))")


def differs_from(got, other) -> bool:
    return got.shape != other.shape or not torch.allclose(got.float(), other, atol=1e-4)


def check_ids(lib, seed):
    """position_ids(): tokens row by row, row * side + column."""
    for h, w, side in ((2, 3, 32), (4, 2, 8), (1, 5, 6)):
        got = lib.diffusion.position_ids(h, w, side)
        assert not got.is_floating_point(), "position_ids() must be integers, to index a table"
        assert got.shape == (h * w,), (
            f"position_ids() must have shape (h w,), not {tuple(got.shape)}")
        columns = slow_ids(h, w, side).view(h, w).T.flatten()
        assert min(h, w) == 1 or not torch.equal(got, columns), (
            "position_ids() must go through the tokens row by row, not column by column")
        assert h == 1 or w == side or not torch.equal(got, torch.arange(h * w)), (
            "a row of the table has `side` places, not w: row * side + column")
        assert torch.equal(got, slow_ids(h, w, side)), (
            f"position_ids({h}, {w}, {side}) must be row * side + column, row by row")


def check_ids_interpolated(lib, seed):
    """With interpolate, an image of any size is spread over the whole table."""
    for h, w, side in ((2, 2, 8), (4, 2, 8), (3, 5, 7), (8, 8, 8)):
        got = lib.diffusion.position_ids(h, w, side, True)
        assert got.shape == (h * w,) and torch.equal(got.long(), slow_ids(h, w, side, True)), (
            f"position_ids({h}, {w}, {side}, interpolate=True) must have row r * side // h and "
            "column c * side // w")


def check_they_fit(lib, seed):
    """The ids pick the right rows of the table."""
    table, ids = lib.diffusion.position_table(6, 8), lib.diffusion.position_ids(2, 4, 6)
    want = [[f(p * r) for p in (c, r0) for f in (math.sin, math.cos) for r in (1, 0.01)]
            for r0 in range(2) for c in range(4)]
    close(table[ids], torch.tensor(want), "position_table()[position_ids()] must hold column and "
          "row of each token")


def expected(lib):
    return install(lib, {"diffusion.time_features": slow_time,
                         "diffusion.position_table": slow_table,
                         "diffusion.position_ids": slow_ids})


def show(lib):
    table, maps = lib.diffusion.position_table(16, 64), []
    table = table / table.norm(dim=1, keepdim=True)
    for row, column in ((3, 4), (10, 12)):
        cosine = (table @ table[row * 16 + column]).view(16, 16)
        maps.append(pictures.titled(pictures.matrix(cosine, cell=10, low=0.6), "alike to row "
                                    f"{row}, column {column}", 12))
    ids = lib.diffusion.position_ids(4, 4, 16, True)
    used = torch.zeros(256)
    used[ids] = 1
    maps.append(pictures.titled(pictures.matrix(used.view(16, 16), cell=10), "rows of 4 x 4 tokens",
                                12))
    features = lib.diffusion.time_features(torch.linspace(0, 1, 16), 24)
    maps.append(pictures.titled(pictures.matrix(features, [f"t = {k / 15:.2f}" if k % 5 == 0 else ""
                for k in range(16)], cell=10, low=-1, signed=True), "features of time", 12))
    return pictures.beside(maps, 18)


RIGHT = {
    "diffusion.time_features": """
def time_features(t, dim=256):
    half = dim // 2
    out = torch.empty(len(t), dim)
    for i in range(half):
        angle = t / 10000 ** (i / half)
        out[:, i], out[:, half + i] = torch.cos(angle), torch.sin(angle)
    return out
""",
    "diffusion.position_table": """
def position_table(side, width):
    q = width // 4
    rate = torch.exp(-math.log(10000.0) * torch.arange(q).double() / q)
    place = torch.arange(side * side)
    out = torch.empty(side * side, width)
    for k, p in enumerate((place % side, place // side)):
        angle = torch.outer(p.double(), rate)
        out[:, 2 * k * q:(2 * k + 1) * q] = angle.sin()
        out[:, (2 * k + 1) * q:(2 * k + 2) * q] = angle.cos()
    return out
""",
    "diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    n = torch.arange(h * w)
    row, column = torch.div(n, w, rounding_mode="floor"), n % w
    if interpolate:
        row = torch.div(row * side, h, rounding_mode="floor")
        column = torch.div(column * side, w, rounding_mode="floor")
    return row * side + column
""",
}


def table(half: str, cat: str, rate: str = "width // 4") -> dict:
    return {"diffusion.position_table": f"""
def position_table(side, width):
    rate = 10000.0 ** -(torch.arange(width // 4) / ({rate}))
    angle = torch.arange(side)[:, None] * rate
    line = torch.cat([{half}], 1)
    column = line[None].expand(side, -1, -1)
    row = line[:, None].expand(-1, side, -1)
    return torch.cat([{cat}], -1).reshape(side * side, width)
"""}


def times(rate: str, cat: str) -> dict:
    return {"diffusion.time_features": f"""
def time_features(t, dim=256):
    half = dim // 2
    rate = {rate}
    angle = t[:, None] * rate
    return {cat}
"""}


RATE, CAT = "10000.0 ** (-torch.arange(half) / half)", "torch.cat([angle.cos(), angle.sin()], -1)"
WRONG = {
    "sines of time first": times(RATE, "torch.cat([angle.sin(), angle.cos()], -1)"),
    "time by 1000": times("1000 * " + RATE, CAT),
    "cosines and sines alternate": times(RATE, "torch.stack([angle.cos(), angle.sin()], "
                                         "-1).flatten(1)"),
    "rates to the end": times("10000.0 ** (-torch.arange(half) / (half - 1))", CAT),
    "rates of twice the step": times("10000.0 ** (-2 * torch.arange(half) / half)", CAT),
    "time in turns": times("2 * math.pi * " + RATE, CAT),
    "the row first": table("angle.sin(), angle.cos()", "row, column"),
    "cosines of places first": table("angle.cos(), angle.sin()", "column, row"),
    "rates of half the width": table("angle.sin(), angle.cos()", "column, row", "width // 2"),
    "rates that end at 1/10000": table("angle.sin(), angle.cos()", "column, row",
                                       "width // 4 - 1"),
    "column by column": {"diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row, column = row * side // h, column * side // w
    return (row[None] * side + column[:, None]).flatten()
"""},
    "w for side": {"diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row, column = row * side // h, column * side // w
    return (row[:, None] * w + column).flatten()
"""},
    "one step for both axes": {"diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row, column = row * (side // max(h, w)), column * (side // max(h, w))
    return (row[:, None] * side + column).flatten()
"""},
    "the ends of the table": {"diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row = torch.linspace(0, side - 1, h).round().long()
        column = torch.linspace(0, side - 1, w).round().long()
    return (row[:, None] * side + column).flatten()
"""},
    "a grid, not a list": {"diffusion.position_ids": """
def position_ids(h, w, side, interpolate=False):
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row, column = row * side // h, column * side // w
    return row[:, None] * side + column
"""},
}
