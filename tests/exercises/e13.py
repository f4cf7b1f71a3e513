"""Exercise 13: what a stage trains, what it freezes, and how fast."""

import types

import torch
from torch import nn

import oracles_training as oracle
import pictures
from course import close, install

TITLE = "Copy the tower, freeze the reader"
EQUATION = "Table 1"
LAB = "training"
MINUTES = 35
DIFFICULTY = 2
TARGETS = ["unix.UniX.copy_tower", "train.Trainer.freeze_all_but", "train.Trainer.rate"]
TEXT = """
Stage 2 begins with a generation tower that is a copy of the understanding tower, and then trains
the generation branch alone. Three short functions do this.

`copy_tower(self)`: in every layer of `self.lm.tower.layers` the expert `gen` takes the weights of
`und`, and the final norm `norm_gen` takes those of `norm`. Values are copied: afterwards the two
must be able to differ. The time embedder and the projections of latents (`vae2llm`, `llm2vae`) have
no model in the understanding branch and stay as they are.

`freeze_all_but(self, branch)` is a method of the trainer. Everything in `self.model` is frozen
(`requires_grad` False), whatever it was before; then the trained parameters are freed. Return them
as a dict from names to parameters; the optimizer gets these and no others.

- `branch` is "understanding", "generation" or "vae". `self.model.branch(name)` is a dict of the
  parameters of a branch. In stage 0 (`branch == "vae"`) `self.model` is the autoencoder itself, and
  all of it is trained.
- If `self.both` is True (`--train both`, Table 5), understanding and generation are trained both.
- If `self.stage.repa_weight` is not 0, REPA's projector is made here and stored as
  `self.projector`: `nn.Sequential` of three linear layers with SiLU between, width -> width ->
  width -> width of the teacher's features. The width is `self.model.config.width`, the teacher's
  is the last axis of `self.data.maps["features"]`. Call `torch.manual_seed(self.options.seed)`
  before, so that every process makes the same one, and put it on `self.device`. Its parameters are
  trained too, under the names "projector." and the name in the Sequential ("projector.0.weight").

`rate(self, step)` is the share of the learning rate at a step; the first step is 0. With
`s = self.stage`: it rises in a straight line over `s.warmup` steps, so that step 0 has 1 / warmup
and step warmup - 1 has 1 (no step is wasted at 0), and then stays 1. Without warm-up it is 1 from
the start. `tiny` also lets it fall: where `s.ours.cooldown` is not 0, it falls straight over
that share of all `s.steps`, so that it would be 0 at step `s.steps`, one after the last. Where both
act, the smaller counts.

Worked example: 100 steps, warm-up 10, cooldown 0.4. Steps 0, 4, 9, 10, 60, 80, 99 have
0.1, 0.5, 1, 1, 1, 0.5, 0.025.
"""
HINTS = (
    "What happens to `gen` when an optimizer changes `und` in place after your copy?",
    "`load_state_dict` copies values. `model.requires_grad_(False)` freezes all. For the rate, write"
    " down the rise and the fall as two numbers.",
    "rise = min(1, (step + 1) / warmup); fall = min(1, (steps - step) / (cooldown * steps)); the rate "
    "is the smaller one. Do not forget `norm_gen` and the projector.",
)
SEES = ("Bars: how far each part moved in 20 steps. The generation branch moves; image encoder, "
        "connector, understanding tower and head do not move at all.")


# ---------------------------------------------------------------- the copy


def parts(model) -> dict:
    """{name: (copied parameter, its model)} of the generation tower."""
    found = {}
    for i, layer in enumerate(model.lm.tower.layers):
        und = dict(layer.und.named_parameters())
        for name, p in layer.gen.named_parameters():
            found[f"layer {i}: {name}"] = (p, und[name])
    found["final norm"] = (model.lm.tower.norm_gen.weight, model.lm.tower.norm.weight)
    return found


