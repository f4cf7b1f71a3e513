"""Exercise 15, the capstone: a step of stage 2."""

import math
import types

import torch
from torch import nn

import course
import oracles_training as oracle
import pictures
from course import close

TITLE = "Capstone: a step of stage 2"
EQUATION = "Eq. 2, Sec. 3.4"
LAB = "training"
MINUTES = 90
DIFFICULTY = 3
TARGETS = ["unix.UniX.flow_loss", "train.Trainer.flow_losses", "train.Trainer.train_step"]
TEXT = """
Three functions, from the inside out, make the training step that teaches a tower to draw. When they
are right, run

    python tests/exercises/capstone.py OUT

It trains for 600 steps with **your** functions, about two minutes on two cores, and draws eight
chests.

`UniX.flow_loss(self, x0, context, t, eps, frozen, repa_layer)` is Eq. 2. `x0` and `eps` are clean
latents and noise `(b, c, h, w)`, `t` `(b,)`. Make tokens of both (`to_tokens(a,
self.config.latent_patch)`), go to the point `path(x0, eps, t)`, ask `self.velocity(x_t, t, context,
position_ids, frozen, repa_layer)`, which returns the velocity of the tokens `(b, n, c)` and the
states after layer `repa_layer`, and return two values: `velocity_loss` (one value a sample, `(b,)`)
and the states. `self.grid(h, w)` gives rows and columns of the tokens, and
`self.latent_positions(h, w)` their `position_ids`.

`Trainer.flow_losses(self, batch, random)` gives the losses of some images, **summed** over them:
`{"flow": sum}`, and with REPA `{"flow": sum, "repa": sum}`. All that is random was drawn before and
is in `random`: `z`, `eps` `(b, c, h, w)`, `time` `(b,)`, and the flags `short` and `drop` `(b,)`.

- Latents: `self.vae.latents(batch["moments"], z)` takes a **sample** of the autoencoder's
  posterior; without `z` it would be the mean, which is smoother than any real latent.
- Captions: a list of texts, `batch["caption"]`. Where `short` is True the text is cut to
  `impression(text)`. While the reader is frozen, `self.captions.context(texts)` gives their Context
  from a memory, without gradient; with `self.both` (Table 5) the reader is trained, and
  `model.read_captions([model.ids(text), ...])` reads with gradient. Where `drop` is True the
  caption is dropped: `context.drop(drop)`. With `self.options.no_context` there is no context: None.
- `flow_loss` gets `frozen = not self.both`. Add the pair `(random["time"], flow.detach())` to the
  list `self.by_time`: the log shows the loss for each tenth of t.
- REPA is there if `self.projector` is not None. It takes the states after a third of the layers:
  layer `round(layers * REPA_DEPTH)`, counted from 1 (the paper's 8th of 24). Send them through
  `self.projector` and compare with `batch["features"]` by `repa_loss(states, features, grid)`, where
  grid is the rows and columns of the tokens. Without REPA `repa_layer` is 0.
- Everything moves to `self.device` first.

`Trainer.train_step(self, batch)` is one step of training:

1. `random = self.randomness(self.step)`: all random numbers of this step.
2. `weights = self.loss_weights(batch, random)`: the factor of each summed loss, for the whole batch.
   Empty `self.by_time`.
3. The rows 0 to b - 1 are cut into `self.options.accumulate` parts, as `torch.chunk` cuts. For each
   part: losses = `self.losses(...)` of `pick_rows(batch, rows)` and `pick_rows(random, rows)`
   (b is the length of `random["time"]`), under
   `torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)` (`self.device` is
   a string such as "cuda:0"); then the backward pass of the sum of weight times loss. The gradients of the
   parts add up, so the result is that of the whole batch, with less memory.
4. `self.procs.sum_gradients(self.trainable.values())` adds gradients over processes. Then clip the gradient's
   norm over **all** trained parameters that have a gradient to 1.0 (Table 1), and keep the norm
   from before clipping for the log. `self.trainable` is the dict of trained parameters.
5. What the log shows: for each loss, weight times loss, summed over the parts and (by
   `self.procs.total(tensor)`) over processes, as floats; and "grad", the norm.
   `self.check_finite(logged)` raises an error if one is not finite, **before** any weight changes.
6. For every optimizer in `self.optimizers`: each group's "lr" is `optimizer.defaults["lr"]` times
   `self.rate(self.step)`; step; clear the gradients.
7. `self.step` rises by one. Then each averaged weight in `self.average()` (a dict by the names in
   `self.trainable`) moves towards the new weight: with `decay = min(self.stage.ours.ema, step /
   (step + 9))`, average = decay * average + (1 - decay) * weight. The second term of the minimum
   lets a young average follow: after the first step (step = 1) decay is 0.1.
8. Return what the log shows.
"""
HINTS = (
    "Write the comments of the eight steps first, then a line or two below each. Do the inner "
    "functions first: each has its own checks.",
    "`pick_rows` also cuts lists and the random numbers. `nn.utils.clip_grad_norm_` returns the "
    "norm from before. In `flow_losses`, `context.drop` returns a new Context.",
    "loss = sum(weights[k] * v for k, v in losses.items()); loss.backward() inside the loop over "
    "`torch.arange(b).chunk(accumulate)`; everything else after it. `average.lerp_(weight, 1 - "
    "decay)`.",
)
SEES = ("From show.py: the flow and REPA losses of a small model on four images, both falling. From "
        "capstone.py: loss.png, the loss by tenth of t, high near the image, low near noise, and "
        "falling everywhere; eight.png, chests that one recognises; large effusions are there, "
        "their side not always the true one yet.")


