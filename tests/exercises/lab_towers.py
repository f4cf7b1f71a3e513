"""Lab 2: the towers."""

import torch

INTRO = """Lab 2. Towers: two experts, one softmax

Five exercises on `joint_attn.py`: positions, one expert, reading, the joint layer, and captions of
different lengths or none. They build the paper's Eq. 3-5 from the inside out. Exercise 9 is the
heart of the course; take time for it. The layers here are small and have random weights.
"""


def changed_by_latents(lib) -> int:
    """Counts the tokens of [4 text | 2 markers | 6 latents] that change with the last latent."""
    torch.manual_seed(0)
    tower = lib.joint_attn.Tower(2, 16, 2, 2, 8, 24)
    text, boi_eoi, x = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 6, 16)
    outs = []
    for move in (0.0, 1.0):
        moved = x.clone()
        moved[0, -1] += move
        with torch.no_grad():
            read, context = tower.read_context(text, torch.arange(4)[None], torch.tensor([4]))
            cos_sin = lib.joint_attn.rope(context.next_id[:, None], 8)
            block = tower.layers[0].denoise(boi_eoi, moved, cos_sin, context.kv[0], None, True)
        outs.append(torch.cat([read[0], block[0][0], block[1][0]]))
    return int(((outs[0] - outs[1]).abs().amax(-1) > 1e-6).sum())


def zero_key_share(lib) -> float:
    """The share of the softmax that goes to 30 keys of zeros beside 6 keys of score 0."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 36, 8), torch.zeros(1, 1, 36, 8)
    v[:, :, :30] = 1
    return round(lib.joint_attn.attend(q, k, v)[0, 0, 0, 0].item(), 3)


QUESTIONS = [
    {"ask": "A sequence has 4 text tokens, 2 markers and 6 latents: 12 tokens. You change the last "
            "latent a little and run one layer. How many of the 12 tokens come out different?",
     "run": changed_by_latents,
     "why": "The two markers and all six latents: the block sees itself in both directions. Text "
            "never sees the block, so its keys and values can be computed once and kept."},
    {"ask": "A caption of 30 tokens is \"dropped\" by setting its keys and values to zero, without "
            "a mask. The block has 6 more keys, and every query happens to have a score of 0 with "
            "all of them. Which share of the softmax goes to the 30 zeroed keys? (Three decimals; "
            "0 if none.)",
     "run": zero_key_share,
     "why": "A key of zeros has score 0, and e^0 = 1 is not 0: 30 / 36 of the weight. What must "
            "not be seen has to be masked."},
]
