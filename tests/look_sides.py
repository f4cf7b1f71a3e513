"""How often does attention lie on the side of the finding? (What `sample.py look` shows, counted.)

    python tests/look_sides.py [--weights DIR]

On 100 held-out phantoms with one finding on one side: how often the half of the map with
more attention is the true side. The patient's left is on the viewer's right, so the true half for
"left" is the right half of the map. Of a caption, the map is the mean over all steps of the image
that is generated from it; of a report, that of the words of the finding and the side in the report
that the model writes of the phantom (if it names them). By chance: 50%.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
from data import impression, locate, phantom, phantom_scene  # noqa: E402


def one_sided(count: int) -> list:
    """The first held-out phantoms with one finding, on one side: (split, index, side, impression).
    """
    found = []
    for split, i in itertools.product(("test", "val"), range(512)):
        _, findings, report = phantom_scene(split, i)
        if len(findings) == 1 and findings[0].side in ("left", "right"):
            found.append((split, i, findings[0].side, impression(report)))
    return found[:count]


def true_share(heat, side: str) -> float:
    """How much of the attention of a map (rows, columns) is in the half where `side` is."""
    heat = np.asarray(heat, np.float64)
    middle = heat.shape[1] // 2
    viewers_left, viewers_right = heat[:, :middle].sum(), heat[:, -middle:].sum()
    total = viewers_left + viewers_right
    return (viewers_right if side == "left" else viewers_left) / total


def maps_by_kind(model, ids, maps, side: str) -> dict:
    """The mean maps (layers, rows, columns) of the words of the side, and of all other words."""
    words = sample.words(model.tokenizer, ids)
    kinds = {"the side": [at for word, at in words if word == side],
             "the finding": [at for word, at in words if word not in ("left", "right", "no")]}
    return {kind: np.mean([maps[..., at].mean(-1).numpy() for at in found], axis=0)
            for kind, found in kinds.items() if found}


def measure(model, count: int, points: int) -> dict:
    """{(command, word): shares of attention on the true side, a row (mean, layer 1, ...) each}."""
    shares = {(c, w): [] for c in ("look TEXT", "look IMAGE") for w in ("the side", "the finding")}
    how = {"points": points, "shift": 3.0, "scale": model.config.guidance,
           "eta": model.config.eta}

    def add(command, ids, maps, side):
        for kind, heat in maps_by_kind(model, ids, maps, side).items():
            shares[command, kind].append([true_share(h, side) for h in (heat.mean(0), *heat)])
    for split, i, side, text in tqdm(one_sided(count), desc="phantoms"):
        ids = model.ids(text)
        if model.vae is not None and model.llm2vae.weight.any():
            _, maps = sample.caption_maps(model, ids, None, i, **how)
            add("look TEXT", ids, maps.mean(0), side)
        image = phantom(split, i, model.config.vit_image).image
        ids, maps = sample.report_maps(model, image)
        if {side} in [found["sides"] for found in locate(model.tokenizer.decode(ids)).values()]:
            add("look IMAGE", ids, maps[0], side)
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", help="weights folder (default: as sample.py)")
    parser.add_argument("--count", type=int, default=100, help="phantoms (%(default)s)")
    parser.add_argument("--points", type=int, default=50, help="times on the path (%(default)s)")
    args = parser.parse_args()
    asked = ["generate", "x", *(["--weights", args.weights] if args.weights else [])]
    model = sample.open_model(sample.parse(asked))
    layers = ["mean of all", *range(1, len(model.lm.tower.layers) + 1)]
    print("| command | word | layer | phantoms | hotter half is the true side | attention on it |")
    print("|---|---|---|---|---|---|")
    for (command, word), found in measure(model, args.count, args.points).items():
        for layer, share in zip(layers, np.array(found).T if found else ()):
            print(f"| {command} | {word} | {layer} | {len(share)} | {(share > .5).mean():.0%} "
                  f"| {share.mean():.1%} |")


if __name__ == "__main__":
    main()