def check_copy(lib, seed):
    """Every weight of the generation tower equals the understanding tower's."""
    model = oracle.small_unix(lib, seed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [*dict(model.named_parameters())]
    model.copy_tower()
    alias = any(layer.gen is layer.und for layer in model.lm.tower.layers)
    assert not alias, ("gen must be a copy, not und itself: one object in both branches is what "
                       "the paper argues against")
    assert [*dict(model.named_parameters())] == names, "copy_tower() must keep all parameters' names"
    turned = all(torch.equal(p, before[k]) for k, p in model.state_dict().items() if is_generation(k))
    assert not turned, "copy_tower() must copy from und to gen: the generation tower is as it was"
    for name, (gen, und) in parts(model).items():
        if name == "final norm":
            assert torch.equal(gen, und), "the final norm norm_gen must be copied from norm, too"
        assert torch.equal(gen, und), f"gen must be a copy of und, but is not in {name}"
    for name, p in model.state_dict().items():
        if ".gen." not in name and "norm_gen" not in name:
            assert torch.equal(p, before[name]), (
                f"copy_tower() must change the generation tower alone, not {name}")


def check_copy_is_no_alias(lib, seed):
    """A copy has its own memory: training one tower must not change the other."""
    model = oracle.small_unix(lib, seed)
    model.copy_tower()
    with torch.no_grad():
        for name, (gen, und) in parts(model).items():
            alone = gen is not und and gen.data_ptr() != und.data_ptr()
            assert alone, (f"gen must be a copy, not the same tensor: {name} is und's itself, so "
                           "that training one changes the other")
            kept = und.clone()
            gen.add_(1)
            assert torch.equal(und, kept), f"changing gen must not change und ({name})"
    for name, (gen, _) in parts(model).items():
        assert isinstance(gen, nn.Parameter) and gen.requires_grad and gen.is_leaf, (
            f"gen must stay a parameter that can be trained ({name})")


# ---------------------------------------------------------------- freezing


def trainer(lib, model, both=False, repa_weight=0.0, seed=0):
    """A trainer that was given nothing but what freeze_all_but() may use."""
    found = lib.train.Trainer.__new__(lib.train.Trainer)
    found.options = lib.train.Options(stage=2, seed=seed, train="both" if both else "own")
    found.stage = lib.train.replace(lib.train.STAGES["tiny"][2], repa_weight=repa_weight)
    maps = {"features": torch.zeros(5, 4, 10).numpy()}
    found.model, found.data, found.both = model, types.SimpleNamespace(maps=maps), both
    found.vae, found.device = getattr(model, "vae", None), "cpu"
    found.projector, found.step = None, 0
    found.procs, found.captions = types.SimpleNamespace(rank=0, world=1, device="cpu"), None
    return found


def small_vae(lib):
    return lib.diffusion.VAE(ch=32, mult=[1, 1], blocks=1, attn=[], z=2, embed=2, groups=8)


def is_generation(name: str) -> bool:
    """Slow: by the names in the model, not by UniX.branch."""
    return (".gen." in name or name.startswith(("vae2llm", "llm2vae", "time_embedder"))
            or "norm_gen" in name)


def wanted(model, branch: str) -> set[str]:
    names = [k for k, _ in model.named_parameters() if not k.startswith("vae.")]
    return {k for k in names if is_generation(k) == (branch == "generation")}


def check_one_branch(lib, seed):
    """The stage's branch is trained, all else is frozen, the autoencoder too."""
    for branch in ("generation", "understanding"):
        model = oracle.small_unix(lib, seed)
        model.vae = small_vae(lib)
        found = trainer(lib, model).freeze_all_but(branch)
        assert isinstance(found, dict), "freeze_all_but() must return a dict of names and parameters"
        want, free = wanted(model, branch), {k for k, p in model.named_parameters()
                                             if p.requires_grad}
        vae = sorted(k for k in free if k.startswith("vae."))
        assert not vae, f"the autoencoder must be frozen in this stage: {vae[0]} is not"
        wrong = sorted(free - want)
        assert not wrong, f"in a stage that trains {branch}, {wrong[0]} must be frozen"
        left = sorted(want - free)
        assert not left, f"in a stage that trains {branch}, {left[0]} must be trained"
        same = set(found) == want and all(found[k] is p for k, p in model.named_parameters()
                                          if k in want)
        assert same, ("freeze_all_but() must return just the trained parameters, by their names in "
                      "the model: the optimizer changes what it gets")


def check_whatever_it_was(lib, seed):
    """What was frozen before is freed if it is trained, and the other way round."""
    model = oracle.small_unix(lib, seed).requires_grad_(False)
    trainer(lib, model).freeze_all_but("understanding")
    trainer(lib, model).freeze_all_but("generation")
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    assert free >= wanted(model, "generation"), ("parameters that were frozen before must be freed "
                                                 "where this stage trains them")
    assert free == wanted(model, "generation"), ("what an earlier stage trained must be frozen "
                                                 "again: freeze everything first")


def check_vae_stage(lib, seed):
    """In stage 0 the model is the autoencoder, and all of it is trained."""
    vae = small_vae(lib).requires_grad_(False)
    found = trainer(lib, vae).freeze_all_but("vae")
    names = dict(vae.named_parameters())
    assert set(found) == set(names) and all(p.requires_grad for p in names.values()), (
        "in stage 0 (branch \"vae\") the model is the autoencoder: all of it is trained")


def check_both(lib, seed):
    """With --train both, both branches are trained, and still not the autoencoder."""
    model = oracle.small_unix(lib, seed)
    model.vae = small_vae(lib)
    found = trainer(lib, model, both=True).freeze_all_but("generation")
    want = wanted(model, "generation") | wanted(model, "understanding")
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    assert set(found) == want == free, ("with self.both, understanding and generation are trained, "
                                        "and nothing else")


def check_projector(lib, seed):
    """REPA's projector is made where it has a weight, from the seed, and is trained."""
    model = oracle.small_unix(lib, seed)
    one = trainer(lib, model)
    one.freeze_all_but("generation")
    assert one.projector is None, "without a weight of REPA no projector must be made"
    made = []
    for i in range(2):
        torch.manual_seed(seed + i)                     # as two processes may be
        one = trainer(lib, model, repa_weight=0.5, seed=3)
        found = one.freeze_all_but("generation")
        assert isinstance(one.projector, nn.Module), "self.projector must be REPA's projector"
        made.append(one.projector)
    kinds = [type(m).__name__ for m in made[0].modules() if not [*m.children()]]
    assert kinds == ["Linear", "SiLU", "Linear", "SiLU", "Linear"], (
        f"the projector has three linear layers with SiLU between, not {kinds}")
    shapes = [tuple(p.shape) for p in made[0].parameters() if p.dim() == 2]
    assert shapes == [(24, 24), (24, 24), (10, 24)], (
        f"the projector goes width -> width -> width -> teacher's width, not {shapes}")
    names = {"projector." + k: p for k, p in made[1].named_parameters()}
    assert names.keys() <= found.keys(), ("the projector must be trained: it belongs in what "
                                          "freeze_all_but() returns, as \"projector.0.weight\" ...")
    assert all(found[k] is p and p.requires_grad for k, p in names.items()), (
        "the projector's parameters must be free and be those of self.projector")
    assert found.keys() - names.keys() == wanted(model, "generation"), (
        "besides the projector, just the branch is trained")
    same = all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters()))
    assert same, ("torch.manual_seed(self.options.seed) belongs before the projector: every process "
                  "must make the same one")


