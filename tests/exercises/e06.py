"""Exercise 6: rotary position embeddings."""

import torch

import oracles
import pictures
from course import close, differs, install, noise

TITLE = "Rotary positions"
EQUATION = "Eq. 3-5"
LAB = "towers"
MINUTES = 25
DIFFICULTY = 2
TARGETS = ["joint_attn.rope", "joint_attn.rotate"]
TEXT = """
Attention knows no order. RoPE gives it one: queries and keys are turned by an angle that grows with
their position, so that a dot product depends on the *difference* of two positions.

For a head of width `k`, channel `i` and channel `i + k/2` are a pair (i = 0 ... k/2 - 1): the
convention of LLaMA, on which the released weights rely. Other code pairs neighbours, 2i and 2i + 1;
that is wrong here, though nothing but the official numbers shows it. Position `p` turns pair i by

    angle_i = p * 10000^(-2i / k)
    new a = a cos(angle_i) - b sin(angle_i)      a: channel i,  b: channel i + k/2
    new b = a sin(angle_i) + b cos(angle_i)

- `rope(ids, dim)` takes positions `(b, l)` (integers; they may repeat: a whole image block has one)
  and the width of a head. It returns a pair (cosines, sines), each `(b, 1, l, dim)`, float32.
- `rotate(x, cos_sin)` turns x `(b, h, l, k)` by what `rope` returned; same shape, same dtype as x
  (x may be bfloat16).

The two functions are judged together. So it is your choice whether the sines' first half is
negative, as the docstring says, or whether `rotate` puts the sign. The constant THETA in
`joint_attn.py` is 10000.

Worked example, k = 4, position 2, x = [1, 0, 0, 1]: angles are 2 and 0.02. Pair (1, 0) becomes
(cos 2, sin 2), pair (0, 1) becomes (-sin .02, cos .02). Result:
[cos 2, -sin .02, sin 2, cos .02].
"""
HINTS = (
    "Think of a pair as a complex number a + ib. What multiplies it?",
    "Give cosines and sines all `dim` channels, the same in both halves, so that `x * cos` needs "
    "no slicing. The other term is x with its halves exchanged.",
    "`x.roll(k // 2, -1)` exchanges the halves. The new first half needs -sin, the new second half "
    "+sin. Compute in float32 and convert back to `x.dtype` at the end.",
)
SEES = ("The dot product of a vector with itself, turned to another position: highest at distance "
        "0, the same for both directions and at all positions; slow channels make it fall slowly.")


def turned(lib, x, ids):
    """rotate(x, rope(ids)): x (b, h, l, k), ids (b, l)."""
    return lib.joint_attn.rotate(x, lib.joint_attn.rope(ids, x.shape[-1]))


def check_shape(lib, seed):
    """rope(): cosines and sines, each (b, 1, l, dim), float32."""
    found = lib.joint_attn.rope(torch.arange(10).view(2, 5), 8)
    assert len(found) == 2, "rope() must return a pair: cosines and sines"
    for part in found:
        assert part.shape == (2, 1, 5, 8), (
            f"rope() must return two tensors (b, 1, l, dim), not {tuple(part.shape)}")
        assert part.dtype == torch.float32, "rope() must return float32"


def check_zero(lib, seed):
    """Position 0 changes nothing."""
    x = noise(seed, 1, 2, 3, 8)
    close(turned(lib, x, torch.zeros(1, 3, dtype=torch.long)), x, "position 0 must change nothing")


def check_length(lib, seed):
    """A rotation keeps lengths, and changes the vector."""
    x, ids = noise(seed, 2, 2, 4, 8), torch.tensor([[1, 5, 9, 100]]).expand(2, -1)
    got = turned(lib, x, ids)
    close(got.norm(dim=-1), x.norm(dim=-1), "a rotation must keep the length of each head's vector")
    assert differs(got, x), "rotate() changes nothing at positions above 0"


