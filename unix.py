"""UniX: one model, two branches, one sequence (Sec. 3), and its weights on disk.

    understanding  [BOI image EOI] [BOS prompt EOS] [BOS report EOS]   all tokens: expert und
    generation     [BOS caption EOS] [BOI latents EOI]                 latents: gen, the rest: und

Letters: b batch, l text tokens, m image tokens with markers, n latent tokens, d width, c channels.
"""

import json
import math
import os
import pickle
import re
import tomllib
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ar import Connector, LanguageModel, RadDino, Tokenizer, ViT, decode, pick, report_loss
from data import WINDOWS, UserError, atomic, write_json
from diffusion import (VAE, TimeEmbedder, path, position_ids, position_table, sample, to_latents,
                       to_tokens, to_uint8, velocity_loss, velocity_from_x0)

NO_LOSS = -100      # a label that cross entropy leaves out
SPECIAL = ("<|begin|>", "<|end|>", "<|begin_of_image|>", "<|end_of_image|>")
INSTRUCTIONS = (
    "Review this X-ray and provide detailed FINDINGS.", "Write the report of this image.",
    "Describe this chest X-ray.", "What does this radiograph show?")


@dataclass
class Config:
    """Sizes. The defaults are the paper's: 1.96B understanding, 1.24B generation."""
    vit_image: int = 384        # SigLIP-L/16 at 384 px
    vit_patch: int = 16
    vit_width: int = 1024
    vit_mlp: int = 4096
    vit_heads: int = 16
    vit_layers: int = 24
    vocab: int = 102400         # Janus-Pro's language model
    layers: int = 24
    width: int = 2048
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    mlp: int = 5632
    max_tokens: int = 2048      # text tokens of a caption or report
    latent_side: int = 32       # position table of tokens is latent_side x latent_side
    interpolate_pos: bool = False   # tokens spread over the whole table at any size
    latent_channels: int = 16
    latent_patch: int = 1       # a token is a square of latents, this many a side
    share_layers: int = 0       # this many first layers have one expert for both branches
    bos: int = 100000
    eos: int = 100001
    boi: int = 100003
    eoi: int = 100580
    no_context: bool = False    # latents attend to no caption (ours)
    predict_x0: bool = False    # v follows from a predicted x0: velocity_from_x0 (ours)
    resolution: int = 512       # pixels a side of generated images
    guidance: float = 2.0       # scale of classifier-free guidance
    guidance_interval: tuple = (0.4, 1.0)   # times at which it is on
    eta: float = 0.0            # fresh noise in each step of sampling (ours)
    taught_on: str = ""         # "phantom", "data", or unknown (ours)
    vae: dict = field(default_factory=dict)     # arguments of diffusion.VAE


PRESETS = {
    "unix": Config(),
    "tiny": Config(
        vit_image=96, vit_patch=16, vit_width=128, vit_mlp=512, vit_heads=4, vit_layers=4,
        vocab=1024, layers=3, width=128, heads=4, kv_heads=4, head_dim=32, mlp=352,
        max_tokens=256, latent_side=64, latent_patch=2, interpolate_pos=True,
        bos=0, eos=1, boi=2, eoi=3, resolution=128, guidance=3.0, eta=1.0, predict_x0=True,
        vae={"ch": 32, "mult": [1, 1, 2, 2], "blocks": 1, "attn": [],
             "scale": 1.0, "latent_mean": 0.0, "groups": 8}),
}