# ---------------------------------------------------------------- flow_loss


def watched(model, answer):
    """Replaces model.velocity -> a list that collects its arguments."""
    seen = []

    def velocity(x, t, context, position_ids, frozen=True, repa_layer=0, latent_mask=None):
        seen.append(types.SimpleNamespace(x=x, t=t, context=context, position_ids=position_ids,
                                          frozen=frozen, repa_layer=repa_layer))
        return answer(x, t), "states"
    model.velocity = velocity
    return seen


def tokens(latents, p: int):
    """Latents (b, c, h, w) -> tokens (b, n, p p c), by hand."""
    b, c, h, w = latents.shape
    rows = [latents[:, :, i:i + p, j:j + p].permute(0, 2, 3, 1).reshape(b, -1)
            for i in range(0, h, p) for j in range(0, w, p)]
    return torch.stack(rows, dim=1)


def flow_inputs(seed, b=3, h=4, w=6):
    rng = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(b, 4, h, w, generator=rng) for _ in range(2))
    return x0, eps, torch.rand(b, generator=rng)


def check_flow_point(lib, seed):
    """flow_loss() asks for the velocity at x_t = (1 - t) x0 + t eps, at that t and those places."""
    for patch in (1, 2):
        model = oracle.small_unix(lib, seed, latent_patch=patch)
        x0, eps, t = flow_inputs(seed)
        seen = watched(model, lambda x, t: torch.zeros_like(x))
        model.flow_loss(x0, "a context", t, eps, False, 2)
        assert len(seen) == 1, f"flow_loss() must ask for the velocity once, not {len(seen)} times"
        got, a, b = seen[0], tokens(x0, patch), tokens(eps, patch)
        line, s = got.x, t[:, None, None]
        turned = line.shape == a.shape and bool((line - (s * a + (1 - s) * b)).abs().max() < 1e-4)
        assert not turned, ("x_t must be the image at t = 0 and noise at t = 1: image and noise are "
                            "swapped")
        close(line, (1 - s) * a + s * b, "the tower must be asked at x_t = (1 - t) x0 + t eps, as "
              "tokens (b, n, c)")
        close(got.t, t, "the tower must be told the time t of each sample")
        rows, columns = 4 // patch, 6 // patch
        want = [i * 8 + j for i in range(rows) for j in range(columns)]
        assert got.position_ids.flatten().tolist() == want, (
            "position_ids must be those of the tokens' rows and columns, row by row")
        assert got.context == "a context", "the context must reach the tower"
        assert got.frozen is False, "`frozen` must be passed on to velocity()"
        assert got.repa_layer == 2, "`repa_layer` must be passed on to velocity()"


