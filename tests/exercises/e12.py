"""Exercise 12: the loss of understanding, on the report alone."""

import math

import torch
from PIL import Image

import oracles_training as oracle
import pictures
from course import close, install

TITLE = "Loss on the report alone"
EQUATION = "Eq. 1"
LAB = "training"
MINUTES = 25
DIFFICULTY = 2
TARGETS = ["ar.report_loss", "unix.UniX.understanding_loss"]
TEXT = """
Eq. 1 sums `-log p(S_{i+1} | S_{<=i})` over the tokens of the report. The image and the prompt are
read, but not learned. Two functions share the work.

`report_loss(hidden, head, labels)` gets hidden states `(b, l, d)`, the layer `head` that makes
logits of them, and labels `(b, l)`. A label is the token that **this** position must predict, so
nothing is left to shift; -100 says "no loss here". Return two values: the **sum** of the cross
entropy over all positions with a label, and the number of these positions. Not a mean: reports have
different lengths, and the parts of a batch are added up later and divided once. Both are tensors
without dimensions, so that they can be added up over devices. Hidden states and `head` may be bf16:
apply `head` as it is, then turn the logits into fp32 before the cross entropy. With no label at
all, the sum is 0. Compute only the logits that are needed: a vocabulary has 102,400 words. (That
saves memory and is not judged.)

`understanding_loss(self, pixels, prompts, reports)` builds the sequences. Prompts and reports are
lists of token lists, without markers; `self.wrap(ids)` puts BOS and EOS around one. Return what
`report_loss` returns. For the prompt `[p1, p2]` and the report `[r1, r2]`:

    tokens  BOS p1 p2 EOS BOS r1 r2 EOS     each position predicts the next token
    labels   .   .  .   .  r1 r2 EOS  .     "." = no loss (unix.NO_LOSS, which is -100)

EOS is learned: a model that never saw it never stops. BOS of the report is not: it is always given.

What there is: `self.pad(rows, value)` turns lists into a tensor `(b, l)`, padded on the right, and
the lengths `(b,)` (without a `value` it pads with EOS; labels need another). `self.embed_image(
pixels)` is the image block; `self.lm.read_text(tokens, length, image)` returns the hidden states of
the text and a context that is not needed here; `self.lm.lm_head` is the head.
"""
HINTS = (
    "Write the two rows of the table for the second sample of your batch, with its padding.",
    "In `understanding_loss`, tokens and labels of a sample have one length. Which value pads each?"
    " In `report_loss`, `labels != -100` is a mask that also indexes `hidden`.",
    "Labels: NO_LOSS for all of the wrapped prompt, then `[*report, eos, NO_LOSS]`. Loss: "
    "`F.cross_entropy(head(hidden[at]).float(), labels[at], reduction=\"sum\")` and `at.sum()`.",
)
SEES = ("A table of positions, tokens and labels: every label stands one position before its token."
        " At step 0 the loss of a token is ln V.")


def slow_report_loss(hidden, head, labels):
    total, count = hidden.sum() * 0, 0
    for b, l in (labels != -100).nonzero().tolist():
        scores = (head.weight @ hidden[b, l]).float()
        total, count = total + scores.logsumexp(0) - scores[labels[b, l]], count + 1
    return total, torch.tensor(count)


def sequence(model, prompt, report):
    """Tokens of one sample, and {position: the token it must predict}."""
    c = model.config
    tokens = [c.bos, *prompt, c.eos, c.bos, *report, c.eos]
    first = len(prompt) + 3                     # where the report begins
    return tokens, {i - 1: tokens[i] for i in range(first, len(tokens))}


def slow_understanding_loss(model, pixels, prompts, reports):
    total, count = 0, 0
    for i, report in enumerate(reports):
        tokens, labels = sequence(model, prompts[i], report)
        image = model.embed_image(pixels[i:i + 1])[0]
        hidden = oracle.read_tokens(model.lm, tokens, image)
        for at, token in labels.items():
            total = total + oracle.cross_entropy(hidden[at], model.lm.lm_head.weight, token)
            count += 1
    return total, torch.tensor(count)