# ---------------------------------------------------------------- the rate


def rates(lib, steps, warmup, decay) -> list[float]:
    """The rate at each step of a stage."""
    found = lib.train.Trainer.__new__(lib.train.Trainer)
    ours = lib.train.Ours(cooldown=decay)
    found.stage = lib.train.Stage("generation", 64, 1e-3, warmup, steps, ours=ours)
    found.options, found.step = lib.train.Options(stage=2), 0
    return [float(found.rate(i)) for i in range(steps)]


def slow_rate(self, step):
    s = self.stage
    points = [((s.warmup - 1), 1.0)] if s.warmup else [(0, 1.0)]
    last, high = points[0]
    rise = 1.0 if step >= last else 1 / s.warmup + (high - 1 / s.warmup) * step / max(last, 1)
    long = s.ours.cooldown * s.steps
    fall = 1.0 if not long or step <= s.steps - long else 1 - (step - (s.steps - long)) / long
    return min(rise, fall)


def check_warmup(lib, seed):
    """The rate rises in a straight line from 1 / warmup and then stays."""
    got = rates(lib, 40, 8, 0.0)
    assert got[0] > 0, "the first step must not be wasted: rate(0) is 1 / warmup, not 0"
    assert got[7] <= 1 + 1e-9 and max(got) <= 1 + 1e-9, "the rate must never be above 1"
    close(torch.tensor(got[:8]), torch.arange(1, 9) / 8, "the rate must rise in a straight line: "
          "step i of the warm-up has (i + 1) / warmup", 1e-6)
    close(torch.tensor(got[8:]), torch.ones(32), "after the warm-up the rate must be constant, 1 "
          "(Table 1)", 1e-6)


