"""Does a finding's word know its side, once the understanding branch has read a caption?

    python tests/side_probe.py [--weights DIR]

Latents attend to the keys and values of words. If those of "effusion" do not depend on the "left"
or "right" before it, images get their findings on the wrong sides. So: captions that name both
sides; of each sentence with one side, the keys and values of its last word; a linear probe (ridge
regression on two thirds of them) that predicts the side of the others. By chance: 50%.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
from data import impression, phantom_scene  # noqa: E402


@torch.no_grad()
def last_words(model, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the last words (n, layers, 2 g k), and is their side left (n,)."""
    found, left = [], []
    for text in texts:
        kv = model.read_captions([model.ids(text)]).kv
        for sentence in re.finditer(r"[^.]+", text):
            *before, _ = re.findall(r"\w+", sentence[0].lower())
            sides = [word for word in before if word in ("left", "right")]
            if len(sides) == 1:
                i = len(model.ids(text[:sentence.end()]))       # of the last word, behind BOS
                found.append(torch.stack([torch.cat([a[0, :, i].flatten() for a in pair])
                                          for pair in kv]))
                left.append(sides == ["left"])
    return torch.stack(found), torch.tensor(left).float()


def probe(x: torch.Tensor, left: torch.Tensor) -> float:
    """Share of the last third of x (n, d) whose side a linear probe predicts."""
    x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-4), torch.ones(len(x), 1)], dim=1)
    n = len(x) * 2 // 3
    w = torch.linalg.solve(x[:n].T @ x[:n] + 30 * torch.eye(x.shape[1]),
                           x[:n].T @ (2 * left[:n] - 1))
    return ((x[n:] @ w > 0) == left[n:].bool()).float().mean().item()


def measure(model, count: int) -> list[float]:
    """The share of true sides, layer by layer, of the first `count` captions with both sides."""
    texts = (impression(phantom_scene("train", i)[2]) for i in itertools.count())
    both = (t for t in texts if {"left", "right"} <= {*re.findall(r"\w+", t.lower())})
    x, left = last_words(model, [*itertools.islice(both, count)])
    return [probe(x[:, layer], left) for layer in range(x.shape[1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", help="weights folder (default: as sample.py)")
    parser.add_argument("--count", type=int, default=1000, help="captions (%(default)s)")
    args = parser.parse_args()
    asked = ["generate", "x", *(["--weights", args.weights] if args.weights else [])]
    model = sample.open_model(sample.parse(asked))
    for layer, share in enumerate(measure(model, args.count), 1):
        print(f"layer {layer}: the true side in {share:.1%}")


if __name__ == "__main__":
    main()