def loss_inputs(lib, seed):
    rng = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(3, 7, 12, generator=rng), torch.nn.Linear(12, 19, bias=False)
    torch.nn.init.normal_(head.weight, generator=rng)
    labels = torch.randint(19, (3, 7), generator=rng)
    labels[0, :4], labels[1, 6:], labels[2, :2], labels[2, 3:] = -100, -100, -100, -100
    labels[1, 0] = 0                            # a token like any other
    return hidden, head, labels


def number(value, text: str) -> float:
    """A number, whether it is a tensor or a plain one."""
    value = torch.as_tensor(value, dtype=torch.float64)
    assert value.numel() == 1, f"{text} must be one number, not of shape {tuple(value.shape)}"
    return float(value)


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


def pair(result, name: str) -> tuple[float, float]:
    assert isinstance(result, (tuple, list)) and len(result) == 2, (
        f"{name} must return two values, the sum of the losses and the number of tokens")
    return (number(result[0], f"{name}: the loss"), number(result[1], f"{name}: the count"))


def check_sum(lib, seed):
    """report_loss() sums the cross entropy over positions that have a label, and counts them."""
    hidden, head, labels = loss_inputs(lib, seed)
    with torch.no_grad():
        total, count = pair(lib.ar.report_loss(hidden, head, labels), "report_loss()")
        want, n = map(float, slow_report_loss(hidden, head, labels))
        rows = [float(slow_report_loss(hidden[i:i + 1], head, labels[i:i + 1])[0])
                / int((labels[i] != -100).sum()) for i in range(3)]
        shifted = float(slow_report_loss(hidden[:, :-1], head, labels[:, 1:])[0])
    assert count == n, (f"report_loss() must count the positions whose label is not -100: {n:.0f} "
                        f"here, not {count:.0f}")
    assert not near(total, want / n), "report_loss() must return the sum over tokens, not the mean"
    means = near(total, sum(rows) / 3) or near(total, sum(rows))
    assert not means, ("report_loss() must sum over tokens: a mean for each report gives a token "
                       "of a short report more weight")
    assert not near(total, shifted), ("labels say what their own position must predict: "
                                      "report_loss() must not shift them once more")
    assert near(total, want), ("report_loss() must be the sum of -log p(label) over the positions "
                               f"that have a label: {want:.4f}, not {total:.4f}")


def check_unlabelled(lib, seed):
    """Positions without a label neither change the loss nor get a gradient."""
    hidden, head, labels = loss_inputs(lib, seed)
    hidden.requires_grad_(True)
    total, _ = lib.ar.report_loss(hidden, head, labels)
    assert isinstance(total, torch.Tensor) and total.requires_grad, (
        "the loss must be a tensor with a gradient")
    total.backward()
    assert hidden.grad is not None, "the loss must have a gradient for the hidden states"
    silent = hidden.grad[labels == -100]
    assert not bool(silent.any()), ("positions with label -100 must get no gradient: image, prompt "
                                    "and padding are not learned")
    assert bool((hidden.grad[labels != -100].abs().amax(-1) > 0).all()), (
        "every position with a label must get a gradient")


def check_nothing(lib, seed):
    """Without any label the sum is 0, with equal logits a token costs ln V."""
    hidden, head, labels = loss_inputs(lib, seed)
    with torch.no_grad():
        total, count = pair(lib.ar.report_loss(hidden, head, torch.full_like(labels, -100)),
                            "report_loss()")
        assert total == 0 and count == 0, (
            f"without any label the loss must be 0 and the count 0, not {total} and {count}")
        head.weight.zero_()
        total, count = pair(lib.ar.report_loss(hidden, head, labels), "report_loss()")
    assert near(total / max(count, 1), math.log(19)), (
        "where all logits are equal a token must cost ln V")


def inputs(lib, seed):
    model = oracle.small_unix(lib, seed)
    prompts = oracle.token_lists(seed, (2, 5, 3))
    reports = oracle.token_lists(seed + 1, (6, 3, 1))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return model, pixels, prompts, reports