def check_no_warmup(lib, seed):
    """Without warm-up (stage 3) the rate is 1 from the first step."""
    try:
        got = rates(lib, 10, 0, 0.0)
    except ZeroDivisionError:
        raise AssertionError("without warm-up nothing may be divided by its length: the rate is 1"
                             ) from None
    close(torch.tensor(got), torch.ones(10), "without warm-up and cooldown the rate "
          "must be 1 at every step", 1e-6)


def check_decay(lib, seed):
    """With a cooldown the rate falls in a straight line to 0 just after the last step."""
    got = rates(lib, 100, 10, 0.4)
    assert got[-1] > 0, "the last step must not be wasted: the rate is 0 one step after it"
    close(torch.tensor([got[i] for i in (0, 4, 9, 10, 60, 80, 99)]),
          torch.tensor([0.1, 0.5, 1, 1, 1, 0.5, 0.025]), "the worked example: 100 steps, warm-up 10, "
          "cooldown 0.4", 1e-6)
    for steps, warmup, decay in ((50, 0, 1.0), (60, 12, 1.0), (37, 5, 0.3)):
        got = torch.tensor(rates(lib, steps, warmup, decay))
        stage = lib.train.Stage("generation", 64, 1e-3, warmup, steps,
                                ours=lib.train.Ours(cooldown=decay))
        want = [slow_rate(types.SimpleNamespace(stage=stage), i) for i in range(steps)]
        close(got, torch.tensor(want), f"{steps} steps, warm-up {warmup}, cooldown {decay}: "
              "the rate must be the smaller of rise and fall", 1e-6)


def slow_copy(self):
    for gen, und in parts(self).values():
        gen.data = und.detach().clone()


def slow_freeze(self, branch):
    """By names: everything is frozen, then what belongs to the branch is freed."""
    named = dict(self.model.named_parameters())
    if branch == "vae":
        want = set(named)
    else:
        branches = ("generation", "understanding") if self.both else (branch,)
        want = set().union(*(wanted(self.model, b) for b in branches))
    for name, p in named.items():
        p.requires_grad_(name in want)
    found = {k: p for k, p in named.items() if k in want}
    if self.stage.repa_weight:
        d, out = self.model.config.width, self.data.maps["features"].shape[-1]
        torch.manual_seed(self.options.seed)
        self.projector = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(),
                                       nn.Linear(d, out)).to(self.device)
        found |= {"projector." + k: p for k, p in self.projector.named_parameters()}
    return found


def expected(lib):
    return install(lib, {"unix.UniX.copy_tower": slow_copy, "train.Trainer.rate": slow_rate,
                         "train.Trainer.freeze_all_but": slow_freeze})


PART_OF = (("vit.", "image encoder"), ("connector", "connector"), (".und.", "und experts"),
           (".gen.", "gen experts"), ("norm_gen", "final norm, gen"), ("tower.norm", "final norm"),
           ("embed_tokens", "embeddings, head"), ("lm_head", "embeddings, head"),
           ("time_embedder", "time embedder"), ("vae2llm", "latents in, out"),
           ("llm2vae", "latents in, out"))