class UniX(nn.Module):
    """Both branches. `tokenizer` and `vae` may be None until one is given."""
    cut_texts = False       # True in training and evaluation: a text too long loses its end

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None, vae: VAE | None = None):
        super().__init__()
        c = self.config = config
        self.vit = ViT(c.vit_image, c.vit_patch, c.vit_width, c.vit_mlp, c.vit_heads, c.vit_layers)
        self.connector = Connector(c.vit_width, c.width)
        self.lm = LanguageModel(c.vocab, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.mlp,
                                share=c.share_layers)
        self.vae2llm = nn.Linear(c.latent_channels * c.latent_patch ** 2, c.width)
        self.llm2vae = nn.Linear(c.width, c.latent_channels * c.latent_patch ** 2)
        self.time_embedder = TimeEmbedder(c.width)
        self.register_buffer("positions", position_table(c.latent_side, c.width))
        for name, p in self.named_parameters():
            if not name.startswith("vit.") and p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.zeros_(self.llm2vae.weight)         # so that the first prediction is 0
        self.lm.init_local_attention()
        self.tokenizer, self.vae = tokenizer, vae

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def branch(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of a branch by name (Table 1); shared layers belong to understanding."""
        def where(key: str) -> str:
            if re.search(r"gen\.|^(vae2llm|llm2vae|time_embedder)", key):
                return "generation"
            return "vae" if key.startswith("vae.") else "understanding"
        return {k: p for k, p in self.named_parameters() if where(k) == name}

    def resize_projections(self):
        """New projections of latents, where the autoencoder is not the one they were made for:
        a token covers 16 x 16 pixels (or one latent, if that is more)."""
        c = self.config
        channels, patch = self.vae.channels, max(1, 16 // self.vae.factor)
        if (channels, patch) != (c.latent_channels, c.latent_patch):
            c.latent_channels, c.latent_patch = channels, patch
            new = UniX(replace(c, layers=0, vit_layers=0, vocab=1)).to(self.device)
            self.vae2llm, self.llm2vae = new.vae2llm, new.llm2vae

    def copy_tower(self):
        """Sec. 3.3: the generation tower starts as a copy of the understanding tower."""
        for layer in self.lm.tower.layers:
            layer.gen.load_state_dict(layer.und.state_dict())
        self.lm.tower.norm_gen.load_state_dict(self.lm.tower.norm.state_dict())

    # ---- sequences
    def ids(self, text: str) -> list[int]:
        """Token ids of a text without markers. UserError: empty, too long (but if `cut_texts`),
        no or another tokenizer."""
        if self.tokenizer is None:
            raise UserError("the weights folder has no tokenizer.json; add one")
        if not text.strip():
            raise UserError("the text is empty; give at least a word")
        ids, most = self.tokenizer.encode(text), self.config.max_tokens - 2
        if len(ids) > most and not self.cut_texts:
            raise UserError(f"the text has {len(ids)} tokens, more than fit; shorten it")
        if not ids or max(ids) >= self.config.vocab:
            raise UserError("tokenizer.json is not that of these weights: "
                            + ("it has more tokens" if ids else f"it lacks all of {text[:20]!r}"))
        return ids[:most]

    def pad(self, rows: list[list[int]], value: int | None = None) -> tuple[Tensor, Tensor]:
        """Token lists -> (b, l), padded on the right (with EOS), and the lengths (b,)."""
        length = torch.tensor([len(r) for r in rows])
        value = self.config.eos if value is None else value
        tokens = nn.utils.rnn.pad_sequence([*map(torch.tensor, rows)], True, value)
        return tokens.to(self.device), length.to(self.device)

    def wrap(self, ids: list[int]) -> list[int]:
        return [self.config.bos, *ids, self.config.eos]

    def boi_eoi(self, b: int) -> Tensor:
        """Embedded begin- and end-of-image markers (b, 2, d)."""
        pair = torch.tensor([self.config.boi, self.config.eoi], device=self.device)
        return self.lm.embed_tokens(pair).expand(b, -1, -1)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """ViT pixels (b, 3, H, W) -> image block [BOI features EOI] (b, m, d)."""
        begin, end = self.boi_eoi(len(pixels)).split(1, dim=1)
        return torch.cat([begin, self.connector(self.vit(pixels.to(begin.dtype))), end], dim=1)

    def read_captions(self, captions: list[list[int]]):
        """Token lists of captions -> the Context that the latents attend to."""
        return self.lm.read_text(*self.pad([self.wrap(c) for c in captions]))[1]

    # ---- understanding
    def understanding_loss(self, pixels: Tensor, prompts: list, reports: list):
        """Eq. 1 for images (b, 3, H, W) and token lists -> summed loss, number of report tokens.

            tokens  BOS p1 p2 EOS BOS r1 r2 EOS     each position predicts the next token
            labels   .   .  .   .  r1 r2 EOS  .     "." = no loss: image, prompt, padding
        """
        tokens = [self.wrap(p) + self.wrap(r) for p, r in zip(prompts, reports)]
        labels = [[NO_LOSS] * (len(p) + 2) + [*r, self.config.eos, NO_LOSS]
                  for p, r in zip(prompts, reports)]
        (tokens, length), (labels, _) = self.pad(tokens), self.pad(labels, NO_LOSS)
        hidden, _ = self.lm.read_text(tokens, length, self.embed_image(pixels))
        return report_loss(hidden, self.lm.lm_head, labels)

    @torch.no_grad()
    def report(self, pixels: Tensor, prompt: str = INSTRUCTIONS[0], max_new: int = 500,
               temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> list[str]:
        """Writes the reports of ViT pixels (b, 3, H, W): greedy, or sampled at a temperature > 0.
        Raises UserError: prompt empty or too long."""
        rng = torch.Generator().manual_seed(seed)
        tokens, length = self.pad([self.wrap(self.ids(prompt)) + [self.config.bos]] * len(pixels))
        steps = decode(self.lm, tokens, length, self.embed_image(pixels), self.config.eos, max_new,
                       lambda logits: pick(logits, temperature, top_p, rng))
        written = torch.stack([token for token, _ in steps], dim=1).tolist()
        end = self.config.eos
        return [self.tokenizer.decode(ids[:[*ids, end].index(end)]) for ids in written]

    # ---- generation
    def velocity(self, x: Tensor, t: Tensor, context, position_ids: Tensor, frozen=True,
                 repa_layer=0, latent_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """v_t of latent tokens x (b, n, c) at times t (b,), and the states after layer
        `repa_layer`. `position_ids` (n,) or (b, n): rows of the position table. `latent_mask`
        (b, n): False at padding."""
        boi_eoi = self.boi_eoi(len(x))
        tokens = self.vae2llm(x.to(boi_eoi.dtype)) + self.time_embedder(t)[:, None]
        tokens = tokens + self.positions[position_ids].to(boi_eoi.dtype)
        out, repa_states = self.lm.tower.denoise(boi_eoi, tokens, context, frozen, repa_layer,
                                                 latent_mask)
        out = self.llm2vae(out)
        return velocity_from_x0(out, x, t) if self.config.predict_x0 else out, repa_states

    def flow_loss(self, x0: Tensor, context, t: Tensor, eps: Tensor, frozen=True, repa_layer=0):
        """Eq. 2, one value a sample (b,), of clean latents x0 and noise eps (b, c, h, w) at times
        t (b,); and the states after layer `repa_layer`."""
        position_ids = self.latent_positions(*x0.shape[2:])
        x0, eps = (to_tokens(a, self.config.latent_patch) for a in (x0, eps))       # (b, n, c)
        v, repa_states = self.velocity(path(x0, eps, t), t, context, position_ids, frozen,
                                       repa_layer)
        return velocity_loss(v, x0, eps), repa_states

    @torch.no_grad()
    def sample_latents(self, captions: list[list[int]], h: int, w: int, seeds, **how):
        """Denoises an h x w latent image a caption; yields latents (b, c, h, w) after each step.
        Noise: from each image's seed, on the CPU; the same in any batch. `how`: arguments of
        diffusion.sample; None or nothing means as trained."""
        c, context = self.config, None
        how = {"scale": c.guidance, "eta": c.eta, "interval": c.guidance_interval} | {
            k: v for k, v in how.items() if v is not None}
        if c.no_context:
            how["scale"] = 1.0          # without text there is nothing to be guided by
        else:
            context = self.read_captions(captions)
            both = context.with_empty()             # so that a guided step is one pass
        rngs = [torch.Generator().manual_seed(s) for s in seeds]
        position_ids = self.latent_positions(h, w)
        shape = len(position_ids), self.vae2llm.in_features

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in rngs]).to(self.device)

        def velocity(x, t, guided):
            if guided:
                return self.velocity(x.repeat(2, 1, 1), t.repeat(2), both, position_ids)[0].chunk(2)
            return self.velocity(x, t, context, position_ids)[0]
        for _, _, x in sample(velocity, noise(), noise=noise, **how):
            yield to_latents(x, self.grid(h, w)[0], c.latent_patch)

    def grid(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the tokens of h x w latents."""
        return h // self.config.latent_patch, w // self.config.latent_patch

    def latent_positions(self, h: int, w: int) -> Tensor:
        """Rows of the position table for the n tokens of h x w latents (n,)."""
        c = self.config
        return position_ids(*self.grid(h, w), c.latent_side, c.interpolate_pos).to(self.device)

    def latent_rows(self, size: int | None) -> int:
        """Latent rows of an image of `size` pixels a side (None: as trained). Raises UserError."""
        if self.vae is None:
            raise UserError("the weights folder has no autoencoder: run train.py --stage 0, or "
                            "put one there as vae/vae.ckpt")
        size = self.config.resolution if size is None else size
        if self.vae.channels != self.config.latent_channels:
            raise UserError("the autoencoder is not the one whose latents the model has learned")
        token = self.vae.factor * self.config.latent_patch              # its pixels a side
        if size % token or not 0 < size <= token * self.config.latent_side:
            raise UserError(f"size must be a multiple of {token} up to "
                            f"{token * self.config.latent_side}, not {size}")
        return size // self.vae.factor

    @torch.no_grad()
    def generate(self, captions: list[str], size: int | None = None, seeds=None, **how) -> Tensor:
        """One image a caption -> uint8 (b, 3, size, size), each from the noise of its own seed.
        Raises UserError. `how`: points, shift, scale, eta, interval of diffusion.sample."""
        side, ids = self.latent_rows(size), [self.ids(c) for c in captions]
        *_, latents = self.sample_latents(ids, side, side, seeds or range(len(ids)), **how)
        return to_uint8(torch.cat([self.vae.decode(some) for some in latents.split(8)]))

    # ---- weights folders
    def save(self, folder: str | Path, dtype: torch.dtype | None = None):
        """Writes a weights folder in the released layout, each file whole or not at all; weights
        come last, so that a folder that has them has all they need. Floats are stored as `dtype`
        (None: as they are); the position table stays exact."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.vae is not None:
            save_vae(self.vae, folder / "vae", dtype)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", [config_json(self)], indent=2)
        write_safetensors({released(k): v if k == "positions" else v.to(dtype or v.dtype)
                           for k, v in self.state_dict().items() if not k.startswith("vae.")},
                          folder / "model.safetensors")

    @staticmethod
    def load(folder: str | Path, device="cpu", dtype=torch.float32) -> "UniX":
        """Opens a released, a Janus-Pro or one of our own folders. Raises UserError.
        Tensors stay in the mapped file where dtype and device allow it; the autoencoder is fp32."""
        folder = Path(folder)
        about, tokenizer = JsonFile(folder / "config.json"), folder / "tokenizer.json"
        weights = {re.sub("^aligner", "connector", re.sub("^vision_model", "vit_model", k)): v
                   for k, v in read_weights(folder).items() if not re.search(RELEASED["unread"], k)}
        config = infer_config(weights, about)
        with torch.device("meta"):
            model = UniX(config)
        if not any("_moe_gen." in k for k in weights):
            fill_missing(weights, model)
        weights.setdefault(released("positions"), position_table(config.latent_side, config.width))
        load_strict(model, weights, dtype, folder)
        model.tokenizer = Tokenizer.load(tokenizer) if tokenizer.exists() else None
        for name in (about.get("vae_config.path", ""), about.get("vae_path", ""),
                     "vae/model.safetensors", "vae/vae.ckpt", "vae.ckpt"):
            if model.vae is None and os.path.isfile(folder / name):
                model.vae = load_vae(folder / name, about)
        return model.to(device).eval()


def use_bf16(precision: str, device: str | torch.device, model: nn.Module) -> bool:
    """Is it bf16? "auto": on CUDA or a CPU that has it, for an autoencoder or for layers at least
    512 wide; smaller ones are slower."""
    fast = "cuda" in str(device) and (          # a plan for another card, or one that has bf16
        not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False))
    fast = fast or str(device) == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    wide = isinstance(model, VAE) or model.config.width >= 512
    return precision == "bf16" or precision == "auto" and fast and wide


# ---- weights folders: names, settings, sizes (you need not read on) -----------------------------
# Released folders' names of tensors and of settings in config.json
RELEASED = tomllib.loads((Path(__file__).parent / "assets" / "released.toml").read_text("utf-8"))
OURS, UNITS = RELEASED["config"]["ours"], RELEASED["vae"]


def released(name: str) -> str:
    """Our parameter name -> the official one."""
    for ours, theirs in RELEASED["tensors"]:
        name = re.sub(ours, theirs, name)
    return name


def fill(part, values):
    """A part of released.toml, with values.width where it says "$width"."""
    if isinstance(part, dict):
        return {k: fill(v, values) for k, v in part.items()}
    return getattr(values, part[1:]) if str(part).startswith("$") else part


def config_json(model: UniX) -> dict:
    """The released config.json for a model, with what only we need under "ours"."""
    about = fill(RELEASED["config"], model.config)
    about["llm_config"] = about["language_config"] | about["llm_config"]
    about["vit_max_num_patch_per_side"] = model.vit.image // model.vit.patch
    return about | (fill(RELEASED["autoencoder"], model.vae) if model.vae is not None else {})


def infer_config(weights: dict[str, Tensor], about: "JsonFile") -> Config:
    """Config of a weights folder: sizes from tensor shapes; the rest from config.json. Raises
    UserError: a tensor is missing or cut, a setting is of the wrong kind."""
    def size(ours: str, axis: int, default=None) -> int:
        shape = weights[released(ours)].shape if released(ours) in weights else ()
        found = shape[axis] if len(shape) > axis and shape[axis] else default
        if found is None:
            raise UserError(f"{about.file.parent}: tensor {released(ours)} is missing or cut; "
                            "download the folder again")
        return found

    def count(blocks: str) -> int:
        return len({k.split(".")[3] for k in weights if k.startswith(blocks)})
    text = "language_config" if about.get("language_config", {}) else "llm_config"
    sampling, layer, base = "inference_config.generation", "lm.tower.layers.0.und.", Config()
    sizes = {ours: size(*at) for ours, at in RELEASED["sizes"].items()}
    rows, vocab, vit_width = size(layer + "q_proj.weight", 0), sizes["vocab"], sizes["vit_width"]
    heads = about.get(f"{text}.num_attention_heads", max(1, rows // 128), 1, rows)  # Janus-Pro: 128
    head_dim = size(layer + "q_norm.weight", 0, rows // heads)
    latent_patch = about.get("latent_patch_size", 1, 1, 16)
    latents = size("vae2llm.weight", 1, base.latent_channels * latent_patch ** 2)
    vit_heads = about.get("vit_config.num_attention_heads", max(1, vit_width // 64), 1, vit_width)
    for key, whole, part in (("vit_config.num_attention_heads", vit_width, vit_heads),
                             ("latent_patch_size", latents, latent_patch ** 2)):
        if whole % part:
            raise UserError(f"{about.file}: {key} does not divide the tensors ({whole})")
    usual = [base.bos, base.eos, base.boi, base.eoi]    # the released code has them hard-coded
    usual = usual if max(usual) < vocab else range(vocab - 4, vocab)
    markers = RELEASED["config"]["special_token_ids"]
    ours = about.get("ours", {})
    if "predict_film" in ours:
        ours["predict_x0"] = ours.pop("predict_film")       # its older name
    if unknown := ours.keys() - OURS.keys():
        raise UserError(f"{about.file}: ours.{min(unknown)} is unknown; is the code too old?")
    return Config(
        **sizes, vit_heads=vit_heads, heads=rows // head_dim, head_dim=head_dim,
        vit_image=sizes["vit_patch"] * math.isqrt(size("vit.pos_embed", 1)),
        vit_layers=count("vit_model.vision_tower.blocks."),
        layers=count("language_model.model.layers."),
        kv_heads=size(layer + "k_proj.weight", 0) // head_dim,
        max_tokens=about.get(f"{text}.max_position_embeddings", base.max_tokens, 1),
        latent_side=math.isqrt(size("positions", 0, base.latent_side ** 2)),
        latent_patch=latent_patch, latent_channels=latents // latent_patch ** 2,
        interpolate_pos=about.get("interpolate_pos", False),
        guidance=about.get(f"{sampling}.cfg_text_scale", base.guidance),
        guidance_interval=tuple(about.get(f"{sampling}.cfg_interval.{i}", t)
                                for i, t in enumerate(base.guidance_interval)),
        **{name[1:]: about.get(f"special_token_ids.{theirs}", i, 0, vocab - 1)
           for (theirs, name), i in zip(markers.items(), usual)},
        **{k: about.get(f"ours.{k}", getattr(base, k), 0, 1 if k == "eta" else 1e9) for k in OURS})


def fill_missing(weights: dict[str, Tensor], model: UniX):
    """Janus-Pro has no QK-norm, no q/k/v bias and no generation branch: norms of 1, biases of 0, a
    generation tower copied from understanding, and new latent and time embeddings."""
    fresh = UniX(replace(model.config, layers=0, vit_layers=0, vocab=1)).state_dict()
    for k, v in model.state_dict().items():
        name = released(k)
        source = name.replace("_moe_gen", "")
        if re.search(r"[qkv]_proj.*bias|[qk]_norm", name):
            weights.setdefault(name, torch.full(v.shape, 1.0 if "norm" in name else 0.0))
        elif source != name and source in weights:
            weights.setdefault(name, weights[source].clone())
        elif k.startswith(("vae2llm", "llm2vae", "time_embedder")):
            weights.setdefault(name, fresh[k])


def load_strict(model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path):
    """Moves tensors of official names into a model on the meta device. Raises UserError."""
    state = {released(k): v for k, v in model.state_dict().items()}
    wrong = [f"missing: {k}" for k in state.keys() - weights.keys()]
    wrong += [f"unexpected: {k}" for k in weights.keys() - state.keys()]
    wrong += [f"wrong shape: {k} is {list(weights[k].shape)}, not {list(v.shape)}"
              for k, v in state.items() if k in weights and weights[k].shape != v.shape]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensor(s) {', '.join(sorted(wrong)[:4])}")
    model.load_state_dict({     # taken out one at a time: never are two copies of all held
        k: weights.pop(released(k)).to(torch.float32 if k == "positions" else dtype)
        for k in model.state_dict()}, assign=True)


def save_vae(vae: VAE, folder: Path, dtype: torch.dtype | None = None):
    """Writes an autoencoder, the scale and shift of its latents, and the groups of its norms."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", [{k: getattr(vae, ours) for k, (ours, *_) in UNITS.items()}])
    write_safetensors({k: v.to(dtype or v.dtype) for k, v in vae.state_dict().items()},
                      folder / "model.safetensors")