def mistakes(model, pixels, prompts, reports) -> dict[str, float]:
    """What typical mistakes make of the loss."""
    found = {}
    for i, (prompt, report) in enumerate(zip(prompts, reports)):
        tokens, labels = sequence(model, prompt, report)
        image = model.embed_image(pixels[i:i + 1])[0]
        hidden, head = oracle.read_tokens(model.lm, tokens, image), model.lm.lm_head.weight
        blind = oracle.read_tokens(model.lm, tokens)

        def add(rule, pairs, states=hidden):
            for at, token in pairs:
                found[rule] = found.get(rule, 0.0) + float(
                    oracle.cross_entropy(states[at], head, token))
        start, last = min(labels), len(tokens) - 1
        add("each position must predict the next token: labels are not shifted, so it predicts "
            "what it sees", [(at + 1, token) for at, token in labels.items()])
        add("each position must predict the next token: the labels are the report as it is read, "
            "with its BOS and not shifted",
            [(start, tokens[start]), *((at + 1, token) for at, token in labels.items())])
        add("each position must predict the next token, not the one after it",
            [(at - 1, token) for at, token in labels.items()])
        add("EOS must be learned: the label of a report's last token is EOS",
            [(at, token) for at, token in labels.items() if at != last - 1])
        add("BOS of the report is given, not learned: the prompt's EOS has no label",
            [(start - 1, tokens[start]), *labels.items()])
        add("the prompt must not be learned: no labels before the report's BOS",
            [(at, tokens[at + 1]) for at in range(last)])
        add("the prompt must not be learned: its tokens have no labels",
            [*labels.items(), *((at, tokens[at + 1]) for at in range(len(prompt) + 1))])
        add("the report must see the image: it is read without", labels.items(), blind)
    return found


def check_sequence(lib, seed):
    """Labels are the report and its EOS, each one position early."""
    model, pixels, prompts, reports = inputs(lib, seed)
    with torch.no_grad():
        total, count = pair(model.understanding_loss(pixels, prompts, reports),
                            "understanding_loss()")
        want = float(slow_understanding_loss(model, pixels, prompts, reports)[0])
        found = {} if near(total, want) else mistakes(model, pixels, prompts, reports)
    n = sum(len(r) + 1 for r in reports)
    for rule, value in found.items():
        assert not near(total, value), rule
    assert count <= n, (f"more has a label than the reports and one EOS each: {count:.0f} tokens, "
                        f"not {n}; prompt, padding and what follows EOS have none")
    assert not near(total, want / n), "understanding_loss() must return a sum, not a mean"
    assert near(total, want), ("understanding_loss() must be the loss of the report's tokens and "
                               f"EOS after [image] [BOS prompt EOS] BOS: {want:.4f}, not "
                               f"{total:.4f}")
    assert count == n, ("understanding_loss() must count the report's tokens and one EOS a report: "
                        f"{n}, not {count:.0f}")


def check_batch(lib, seed):
    """A batch of reports of several lengths is the sum of its samples: padding has no loss."""
    model, pixels, prompts, reports = inputs(lib, seed)
    with torch.no_grad():
        total, count = pair(model.understanding_loss(pixels, prompts, reports), "the batch")
        alone = [pair(model.understanding_loss(pixels[i:i + 1], prompts[i:i + 1],
                                               reports[i:i + 1]), "a sample") for i in range(3)]
    assert count == sum(n for _, n in alone), ("padding must have no label: a batch counts more "
                                               "tokens than its samples do")
    assert near(total, sum(v for v, _ in alone)), (
        "the loss of a batch must be the sum of its samples' losses: padding must have no loss and "
        "change nothing")