def show(lib):
    """How far each part moves in 20 steps of a stage that trains generation."""
    model = oracle.small_unix(lib, 0)
    model.copy_tower()
    learn = trainer(lib, model)
    learn.stage = lib.train.Stage("generation", 64, 1e-3, 5, 20)
    found = learn.freeze_all_but("generation")
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(list(found.values()), 1e-3, weight_decay=0)
    rng = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(20):
            x0, eps = (torch.randn(4, 4, 3, 3, generator=rng) for _ in range(2))
            context = model.read_captions(oracle.token_lists(step, (3, 5, 2, 4)))
            loss = model.flow_loss(x0, context, torch.rand(4, generator=rng), eps)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * learn.rate(step)
            optimizer.step()
    moved = {}
    for name, p in model.named_parameters():
        part = next((part for key, part in PART_OF if key in name), name)
        far = float((p.detach() - before[name]).norm() / before[name].norm())
        moved[part] = max(moved.get(part, 0.0), far)
    lines = {f"warm-up {w}, cooldown {d:g}": (range(100), rates(lib, 100, w, d))
             for w, d in ((10, 0.0), (10, 0.4), (0, 1.0))}
    return pictures.beside([
        pictures.titled(pictures.bars(moved, max(moved.values())), "how far 20 steps moved it"),
        pictures.titled(pictures.curves(lines, ("step", "rate")), "the learning rate")])


RIGHT = {
    "unix.UniX.copy_tower": """
def copy_tower(self):
    tower = self.lm.tower
    with torch.no_grad():
        for layer in tower.layers:
            for gen, und in zip(layer.gen.parameters(), layer.und.parameters()):
                gen.copy_(und)
        tower.norm_gen.weight.copy_(tower.norm.weight)
""",
    "train.Trainer.freeze_all_but": """
def freeze_all_but(self, branch):
    trained = {}
    if branch == "vae":
        trained.update(self.model.named_parameters())
    else:
        for name in ("understanding", "generation"):
            if self.both or name == branch:
                trained.update(self.model.branch(name))
    kept = set(map(id, trained.values()))
    for p in self.model.parameters():
        p.requires_grad = id(p) in kept
    if self.stage.repa_weight:
        width = self.model.config.width
        widths = [width, width, width, self.data.maps["features"].shape[-1]]
        torch.manual_seed(self.options.seed)
        layers = []
        for i in range(3):
            layers += [nn.SiLU()] * (i > 0) + [nn.Linear(widths[i], widths[i + 1])]
        self.projector = nn.Sequential(*layers).to(self.device)
        for name, p in self.projector.named_parameters():
            trained["projector." + name] = p
    return trained
""",
    "train.Trainer.rate": """
def rate(self, step):
    s, share = self.stage, 1.0
    if step < s.warmup:
        share = (step + 1) / s.warmup
    length = s.ours.cooldown * s.steps
    if length and s.steps - step < length:
        share = min(share, (s.steps - step) / length)
    return share
""",
}


def _copy(body: str) -> dict:
    return {"unix.UniX.copy_tower": "def copy_tower(self):\n    tower = self.lm.tower\n" + body}


def _freeze(**changes) -> dict:
    """freeze_all_but with some parts changed."""
    part = {"freeze": "self.model.requires_grad_(False)",
            "names": '["understanding", "generation"] if self.both else [branch]',
            "make": "if self.stage.repa_weight:", "seed": "torch.manual_seed(self.options.seed)",
            "net": "nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, out)",
            "add": 'trainable.update({"projector." + k: p for k, p in '
                   'self.projector.named_parameters()})',
            "free": "p.requires_grad_(True)", "give": "trainable"} | changes
    return {"train.Trainer.freeze_all_but": f"""
def freeze_all_but(self, branch):
    {part["freeze"]}
    if branch == "vae":
        trainable = dict(self.model.named_parameters())
    else:
        names = {part["names"]}
        trainable = {{k: p for name in names for k, p in self.model.branch(name).items()}}
    {part["make"]}
        d, out = self.model.config.width, self.data.maps["features"].shape[-1]
        {part["seed"]}
        self.projector = nn.Sequential({part["net"]})
        {part["add"]}
    for p in trainable.values():
        {part["free"]}
    return {part["give"]}
"""}