def check_flow_value(lib, seed):
    """flow_loss() is 0 where the velocity is eps - x0, and one value a sample."""
    model = oracle.small_unix(lib, seed, latent_patch=2)
    x0, eps, t = flow_inputs(seed)
    truth = tokens(eps - x0, 2)
    watched(model, lambda x, t: truth.clone())
    result = model.flow_loss(x0, None, t, eps)
    assert isinstance(result, tuple) and len(result) == 2, (
        "flow_loss() must return two values: the loss and the states for REPA")
    assert result[1] == "states", "flow_loss() must return the states that velocity() gave"
    assert result[0].shape == (3,), ("flow_loss() must return one value a sample, (b,), not "
                                     f"{tuple(result[0].shape)}")
    close(result[0], torch.zeros(3), "where the tower gives the velocity eps - x0, the loss must be "
          "0: it points from image to noise")
    watched(model, lambda x, t: truth + torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    close(model.flow_loss(x0, None, t, eps)[0], torch.tensor([1.0, 4.0, 9.0]), "the loss of a "
          "sample must be the mean square of its velocity's error")


# ---------------------------------------------------------------- flow_losses


class Vae(nn.Module):
    """An autoencoder that only knows its units; it keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.channels, self.factor, self.seen = 4, 8, []

    def latents(self, moments, eps=None):
        self.seen.append(eps)
        mean, logvar = moments.chunk(2, dim=1)
        return 0.5 * (mean + (0 if eps is None else eps * (0.5 * logvar).exp()) - 0.25)


CAPTIONS = ["FINDINGS: The heart is large. IMPRESSION: Severe cardiomegaly.",
            "FINDINGS: Fluid on the left. IMPRESSION: Small left pleural effusion.",
            "FINDINGS: Clear lungs, no fluid. IMPRESSION: Normal chest.",
            "No finding at all."]


def trainer(lib, seed, layers=3, both=False, repa=True, no_context=False):
    """A trainer whose model records what flow_loss() gets; its flow and states are known."""
    found = lib.train.Trainer.__new__(lib.train.Trainer)
    model = oracle.small_unix(lib, seed, layers=layers, latent_patch=2)
    found.options = lib.train.Options(stage=2, no_context=no_context)
    found.stage = lib.train.replace(lib.train.STAGES["tiny"][2], repa_weight=0.5 if repa else 0.0)
    found.model, found.both, found.device, found.by_time = model, both, "cpu", []
    found.vae = model.vae = Vae()
    found.captions, found.step = lib.train.CaptionCache(model), 0
    rng = torch.Generator().manual_seed(seed)
    found.projector = None
    if repa:
        found.projector = nn.Linear(24, 10)
        nn.init.normal_(found.projector.weight, generator=rng)
    states = torch.randn(4, 6, 24, generator=rng).requires_grad_(True)
    flow, found.asked = torch.rand(4, generator=rng).requires_grad_(True), []

    def flow_loss(x0, context, t, eps, frozen=True, repa_layer=0):
        found.asked.append(types.SimpleNamespace(
            x0=x0, context=context, t=t, eps=eps, frozen=frozen, repa_layer=repa_layer))
        return flow * 1, states
    model.flow_loss = flow_loss
    found.known = flow, states
    return found


def flow_batch(seed):
    """A batch and the random numbers of its step."""
    rng = torch.Generator().manual_seed(seed)
    batch = {"moments": torch.randn(4, 8, 4, 6, generator=rng), "caption": list(CAPTIONS),
             "features": torch.randn(4, 16, 10, generator=rng)}
    random = {"z": torch.randn(4, 4, 4, 6, generator=rng), "time": torch.rand(4, generator=rng),
              "eps": torch.randn(4, 4, 4, 6, generator=rng),
              "drop": torch.tensor([False, True, False, False]),
              "short": torch.tensor([True, False, False, False]),
              "reads": torch.tensor([False] * 4)}
    return batch, random


def ask(lib, seed, **how):
    found = trainer(lib, seed, **how)
    batch, random = flow_batch(seed)
    losses = found.flow_losses(batch, random)
    assert len(found.asked) == 1, "flow_losses() must call model.flow_loss() once for all images"
    assert isinstance(losses, dict), "flow_losses() must return a dict of summed losses"
    return found, batch, random, losses, found.asked[0]


def check_latents(lib, seed):
    """Latents are a sample of the posterior, in the model's units."""
    _, batch, random, _, got = ask(lib, seed)
    mean, logvar = batch["moments"].chunk(2, dim=1)
    noisy = mean + (0.5 * logvar).exp() * random["z"]
    smooth = got.x0.shape == mean.shape and bool((got.x0 - 0.5 * (mean - 0.25)).abs().max() < 1e-4)
    assert not smooth, ("x0 must be a sample of the autoencoder's posterior, by the noise z, not its "
                        "mean")
    close(got.x0, 0.5 * (noisy - 0.25), "x0 must be the sample that z gives, in the model's units "
          "(self.vae.latents)")
    close(got.eps, random["eps"], "eps, not z, must be the noise at t = 1")
    close(got.t, random["time"], "the time of each image must be random[\"time\"]")


def check_captions(lib, seed):
    """Each image gets its caption, cut where `short`, dropped where `drop`."""
    found, batch, random, _, got = ask(lib, seed)
    assert got.context is not None, "latents must see their caption: the context is missing"
    texts = [c.split("IMPRESSION: ")[-1] if s else c
             for c, s in zip(CAPTIONS, random["short"].tolist())]
    lengths = [len(t.split()) + 2 for t in texts]
    whole = [len(c.split()) + 2 for c in CAPTIONS]
    now, kept = got.context.length.tolist(), [0 if d else n for d, n in
                                              zip(random["drop"].tolist(), lengths)]
    assert now != lengths, "captions must be dropped where random[\"drop\"] is True: none is"
    assert any(now), "captions must be dropped where random[\"drop\"] is True, not everywhere"
    turned = [n if d else 0 for d, n in zip(random["drop"].tolist(), lengths)]
    assert now != turned, ("captions must be dropped where random[\"drop\"] is True: here those are "
                           "kept and the others dropped")
    assert now[0] != whole[0], ("where random[\"short\"] is True the caption must be cut to its "
                                "impression")
    assert now == kept, ("each image must have its own caption, cut where `short` and dropped where "
                         f"`drop`: {kept} tokens with BOS and EOS, not {now}")
    for i, (text, n) in enumerate(zip(texts, kept)):
        if n:
            with torch.no_grad():
                want = found.model.read_captions([found.model.ids(text)]).kv
            for pair, (k, v) in zip(got.context.kv, want):
                close(pair[0][i, :, :n].float(), k[0], "each image must see its own caption", 2e-2,
                      2e-2)
                close(pair[1][i, :, :n].float(), v[0], "each image must see its own caption", 2e-2,
                      2e-2)


def check_frozen(lib, seed):
    """A frozen reader gets no gradient; with --train both it does."""
    for both in (False, True):
        *_, got = ask(lib, seed, both=both)
        learns = any(a.requires_grad for pair in got.context.kv for a in pair)
        assert not (learns and not both), ("while the reader is frozen its captions must carry no "
                                           "gradient: use self.captions, or no_grad")
        assert learns or not both, ("with self.both the reader is trained: captions must be read "
                                    "with gradient, not taken from the memory")
        assert got.frozen is (not both), "flow_loss() must be told frozen = not self.both"


def check_no_context(lib, seed):
    """With no_context latents see no text."""
    *_, got = ask(lib, seed, no_context=True)
    assert got.context is None, "with options.no_context the context must be None"


def check_sums(lib, seed):
    """Losses are summed over images; REPA compares projected states with the teacher's features."""
    found, batch, _, losses, _ = ask(lib, seed)
    flow, states = found.known
    want = float(flow.detach().sum())
    assert set(losses) == {"flow", "repa"}, (
        f"with REPA the losses are \"flow\" and \"repa\", not {sorted(losses)}")
    assert losses["flow"].shape == (), "\"flow\" must be one number, the sum over the images"
    mean = abs(float(losses["flow"].detach()) - want / 4) < 1e-5
    assert not mean, ("losses must be summed over images, not averaged: loss_weights() divides")
    close(losses["flow"], torch.tensor(want), "\"flow\" must be the sum of flow_loss() over images")
    with torch.no_grad():
        side = oracle_features(batch["features"])
        a, b = nn.functional.normalize(found.projector(states), dim=-1), side
        repa = -(a * b).sum(-1).mean(1).sum()
    assert losses["repa"].shape == (), "\"repa\" must be one number, the sum over the images"
    assert not abs(float(losses["repa"].detach()) - float(repa) / 4) < 1e-5, (
        "\"repa\" must be summed over images, not averaged")
    close(losses["repa"], repa, "\"repa\" must be repa_loss() of self.projector(states) and the "
          "features, on the tokens' rows and columns, summed over images")
    losses["flow"].backward(retain_graph=True)
    losses["repa"].backward()
    assert flow.grad is not None and states.grad is not None, (
        "losses must keep their gradients: for the tower and, by REPA, for its states")


def oracle_features(features):
    """Teacher's features on 4 x 4, at 2 x 3 tokens, normalised."""
    found = torch.stack([oracle.area(f.reshape(4, 4, -1), 2, 3).flatten(0, 1) for f in features])
    return nn.functional.normalize(found, dim=-1)


def check_repa_layer(lib, seed):
    """REPA takes the states after a third of the layers, counted from 1; without it, none."""
    for layers, want in ((3, 1), (6, 2), (9, 3)):
        *_, got = ask(lib, seed, layers=layers)
        assert got.repa_layer == want, (f"of {layers} layers REPA takes the states after layer "
                                        f"{want}, counted from 1 (the paper's 8th of 24), not "
                                        f"{got.repa_layer}")
    *_, losses, got = ask(lib, seed, repa=False)
    assert set(losses) == {"flow"} and got.repa_layer == 0, (
        "without a projector there is no REPA: repa_layer is 0, and \"flow\" the only loss")


def check_by_time(lib, seed):
    """The log gets times and losses, without gradient."""
    found, _, random, _, _ = ask(lib, seed)
    assert len(found.by_time) == 1 and len(found.by_time[0]) == 2, (
        "the pair (times, flow losses) must be added to self.by_time")
    times, flow = found.by_time[0]
    close(times, random["time"], "self.by_time must get the times first")
    close(flow, found.known[0].detach(), "self.by_time must get one loss an image")
    assert not flow.requires_grad, "what self.by_time keeps must be detached, or memory fills up"


# ---------------------------------------------------------------- train_step


SMALL = 0.1             # size of inputs whose gradient is not clipped


class Procs:
    """Two processes, of which the other one always has the same gradients and losses."""
    rank, world, device = 0, 1, "cpu"

    def __init__(self, count=1):
        self.count = count

    def sum_gradients(self, parameters):
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(self.count)

    def total(self, x):
        return x.mul_(self.count)


def stepper(lib, seed, parts=1, ema=0.0, size=1.0, processes=1, rate=0.5):
    """A trainer of a linear model: its gradients are known."""
    found = lib.train.Trainer.__new__(lib.train.Trainer)
    rng = torch.Generator().manual_seed(seed)
    found.options = lib.train.Options(stage=2, accumulate=parts)
    found.stage = lib.train.replace(lib.train.STAGES["tiny"][2], ours=lib.train.Ours(ema=ema))
    found.device, found.step, found.bf16, found.procs = "cpu", 3, False, Procs(processes)
    found.trainable = {"a": nn.Parameter(torch.randn(3, generator=rng)),
                       "b": nn.Parameter(torch.randn(2, generator=rng)),
                       "unused": nn.Parameter(torch.ones(2))}
    x, y = torch.randn(7, 3, generator=rng) * size, torch.randn(7, 2, generator=rng)
    y = y * min(1.0, 3 * size)
    found.by_time, found.asked, found.events = ["old"], [], []

    def randomness(step):
        found.asked.append(step)
        return {"time": torch.arange(7.0), "z": x[:, :1] * step}

    def losses(batch, random):
        assert len(batch["x"]) == len(random["time"]) == len(batch["caption"]), (
            "rows must be picked from the batch and from the random numbers alike")
        found.events.append(("losses", [int(t) for t in random["time"]]))
        a, b = found.trainable["a"], found.trainable["b"]
        return {"flow": ((batch["x"] @ a) ** 2).sum(), "repa": ((batch["y"] @ b) ** 2).sum()}
    found.randomness, found.losses = randomness, losses
    found.loss_weights = lambda batch, random: {"flow": 1 / 7, "repa": 0.5 / 7, "text": 1.0}
    found.rate = lambda step: found.asked.append(("rate", step)) or rate
    found.optimizers = [torch.optim.SGD([found.trainable["a"], found.trainable["unused"]], lr=0.1),
                        torch.optim.SGD([found.trainable["b"]], lr=0.2)]
    averages = {k: p.detach().clone() + 1 for k, p in found.trainable.items()} if ema else {}
    found.average = lambda: averages
    batch = {"x": x, "y": y, "caption": [str(i) for i in range(7)]}
    if size < 1:                            # so that nothing is clipped
        with torch.no_grad():
            found.trainable["b"].mul_(0.1)
    return found, batch


def by_hand(found, batch, processes=1, rate=0.5):
    """One step, by hand -> new weights, losses, norm."""
    a, b = (found.trainable[k].detach().double() for k in "ab")
    x, y = batch["x"].double(), batch["y"].double()
    flow, repa = ((x @ a) ** 2).sum() / 7 * processes, ((y @ b) ** 2).sum() * 0.5 / 7 * processes
    ga, gb = 2 / 7 * x.T @ (x @ a) * processes, 1 / 7 * y.T @ (y @ b) * processes
    norm = math.sqrt(float(ga @ ga + gb @ gb))
    factor = min(1.0, 1 / norm)
    return ({"a": a - 0.1 * rate * factor * ga, "b": b - 0.2 * rate * factor * gb},
            {"flow": float(flow), "repa": float(repa), "grad": norm})


def check_step(lib, seed):
    """One step: weighted losses, one clipped gradient, each optimizer's rate."""
    for size, name in ((SMALL, "a small gradient"), (3.0, "a gradient that is clipped")):
        found, batch = stepper(lib, seed, size=size)
        want, logged = by_hand(found, batch)
        assert (logged["grad"] < 1) == (size < 1)
        before = {k: p.detach().clone() for k, p in found.trainable.items()}
        found.train_step(batch)
        for k in "ab":
            p = found.trainable[k]
            assert not torch.equal(p, before[k]), f"a step must change the weights: {name}"
            close(p.detach(), want[k], f"{name}: weights must move by lr x rate x gradient, the "
                  "gradient clipped to norm 1 over all parameters together", 1e-5)
        assert found.step == 4, f"self.step must rise by one, from 3 to 4, not to {found.step}"
    assert 3 in found.asked and ("rate", 3) in found.asked and ("rate", 4) not in found.asked, (
        "random numbers and rate are those of self.step before it rises")
    assert found.by_time == [], "self.by_time must be emptied at the beginning of a step"


def check_two_steps(lib, seed):
    """Gradients are cleared after a step."""
    found, batch = stepper(lib, seed, size=SMALL)
    found.train_step(batch)
    want, _ = by_hand(found, batch)
    rates = [g["lr"] for o in found.optimizers for g in o.param_groups]
    found.train_step(batch)
    again = [g["lr"] for o in found.optimizers for g in o.param_groups]
    assert rates == again, ("each group's rate is optimizer.defaults[\"lr\"] times "
                            "self.rate(step): it must not shrink from step to step")
    for k in "ab":
        close(found.trainable[k].detach(), want[k], "the second step must not see the gradients of "
              "the first: clear them", 1e-5)
    close(torch.tensor(rates), torch.tensor([0.05, 0.1]), "each group's rate is optimizer.defaults"
          "[\"lr\"] times self.rate(step)", 1e-7)


def check_accumulation(lib, seed):
    """Parts of a batch give what the whole batch gives."""
    for parts in (2, 3, 7):
        found, batch = stepper(lib, seed, parts=parts)
        want, logged = by_hand(found, batch)
        got = found.train_step(batch)
        rows = [rows for _, rows in found.events]
        assert sorted(sum(rows, [])) == list(range(7)), (
            f"{parts} parts must hold each row of the batch once: {rows}")
        assert len(rows) == len(torch.arange(7).chunk(parts)), (
            f"with accumulate = {parts} the losses must be computed in that number of parts, to "
            f"save memory, not in {len(rows)}")
        for k in "ab":
            close(found.trainable[k].detach(), want[k], "the gradients of the parts must add up to "
                  "that of the batch, and be clipped once, when all are there", 1e-5)
        for k in ("flow", "repa"):
            assert math.isclose(got[k], logged[k], rel_tol=1e-4), (
                f"the log must show the sum over the parts of weight times loss: {k} is "
                f"{logged[k]:.4f}, not {got[k]:.4f}")


def check_log(lib, seed):
    """The log shows weighted losses and the norm from before clipping, as numbers."""
    found, batch = stepper(lib, seed, size=3.0)
    _, want = by_hand(found, batch)
    got = found.train_step(batch)
    assert isinstance(got, dict) and set(got) == set(want), (
        f"the log shows \"flow\", \"repa\" and \"grad\", not {sorted(got)}")
    assert all(isinstance(v, float) for v in got.values()), "the log's values must be plain floats"
    assert not math.isclose(got["grad"], 1.0, rel_tol=1e-4), (
        "\"grad\" must be the norm from before clipping")
    for k, v in want.items():
        assert math.isclose(got[k], v, rel_tol=1e-4), (
            f"the log must show weight times loss, and the gradient's norm: {k} is {v:.4f}, not "
            f"{got[k]:.4f}")


def check_processes(lib, seed):
    """Gradients are added over processes before they are clipped."""
    found, batch = stepper(lib, seed, processes=2, size=SMALL)
    want, logged = by_hand(found, batch, 2)
    got = found.train_step(batch)
    for k in "ab":
        close(found.trainable[k].detach(), want[k], "gradients must be added over processes "
              "(self.procs.sum_gradients), and then be clipped", 1e-5)
    assert math.isclose(got["flow"], logged["flow"], rel_tol=1e-4), (
        "the log must show losses summed over processes (self.procs.total)")


def check_not_finite(lib, seed):
    """A loss that is not finite stops the step before a weight changes."""
    found, batch = stepper(lib, seed)
    found.file = course.HERE / "no checkpoint"
    batch["x"][2, 1] = math.inf
    before = {k: p.detach().clone() for k, p in found.trainable.items()}
    try:
        found.train_step(batch)
    except lib.train.NotSaved:
        pass
    else:
        raise AssertionError("a loss or gradient that is not finite must stop the run: "
                             "self.check_finite(logged)")
    assert all(torch.equal(p, before[k]) for k, p in found.trainable.items()), (
        "self.check_finite() must be asked before any weight changes")


def check_average(lib, seed):
    """Averaged weights follow the new weights, fast while they are young."""
    for step, ema, decay in ((0, 0.998, 0.1), (3, 0.998, 4 / 13), (5000, 0.998, 0.998),
                             (3, 0.2, 0.2)):
        found, batch = stepper(lib, seed, ema=ema)
        found.step = step
        old = {k: v.clone() for k, v in found.average().items()}
        before = {k: p.detach().clone() for k, p in found.trainable.items()}
        found.train_step(batch)
        for k in "ab":
            new, got = found.trainable[k].detach(), found.average()[k]
            want = decay * old[k] + (1 - decay) * new
            assert not torch.equal(got, old[k]), "averaged weights must move in each step"
            late = decay * old[k] + (1 - decay) * before[k]
            assert not bool((got - late).abs().max() < 1e-6), (
                "the average must take the weights from after the step")
            close(got, want, "average = decay * average + (1 - decay) * weight, with decay = "
                  f"min(ema, step / (step + 9)): {decay:.4g} when self.step is {step + 1}", 1e-6)


def expected(lib):
    return course.load(course.assemble(course.clean_sources(), RIGHT), keep=True)


def show(lib):
    """Loss by steps of a small model that learns one batch with flow_losses() and train_step()."""
    found = trainer(lib, 0)
    del found.model.flow_loss                               # the real one
    rng = torch.Generator().manual_seed(0)
    batch, _ = flow_batch(0)
    model = found.model.requires_grad_(False)
    found.trainable = {k: p.requires_grad_(True) for k, p in model.branch("generation").items()}
    found.trainable |= {f"projector.{k}": p for k, p in found.projector.named_parameters()}
    found.optimizers = [torch.optim.AdamW(list(found.trainable.values()), 3e-3)]
    found.procs, found.bf16, found.average = Procs(), False, lambda: {}
    found.rate, found.check_finite = (lambda step: 1.0), (lambda logged: None)
    found.losses = found.flow_losses
    found.loss_weights = lambda batch, random: {"flow": 1 / 4, "repa": 0.5 / 4}

    def randomness(step):
        z, eps = (torch.randn(4, 4, 4, 6, generator=rng) for _ in range(2))
        return {"z": z, "eps": eps, "time": torch.rand(4, generator=rng),
                "drop": torch.rand(4, generator=rng) < 0.1,
                "short": torch.rand(4, generator=rng) < 0.25}
    found.randomness = randomness
    with torch.enable_grad():
        rows = [found.train_step(batch) for _ in range(150)]
    lines = {}
    for k in ("flow", "repa"):
        lines[k] = (range(10, 151), [sum(r[k] for r in rows[i - 10:i]) / 10
                                     for i in range(10, 151)])
    return pictures.beside([pictures.titled(pictures.curves(
        {k: v}, ("step", f"{k} loss"), (300, 220)), f"a small model learns four images: {k}")
        for k, v in lines.items()])


RIGHT = {
    "unix.UniX.flow_loss": """
def flow_loss(self, x0, context, t, eps, frozen=True, repa_layer=0):
    p = self.config.latent_patch
    h, w = x0.shape[-2], x0.shape[-1]
    clean, noise = to_tokens(x0, p), to_tokens(eps, p)
    s = t.reshape(-1, 1, 1)
    v, states = self.velocity(clean + s * (noise - clean), t, context,
                              self.latent_positions(h, w), frozen=frozen,
                              repa_layer=repa_layer)
    error = v.float() + clean - noise
    return (error * error).mean(dim=(1, 2)), states
""",
    "train.Trainer.flow_losses": """
def flow_losses(self, batch, random):
    moments = batch["moments"].to(self.device)
    on = {k: random[k].to(self.device) for k in ("z", "eps", "time", "drop")}
    x0 = self.vae.latents(moments, on["z"])
    if self.options.no_context:
        context = None
    else:
        texts = list(batch["caption"])
        for i, short in enumerate(random["short"].tolist()):
            if short:
                texts[i] = impression(texts[i])
        if self.both:
            context = self.model.read_captions([self.model.ids(text) for text in texts])
        else:
            with torch.no_grad():
                context = self.model.read_captions([self.model.ids(text) for text in texts])
        context = context.drop(on["drop"])
    depth = 0 if self.projector is None else round(self.model.config.layers * REPA_DEPTH)
    per_image, states = self.model.flow_loss(x0, context, on["time"], on["eps"],
                                             frozen=not self.both, repa_layer=depth)
    self.by_time.append((on["time"], per_image.detach()))
    found = {"flow": per_image.sum()}
    if depth:
        grid = self.model.grid(x0.shape[2], x0.shape[3])
        features = batch["features"].to(self.device)
        found["repa"] = repa_loss(self.projector(states), features, grid).sum()
    return found
""",
    "train.Trainer.train_step": """
def train_step(self, batch):
    random = self.randomness(self.step)
    weights = self.loss_weights(batch, random)
    self.by_time = []
    kind, shown = self.device.split(":")[0], {}
    for rows in torch.chunk(torch.arange(random["time"].shape[0]), self.options.accumulate):
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bf16):
            parts = self.losses(pick_rows(batch, rows), pick_rows(random, rows))
        parts = {name: weights[name] * value for name, value in parts.items()}
        torch.stack(list(parts.values())).sum().backward()
        for name, value in parts.items():
            shown.setdefault(name, []).append(value.detach())
    self.procs.sum_gradients([p for p in self.trainable.values() if p.grad is not None])
    trained = [p for p in self.trainable.values() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in trained]).norm()
    for p in trained:
        p.grad.mul_((1 / (norm + 1e-6)).clamp(max=1))
    total = self.procs.total(torch.stack([sum(values) for values in shown.values()]))
    logged = {name: float(v) for name, v in zip(shown, total)}
    logged["grad"] = float(norm)
    self.check_finite(logged)
    for optimizer in self.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(self.step) * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    self.step = self.step + 1
    decay = min(self.stage.ours.ema, self.step / (self.step + 9))
    with torch.no_grad():
        for name, average in self.average().items():
            average.mul_(decay).add_(self.trainable[name], alpha=1 - decay)
    return logged
""",
}


def _flow(x="path(x0, eps, t)", loss="velocity_loss(v, x0, eps)", t="t", rest="frozen, repa_layer",
          places="*x0.shape[2:]", states="states") -> dict:
    return {"unix.UniX.flow_loss": f"""
def flow_loss(self, x0, context, t, eps, frozen=True, repa_layer=0):
    position_ids = self.latent_positions({places})
    x0, eps = (to_tokens(a, self.config.latent_patch) for a in (x0, eps))
    v, states = self.velocity({x}, {t}, context, position_ids, {rest})
    return {loss}, {states}
"""}


def _losses(**changes) -> dict:
    part = {"x0": 'self.vae.latents(batch["moments"], random["z"])', "short": "short",
            "read": "self.captions.context(texts) if frozen else "
                    "model.read_captions([model.ids(text) for text in texts])",
            "drop": 'context.drop(random["drop"])', "cut": "not self.options.no_context",
            "layer": "round(model.config.layers * REPA_DEPTH)", "t": 'random["time"]',
            "eps": 'random["eps"]', "frozen": "frozen", "kept": "flow.detach()", "flow": "flow.sum()",
            "states": "self.projector(states)", "repa": "repa.sum()"} | changes
    return {"train.Trainer.flow_losses": f"""
def flow_losses(self, batch, random):
    model, frozen, context, layer = self.model, not self.both, None, 0
    x0 = {part["x0"]}
    if {part["cut"]}:
        texts = [impression(c) if {part["short"]} else c
                 for c, short in zip(batch["caption"], random["short"].tolist())]
        context = {part["read"]}
        context = {part["drop"]}
    if self.projector:
        layer = {part["layer"]}
    flow, states = model.flow_loss(x0, context, {part["t"]}, {part["eps"]}, {part["frozen"]}, layer)
    self.by_time.append((random["time"], {part["kept"]}))
    if not self.projector:
        return {{"flow": {part["flow"]}}}
    repa = repa_loss({part["states"]}, batch["features"], model.grid(*x0.shape[2:]))
    return {{"flow": {part["flow"]}, "repa": {part["repa"]}}}
"""}


def _step(**changes) -> dict:
    part = {"chunk": "self.options.accumulate", "weigh": "weights[k] * v", "inside": "pass",
            "shown": "weights[k] * v.detach()", "share": "self.procs.sum_gradients(learned)",
            "clip": "nn.utils.clip_grad_norm_(learned, 1.0)", "late": "pass",
            "check": 'self.check_finite(logged | {"grad": norm.item()})',
            "lr": 'optimizer.defaults["lr"] * self.rate(self.step)', "zero": "optimizer.zero_grad()",
            "early": "pass", "count": "self.step += 1", "random": "pick_rows(random, rows)",
            "decay": "min(self.stage.ours.ema, self.step / (self.step + 9))",
            "weight": "self.trainable[k].detach()", "grad": "norm.item()",
            "total": "self.procs.total(torch.stack([*logged.values()]))"} | changes
    return {"train.Trainer.train_step": f"""
def train_step(self, batch):
    random, logged = self.randomness(self.step), {{}}
    weights = self.loss_weights(batch, random)
    self.by_time = []
    {part["early"]}
    for rows in torch.arange(len(random["time"])).chunk({part["chunk"]}):
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            sums = self.losses(pick_rows(batch, rows), {part["random"]})
            loss = sum({part["weigh"]} for k, v in sums.items())
        {part["inside"]}
        loss.backward()
        for k, v in sums.items():
            logged[k] = logged.get(k, 0) + {part["shown"]}
    learned = [p for p in self.trainable.values() if p.grad is not None]
    {part["share"]}
    norm = {part["clip"]}
    {part["late"]}
    logged = dict(zip(logged, {part["total"]}.tolist()))
    {part["check"]}
    for optimizer in self.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = {part["lr"]}
        optimizer.step()
        {part["zero"]}
    {part["count"]}
    decay = {part["decay"]}
    for k, p in self.average().items():
        p.lerp_({part["weight"]}, 1 - decay)
    return logged | {{"grad": {part["grad"]}}}
"""}


WRONG = {
    "image and noise swapped": _flow(x="path(eps, x0, t)"),
    "the target turned round": _flow(loss="velocity_loss(v, eps, x0)"),
    "the tower sees the image": _flow(x="x0"),
    "one value for the batch": _flow(loss="velocity_loss(v, x0, eps).mean()"),
    "told how far it has come": _flow(t="1 - t"),
    "frozen forgotten": _flow(rest="True, repa_layer"),
    "no states": _flow(states="None"),
    "columns for rows": _flow(places="*x0.shape[2:][::-1]"),
    "the mean latent": _losses(x0='self.vae.latents(batch["moments"])'),
    "z for eps": _losses(eps='random["z"]'),
    "nothing dropped": _losses(drop="context"),
    "all captions dropped": _losses(drop='context.drop(torch.ones_like(random["drop"]))'),
    "kept where it must be dropped": _losses(drop='context.drop(~random["drop"])'),
    "half of the captions dropped": _losses(drop='context.drop(random["time"] > 0.5)'),
    "never short": _losses(short="False"),
    "always short": _losses(short="True"),
    "captions of the neighbours": _losses(read="self.captions.context(texts[1:] + texts[:1])"),
    "reads with gradient": _losses(read="model.read_captions([model.ids(t) for t in texts])"),
    "never reads with gradient": _losses(read="self.captions.context(texts)"),
    "always frozen": _losses(frozen="True"),
    "text in spite of no_context": _losses(cut="True"),
    "the layer from 0": _losses(layer="round(model.config.layers * REPA_DEPTH) - 1"),
    "the eighth layer of any": _losses(layer="min(8, model.config.layers)"),
    "means": _losses(flow="flow.mean()"),
    "mean of REPA": _losses(repa="repa.mean()"),
    "REPA with the wrong sign": _losses(repa="-repa.sum()"),
    "REPA teaches the projector alone": _losses(states="self.projector(states.detach())"),
    "losses kept with their graph": _losses(kept="flow"),
    "no weights": _step(weigh="v"),
    "gradients never cleared": _step(zero="pass"),
    "not clipped": _step(clip="torch.stack([p.grad.norm() for p in learned]).norm()"),
    "each parameter clipped alone": _step(
        clip="torch.stack([nn.utils.clip_grad_norm_([p], 1.0) for p in learned]).norm()"),
    "each value clipped": _step(
        late="nn.utils.clip_grad_value_(learned, 0.1)"),
    "clipped before it is summed": _step(
        share="norm = nn.utils.clip_grad_norm_(learned, 1.0)",
        clip="self.procs.sum_gradients(learned) or norm"),
    "processes forgotten": _step(share="pass"),
    "parts are a mean": _step(weigh="weights[k] * v / self.options.accumulate"),
    "only the last part counts": _step(inside="[o.zero_grad() for o in self.optimizers]"),
    "no parts": _step(chunk="1"),
    "random numbers of the first rows": _step(
        random="pick_rows(random, torch.arange(len(rows)))"),
    "the rate of the next step": _step(early="self.step += 1", count="pass"),
    "rates pile up": _step(lr='group["lr"] * self.rate(self.step)'),
    "no rate": _step(lr='optimizer.defaults["lr"]'),
    "checked too late": _step(check="pass", count='self.step += 1; '
                              'self.check_finite(logged | {"grad": norm.item()})'),
    "never checked": _step(check="pass"),
    "average without warm-up": _step(decay="self.stage.ours.ema"),
    "average the wrong way round": _step(decay="1 - min(self.stage.ours.ema, self.step / "
                                               "(self.step + 9))"),
    "step not counted": _step(count="pass"),
    "the norm after clipping": _step(grad="min(norm.item(), 1.0)"),
    "losses without weights in the log": _step(shown="v.detach()"),
}