def check_gradient(lib, seed):
    """The loss teaches the image encoder, the connector and the language model."""
    model, pixels, prompts, reports = inputs(lib, seed)
    before = [list(r) for r in prompts + reports]
    lib_loss, _ = model.understanding_loss(pixels, prompts, reports)
    assert before == prompts + reports, "understanding_loss() must not change the lists it is given"
    assert isinstance(lib_loss, torch.Tensor) and lib_loss.requires_grad, (
        "the loss must be a tensor with a gradient")
    lib_loss.backward()
    for part, p in (("the image encoder", model.vit.patch_embed["proj"].weight),
                    ("the connector", model.connector.layers[0].weight),
                    ("the language model", model.lm.tower.layers[0].und.q_proj.weight)):
        assert p.grad is not None and bool(p.grad.any()), f"the loss must teach {part}"


def expected(lib):
    def understanding_loss(self, pixels, prompts, reports):
        rows = [sequence(self, p, r) for p, r in zip(prompts, reports)]
        labels = [[found.get(at, -100) for at in range(len(tokens))] for tokens, found in rows]
        (tokens, length), (labels, _) = self.pad([t for t, _ in rows]), self.pad(labels, -100)
        hidden, _ = self.lm.read_text(tokens, length, self.embed_image(pixels))
        return lib.unix.report_loss(hidden, self.lm.lm_head, labels)
    return install(lib, {"ar.report_loss": slow_report_loss,
                         "unix.UniX.understanding_loss": understanding_loss})


def show(lib):
    """Positions, tokens and labels of a batch, as report_loss() gets them."""
    model, pixels, prompts, reports = inputs(lib, 0)
    seen, loss, read = {}, lib.unix.report_loss, model.lm.read_text

    def caught_read(tokens, length, image=None):
        seen["tokens"] = tokens
        return read(tokens, length, image)

    def caught_loss(hidden, head, labels):
        seen["labels"] = labels
        return loss(hidden, head, labels)
    lib.unix.report_loss, model.lm.read_text = caught_loss, caught_read
    model.understanding_loss(pixels, prompts, reports)
    lib.unix.report_loss = loss
    model.lm.read_text = read
    model.lm.lm_head.weight.zero_()
    total, count = model.understanding_loss(pixels, prompts, reports)
    if set(seen) != {"tokens", "labels"}:
        return pictures.message("no table: understanding_loss() does not call report_loss()")
    tokens, labels = seen["tokens"].tolist(), seen["labels"].tolist()
    out = Image.new("RGB", (90 + 44 * len(tokens[0]), 24 + 62 * len(tokens)), "white")
    for b, (row, wanted) in enumerate(zip(tokens, labels)):
        y = 8 + 62 * b
        pictures.write(out, (6, y), "token")
        pictures.write(out, (6, y + 22), "label")
        used = len(prompts[b]) + len(reports[b]) + 4
        for i, (token, label) in enumerate(zip(row, wanted)):
            color = pictures.INK if i < used else pictures.FAINT
            name = oracle.MARKERS.get(token, str(token))
            pictures.write(out, (90 + 44 * i, y), name, anchor="ma", color=color)
            name = "." if label == -100 else oracle.MARKERS.get(label, str(label))
            pictures.write(out, (90 + 44 * i, y + 22), name, anchor="ma", color=pictures.COLORS[1])
    pictures.write(out, (6, out.height - 20), f"equal logits: {float(total) / float(count):.3f} a "
                   f"token; ln V = {math.log(model.config.vocab):.3f}")
    return out


RIGHT = {
    "ar.report_loss": """
def report_loss(hidden, head, labels):
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = torch.nonzero(wanted >= 0).squeeze(1)
    log_p = torch.log_softmax(head(flat[keep]).float(), dim=-1)
    chosen = log_p[torch.arange(len(keep), device=log_p.device), wanted[keep]]
    return -chosen.sum(), torch.tensor(len(keep), device=hidden.device)
""",
    "unix.UniX.understanding_loss": """
def understanding_loss(self, pixels, prompts, reports):
    c, sequences, starts = self.config, [], []
    for i, report in enumerate(reports):
        head = [c.bos] + list(prompts[i]) + [c.eos]
        sequences.append(head + [c.bos] + list(report) + [c.eos])
        starts.append(len(head))
    longest = max(map(len, sequences))
    tokens = torch.full((len(sequences), longest), c.eos, device=self.device)
    labels = torch.full_like(tokens, NO_LOSS)
    for i, (row, start) in enumerate(zip(sequences, starts)):
        row = torch.tensor(row, device=self.device)
        tokens[i, :len(row)] = row
        labels[i, start:len(row) - 1] = row[start + 1:]
    length = torch.tensor([len(s) for s in sequences], device=self.device)
    states = self.lm.read_text(tokens, length, self.embed_image(pixels))[0]
    return report_loss(states, self.lm.lm_head, labels)
""",
}