def load_vae(file: str | Path, about: "JsonFile | None" = None) -> VAE:
    """A CompVis autoencoder from .ckpt or .safetensors, whatever its sizes. Units of latents, and
    groups of norms: those of a config.json beside it, else of the model's, else the released ones.
    Raises UserError."""
    file, parts = Path(file), ("encoder.", "decoder.", "quant_", "post_quant_")
    weights = {k: v for k, v in read_tensors(file).items() if k.startswith(parts)}  # not loss.*
    beside, units = JsonFile(file.parent / "config.json", optional=True), {}
    for theirs, (ours, usual, least) in UNITS.items():
        usual = about.get(f"vae_config.{theirs}", usual, least) if about else usual
        units[ours] = beside.get(theirs, usual, least)
    try:
        with torch.device("meta"):
            vae = VAE(**VAE.sizes(weights), **units)
    except (LookupError, ArithmeticError, ValueError) as e:
        raise UserError(f"{file}: not a CompVis autoencoder ({e}); see --vae") from None
    load_strict(vae, weights, torch.float32, file)
    return vae.eval()


def load_rad_dino(folder: str | Path) -> RadDino:
    """RAD-DINO or another DINOv2 from a Hugging Face folder. Raises UserError."""
    folder = Path(folder)
    weights, about = read_weights(folder), JsonFile(folder / "config.json")
    looks = JsonFile(folder / "preprocessor_config.json", optional=True)    # images are grey: ".0"
    return RadDino(folder, weights, about.get("num_attention_heads", 12, 1),
                   looks.get("crop_size.height", 518, 1, 10_000),
                   looks.get("image_mean.0", 0.5307), looks.get("image_std.0", 0.2583, 1e-6))


