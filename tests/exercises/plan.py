"""Six sittings of about two hours: what to read, with today's line numbers, and what to do.

    python tests/exercises/plan.py
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402

# title, what to read (functions, classes, or a file's docstring), exercises, what to look at
SITTINGS = [
    ("From noise to an image",
     ["diffusion", "diffusion.path", "diffusion.target", "diffusion.shift_time",
      "diffusion.sample_time", "diffusion.velocity_loss", "diffusion.sample"],
     [1, 2, 3], 'python sample.py generate "Large right pleural effusion."'),
    ("Guidance, and what a latent token knows",
     ["diffusion.guide", "diffusion.to_tokens", "diffusion.TimeEmbedder", "diffusion.VAE",
      "unix.UniX.velocity"],
     [4, 5], 'python sample.py generate "Large left pneumothorax." --guidance 1'),
    ("A transformer's layer, from the inside",
     ["joint_attn", "joint_attn.RMSNorm", "joint_attn.attend", "joint_attn.Expert",
      "joint_attn.Layer"],
     [6, 7, 8], "python sample.py look assets/chest.png"),
    ("Two experts, one softmax",
     ["joint_attn.Context", "joint_attn.Tower", "unix", "unix.UniX.read_captions",
      "unix.UniX.flow_loss"],
     [9, 10], 'python sample.py look "Large right pleural effusion."'),
    ("Reading and writing",
     ["ar.ViT", "ar.Connector", "ar.LanguageModel", "ar.pick", "unix.UniX.embed_image",
      "unix.UniX.report"],
     [11, 12, 13], "python sample.py report assets/chest.png"),
    ("A training step, and how good it is",
     ["train", "train.Trainer.train_step", "train.Trainer.randomness", "train.Trainer.flow_losses",
      "sample.kernel_distance", "sample.prdc"],
     [14, 15, 16], "python sample.py evaluate"),
]


def lines(target: str, sources: dict[str, str]) -> tuple[int, int]:
    """First and last line of a function, a class or (a file alone) the file's docstring."""
    file, name = course.split_target(target)
    tree = course.parse(sources[file])
    if not name:
        return 1, tree.body[0].end_lineno
    if any(isinstance(n, ast.ClassDef) and n.name == name for n in tree.body):
        node = next(n for n in tree.body if getattr(n, "name", "") == name)
        return node.lineno, node.end_lineno
    start, end = course.span(course.find(sources[file], name))
    return start + 1, end


def main():
    sources, modules = course.clean_sources(), course.exercises()
    for i, (title, targets, numbers, command) in enumerate(SITTINGS, 1):
        found = [n for n in numbers if n in modules]
        minutes, total = sum(modules[n].MINUTES for n in found), 0
        print(f"{i}. {title}")
        for target in targets:
            first, last = lines(target, sources)
            total += last - first + 1
            print(f"   read  {course.split_target(target)[0]}.py {first}-{last}  {target}")
        print(f"   {total} lines to read; exercises {', '.join(map(str, found))}, {minutes} "
              f"minutes\n   look  {command}\n")


if __name__ == "__main__":
    main()