def _loss(body: str) -> dict:
    return {"ar.report_loss": "def report_loss(hidden, head, labels):\n" + body}


def _sequence(labels: str, tokens: str = "p + self.wrap(r)", image: str = "self.embed_image(pixels)",
              value: str = "NO_LOSS") -> dict:
    return {"unix.UniX.understanding_loss": f"""
def understanding_loss(self, pixels, prompts, reports):
    before = [self.wrap(p) for p in prompts]
    eos, bos = self.config.eos, self.config.bos
    tokens = [{tokens} for p, r in zip(before, reports)]
    labels = [{labels} for p, r in zip(before, reports)]
    (tokens, length), (labels, _) = self.pad(tokens), self.pad(labels, {value})
    hidden, _ = self.lm.read_text(tokens, length, {image})
    return report_loss(hidden, self.lm.lm_head, labels)
"""}


WRONG = {
    "a mean": _loss("""
    at = labels != -100
    return F.cross_entropy(head(hidden[at]).float(), labels[at]), at.sum()
"""),
    "a mean of means": _loss("""
    losses = [F.cross_entropy(head(h).float(), y) for h, y in zip(hidden, labels)]
    return torch.stack(losses).sum(), (labels != -100).sum()
"""),
    "shifts labels that are shifted": _loss("""
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    at = labels != -100
    return F.cross_entropy(head(hidden[at]).float(), labels[at], reduction="sum"), at.sum()
"""),
    "counts padding": _loss("""
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum"), labels.numel()
"""),
    "token 0 has no loss": _loss("""
    at = labels > 0
    return F.cross_entropy(head(hidden[at]).float(), labels[at], reduction="sum"), at.sum()
"""),
    "one value": _loss("""
    at = labels != -100
    return F.cross_entropy(head(hidden[at]).float(), labels[at], reduction="sum")
"""),
    "no gradient": _loss("""
    at = labels != -100
    return F.cross_entropy(head(hidden[at].detach()).float(), labels[at], reduction="sum"), at.sum()
"""),
    "predicts what it sees": _sequence("[NO_LOSS] * len(p) + [NO_LOSS, *r, eos]"),
    "predicts two ahead": _sequence("[NO_LOSS] * (len(p) - 1) + [*r, eos, NO_LOSS, NO_LOSS]"),
    "no EOS": _sequence("[NO_LOSS] * len(p) + [*r, NO_LOSS, NO_LOSS]"),
    "EOS twice": _sequence("[NO_LOSS] * len(p) + [*r, eos, eos]"),
    "learns BOS": _sequence("[NO_LOSS] * (len(p) - 1) + [bos, *r, eos, NO_LOSS]"),
    "learns the prompt": _sequence("[*p[1:], bos, *r, eos, NO_LOSS]"),
    "learns padding": _sequence("[NO_LOSS] * len(p) + [*r, eos, NO_LOSS]", value="eos"),
    "no image": _sequence("[NO_LOSS] * len(p) + [*r, eos, NO_LOSS]", image="None"),
    "no prompt": _sequence("[*r, eos, NO_LOSS]", tokens="self.wrap(r)"),
    "image without gradient": _sequence("[NO_LOSS] * len(p) + [*r, eos, NO_LOSS]",
                                        image="self.embed_image(pixels).detach()"),
    "prompt and report without EOS and BOS between": _sequence(
        "[NO_LOSS] * (len(p) - 1) + [*r, eos, NO_LOSS]"
        " if p else [*r, eos, NO_LOSS]", tokens="p[:-1] + self.wrap(r)"),
}