# ---- files: JSON, checkpoints, safetensors
DTYPES = {theirs: getattr(torch, ours) for theirs, ours in RELEASED["dtypes"].items()}


class JsonFile:
    """A JSON object on disk whose values are checked where they are read. Raises UserError."""

    def __init__(self, file: Path, optional: bool = False):
        self.file, self.found = file, {}
        try:
            if not optional or file.exists():
                self.found = json.loads(file.read_text("utf-8-sig"))
            if not isinstance(self.found, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{file}: not readable ({e}); is this a weights folder?") from None

    def get(self, key: str, default, least=0, most=1e9):
        """The value of "a.b" (in a list: "a.0"), or `default` where it is missing or null. Raises
        UserError: it is of another kind than the default, or a number out of bounds."""
        parent, _, name = key.rpartition(".")
        if name.isdigit():              # a place in a list
            value = dict(enumerate(self.get(parent, []))).get(int(name))
        else:
            value = (self.get(parent, {}) if parent else self.found).get(name)
        if value is None:
            return default
        kind = type(default)
        fits = type(value) in (kind, int if kind is float else kind)
        if not fits or kind in (int, float) and not least <= value <= most:
            raise UserError(f"{self.file}: {key} cannot be {json.dumps(value)[:40]}; for example: "
                            f"{json.dumps(default)}")
        return value


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: one file, or the shards that an index.json names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            index = JsonFile(folder / f"{name}.index.json")
            shards = [*index.get("weight_map", {}).values()]
            if not all(isinstance(s, str) and s == Path(s).name for s in shards):
                raise UserError(f"{index.file}: weight_map must name files of this folder")
            return {k: v for s in sorted(set(shards)) for k, v in read_tensors(folder / s).items()}
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin; is the folder complete?")


class Inert:
    """Replaces what makes no tensor in a checkpoint: nothing that a file does to it happens."""

    def __init__(self, *_, **__):
        pass
    __call__ = __setstate__ = __setitem__ = append = extend = add = __init__


class TensorUnpickler(pickle.Unpickler):
    """Makes tensors and dictionaries; all else is Inert. It imports nothing."""

    def find_class(self, module, name):
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2",
                                                 "_rebuild_parameter"):
            return getattr(torch._utils, name).__call__         # the file cannot change a __call__
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else Inert


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch checkpoint: its older format too, and with
    classes of other programs in it. Never runs code of the file. Raises UserError."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        with open(file, "rb") as f, warnings.catch_warnings(action="ignore"):
            how = {"map_location": "cpu", "mmap": f.read(4) == b"PK\3\4"}     # else: older format
            try:
                found = torch.load(file, weights_only=True, **how)
            except pickle.UnpicklingError:      # something in it is not a tensor
                safe = SimpleNamespace(__name__="safe", Unpickler=TensorUnpickler,
                                       load=lambda f, **how: TensorUnpickler(f, **how).load())
                found = torch.load(file, weights_only=False, pickle_module=safe, **how)
        found = found if isinstance(found, dict) else {}
        found = found["state_dict"] if isinstance(found.get("state_dict"), dict) else found
        return {k: v.detach() for k, v in found.items()
                if isinstance(k, str) and isinstance(v, Tensor)}
    except Exception as e:      # zip, pickle and runtime errors: torch has no common class for them
        raise UserError(f"{file}: not a readable checkpoint ({repr(e)[:120]})") from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, mapped (but on Windows): 8 bytes length, JSON header, raw
    bytes. Raises UserError when it is missing or cut, or its tensors overlap or lie outside."""
    try:
        size = Path(path).stat().st_size
        raw = (torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8) if WINDOWS
               else torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8))
        start = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
        header = json.loads(bytes(raw[8:start].numpy()))
        header.pop("__metadata__", None)
        found, free = {}, start         # no tensor so far ends beyond `free`
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            a, b = (start + offset for offset in entry["data_offsets"])
            if not free <= a <= b <= size or b - a != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} does not fit its bytes")
            aligned = raw[a:b].clone() if a % dtype.itemsize else raw[a:b]
            found[name], free = aligned.view(dtype).reshape(shape), b
        return found
    except Exception as e:              # a header can lie in any way
        raise UserError(f"{path}: not a whole safetensors file ({repr(e)[:120]})") from None


def write_safetensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict | None = None):
    """Writes a .safetensors file, whole or not at all. metadata: strings to strings."""
    names = {v: k for k, v in DTYPES.items()}
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))   # keeps all aligned
    header, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for k in order:
        t = tensors[k]
        ends, at = [at, at + t.nbytes], at + t.nbytes
        header[k] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": ends}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(Path(path)) as temporary, open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for k in order:
            flat = tensors[k].detach().cpu().contiguous().reshape(-1)
            f.write(flat.view(torch.uint8).numpy().data)