def check_difference(lib, seed):
    """Dot products depend on the difference of two positions only."""
    q, k = noise(seed, 1, 1, 1, 8), noise(seed + 1, 1, 1, 1, 8)

    def dot(i, j):
        return (turned(lib, q, torch.tensor([[i]])) * turned(lib, k, torch.tensor([[j]]))).sum()
    close(dot(7, 4), dot(13, 10), "a dot product must depend on the difference of the positions "
          "only: 7 and 4 must give what 13 and 10 give")
    assert abs(dot(7, 4) - dot(9, 4)) > 1e-4, "other differences must give other dot products"


def check_values(lib, seed):
    """Pairs are (i, i + k/2), turned by + p 10000^(-2i/k)."""
    for k in (8, 16):
        x, ids = noise(seed, 1, 2, 5, k), torch.tensor([[0, 1, 3, 10, 40]])
        got = turned(lib, x, ids)
        assert got.shape == x.shape, f"rotate() must keep the shape, not give {tuple(got.shape)}"
        want = torch.stack([torch.stack([oracles.rotated(x[0, h, i], ids[0, i].item())
                                         for i in range(5)]) for h in range(2)])[None]
        back = torch.stack([torch.stack([oracles.rotated(x[0, h, i], -ids[0, i].item())
                                         for i in range(5)]) for h in range(2)])[None]
        assert differs(got, back), ("the rotation goes the other way: new a = a cos - b sin, new b "
                                    "= a sin + b cos")
        mixed = x.unflatten(-1, (k // 2, 2)).transpose(-1, -2).flatten(-2)
        other = oracles.rotated_all(mixed[0], ids[0].tolist())[None].unflatten(
            -1, (2, k // 2)).transpose(-1, -2).flatten(-2)
        assert differs(got, other), ("channels are paired with their neighbour; channel i and "
                                     "channel i + k/2 must be a pair (LLaMA's convention)")
        close(got, want, "pair (i, i + k/2) must be turned by position * 10000^(-2i/k)")


def check_large_positions(lib, seed):
    """Positions are exact also where they are large."""
    x, ids = noise(seed, 1, 1, 3, 8), torch.tensor([[999, 1501, 2047]])
    close(turned(lib, x, ids), oracles.rotated_all(x[0], ids[0])[None], "large positions must be "
          "turned by their own angle: compute angles in float32", 2e-3, 2e-3)


def check_batch(lib, seed):
    """Each sample and token has its own position; heads of a token share it."""
    x = noise(seed, 2, 3, 4, 8)
    ids = torch.tensor([[0, 1, 2, 3], [7, 7, 7, 8]])
    want = torch.stack([oracles.rotated_all(a, i) for a, i in zip(x, ids)])
    close(turned(lib, x, ids), want, "each sample's tokens must be turned by that sample's ids")
    one = torch.tensor([[4]])
    want = torch.stack([oracles.rotated_all(a, [4] * 4) for a in x])
    close(turned(lib, x, one), want, "ids (1, 1) must serve all samples and tokens: an image block "
          "has one position")


def check_dtype(lib, seed):
    """rotate() keeps the dtype of x, and x itself."""
    x, ids = noise(seed, 1, 2, 3, 8), torch.tensor([[3, 4, 5]])
    before = x.clone()
    got = turned(lib, x.bfloat16(), ids)
    assert got.dtype == torch.bfloat16, f"rotate() must return the dtype of x, not {got.dtype}"
    turned(lib, x, ids)
    assert torch.equal(x, before), "rotate() must not change x in place"


def slow_rope(ids, dim):
    return oracles.angles(ids, dim)


def slow_rotate(x, cos_sin):
    cos, sin = (a[..., x.shape[-1] // 2:].to(x.dtype) for a in cos_sin)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def expected(lib):
    return install(lib, {"joint_attn.rope": slow_rope, "joint_attn.rotate": slow_rotate})


def show(lib):
    distance, lines = list(range(-60, 61)), {}
    for name, k in (("head width 8", 8), ("head width 32", 32), ("head width 128", 128)):
        x = torch.ones(1, 1, 1, k) / k ** 0.5
        at = turned(lib, x.expand(1, 1, 121, k), torch.arange(121)[None])[0, 0]
        lines[name] = distance, at @ at[60]
    curve = pictures.titled(pictures.curves(lines, ("distance", "dot product"), (400, 250),
                                            low=False, y=(-0.2, 1.9)), "a vector and itself, moved")
    x = torch.ones(1, 1, 24, 32) / 32 ** 0.5
    at = turned(lib, x, torch.arange(24)[None])[0, 0]
    table = pictures.matrix(at @ at.T, cell=9, low=0.2)
    return pictures.beside([curve, pictures.titled(table, "positions 0 to 23", 12)])


RIGHT = {
    "joint_attn.rope": """
def rope(ids, dim):
    rate = torch.pow(10000.0, -2 * torch.arange(dim // 2) / dim)
    angle = torch.einsum("bl,k->blk", ids.float(), rate)[:, None].repeat(1, 1, 1, 2)
    return torch.cos(angle), torch.sin(angle)
""",
    "joint_attn.rotate": """
def rotate(x, cos_sin):
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].float(), x[..., half:].float())
    turn = torch.complex(cos_sin[0][..., :half], cos_sin[1][..., :half])
    z = z * turn
    return torch.cat((z.real, z.imag), dim=-1).to(x.dtype)
""",
}


def both(angle: str, first: str, second: str, cat: str = "torch.cat([new_a, new_b], -1)",
         cut: str = "x[..., :half], x[..., half:]") -> dict:
    return {"joint_attn.rope": f"""
def rope(ids, dim):
    i = torch.arange(dim // 2)
    angle = {angle}
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()
""", "joint_attn.rotate": f"""
def rotate(x, cos_sin):
    half = x.shape[-1] // 2
    cos, sin = (a[..., :half] for a in cos_sin)
    a, b = {cut}
    new_a, new_b = {first}, {second}
    return ({cat}).to(x.dtype)
"""}


ANGLE = "ids[:, None, :, None] * THETA ** (-2 * i / dim)"
A, B = "a * cos - b * sin", "a * sin + b * cos"
WRONG = {
    "neighbours are a pair": both(ANGLE, A, B, "torch.stack([new_a, new_b], -1).flatten(-2)",
                                  "x[..., ::2], x[..., 1::2]"),
    "the other direction": both(ANGLE, "a * cos + b * sin", "b * cos - a * sin"),
    "rates 10000^(-i/k)": both(ANGLE.replace("-2 * i", "-i"), A, B),
    "another base": both(ANGLE.replace("THETA", "500000.0"), A, B),
    "a reflection": both(ANGLE, A, "a * sin - b * cos"),
    "cosine alone": both(ANGLE, "a * cos", "b * cos"),
    "starts at 1": both(ANGLE.replace("ids[:, None, :, None]", "(1 + ids[:, None, :, None])"),
                        A, B),
    "position by index": both("torch.arange(ids.shape[1])[None, None, :, None].expand(len(ids), 1, "
                              "-1, 1) * THETA ** (-2 * i / dim)", A, B),
    "halves exchanged": both(ANGLE, A, B, "torch.cat([new_b, new_a], -1)"),
    "float32 whatever x is": {"joint_attn.rotate": """
def rotate(x, cos_sin):
    cos, sin = cos_sin
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
"""},
    "angles in half precision": both(f"({ANGLE}).to(torch.bfloat16).float()", A, B),
    "no head axis": {"joint_attn.rope": """
def rope(ids, dim):
    rate = THETA ** -(torch.arange(0, dim, 2) / dim)
    angle = ids[..., None].float() * torch.cat([-rate, rate])
    return angle.cos(), angle.sin()
"""},
}