def _rate(rise: str, fall: str, end: str = "min(rise, fall)") -> dict:
    return {"train.Trainer.rate": f"""
def rate(self, step):
    s = self.stage
    rise = {rise}
    fall = {fall}
    return {end}
"""}


_RISE = "min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0"
_FALL = "min(1.0, (s.steps - step) / (s.ours.cooldown * s.steps)) if s.ours.cooldown else 1.0"
WRONG = {
    "an alias": _copy("    for layer in tower.layers:\n        layer.gen = layer.und\n"
                      "    tower.norm_gen = tower.norm\n"),
    "shared memory": _copy(
        "    for layer in tower.layers:\n"
        "        for a, b in zip(layer.gen.parameters(), layer.und.parameters()):\n"
        "            a.data = b.data\n"
        "    tower.norm_gen.weight.data = tower.norm.weight.data\n"),
    "final norm forgotten": _copy(
        "    for layer in tower.layers:\n"
        "        layer.gen.load_state_dict(layer.und.state_dict())\n"),
    "norms of layers forgotten": _copy(
        "    for layer in tower.layers:\n"
        "        for k, p in layer.und.state_dict().items():\n"
        "            if 'norm' not in k:\n"
        "                layer.gen.state_dict()[k].copy_(p)\n"
        "    tower.norm_gen.load_state_dict(tower.norm.state_dict())\n"),
    "the wrong way round": _copy(
        "    for layer in tower.layers:\n"
        "        layer.und.load_state_dict(layer.gen.state_dict())\n"
        "    tower.norm.load_state_dict(tower.norm_gen.state_dict())\n"),
    "first layer alone": _copy(
        "    tower.layers[0].gen.load_state_dict(tower.layers[0].und.state_dict())\n"
        "    tower.norm_gen.load_state_dict(tower.norm.state_dict())\n"),
    "nothing frozen": _freeze(freeze="pass"),
    "all is trained": _freeze(names='["understanding", "generation"]'),
    "the other branch": _freeze(names='["understanding" if branch == "generation" else '
                                      '"generation"]'),
    "both forgotten": _freeze(names="[branch]"),
    "never freed": _freeze(free="pass"),
    "returns everything": _freeze(give="dict(self.model.named_parameters()) | trainable"),
    "projector not trained": _freeze(add="pass"),
    "projector always": _freeze(make="if True:"),
    "projector without its seed": _freeze(seed="pass"),
    "projector of two layers": _freeze(net="nn.Linear(d, d), nn.SiLU(), nn.Linear(d, out)"),
    "projector with GELU": _freeze(net="nn.Linear(d, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), "
                                       "nn.Linear(d, out)"),
    "warm-up from 0": _rate("min(1.0, step / s.warmup) if s.warmup else 1.0", _FALL),
    "warm-up one step too long": _rate("min(1.0, (step + 1) / (s.warmup + 1)) if s.warmup else 1.0",
                                       _FALL),
    "no warm-up": _rate("1.0", _FALL),
    "divides by no warm-up": _rate("min(1.0, (step + 1) / s.warmup)", _FALL),
    "0 at the last step": _rate(_RISE, "min(1.0, (s.steps - 1 - step) / (s.ours.cooldown * "
                                       "s.steps)) if s.ours.cooldown else 1.0"),
    "decay always": _rate(_RISE, "(s.steps - step) / s.steps"),
    "decay is not a share": _rate(_RISE, "1 - s.ours.cooldown * step / s.steps"),
    "no decay": _rate(_RISE, "1.0"),
    "product for minimum": _rate(_RISE, _FALL, "rise * fall"),
    "a cosine": _rate(_RISE, "0.5 + 0.5 * math.cos(math.pi * step / s.steps)"),
    "times the learning rate": _rate(_RISE, _FALL, "s.lr * min(rise, fall)"),
}
