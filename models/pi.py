"""π0.5: SigLIP image tower → Gemma prefix over image and language tokens → flow-matching action expert (adaRMS) → value.

    image [V, H, W, 3], tokens [L] ──► prefix(): keys and values of every layer, and the mean feature ──► value head
    noise x₁ [C, A] ──► velocity(prefix, x_t, t) × N denoise steps ──► actions [C, A]

The prefix never sees the actions, so it runs once per frame; with the VLM frozen (`train_vlm = False`, the published
recipe) its keys and values are stored in the slot and every update epoch costs only the expert.

As a stochastic policy (Flow-SDE, πRL arXiv 2510.25889): one denoise step, drawn from the last `sde_steps`, is a Gaussian
transition; the others follow the ODE. `flow_sde_step` gives its mean and standard deviation; the log-prob is that transition's.
πRL draws from all N; the flow contracts early noise, so its samples say little about the action: the default draws the last.

Differs from openpi's released model only in `PiConfig`: the embedded default is the same architecture at small width.
Left out: reading openpi's own checkpoint names, image resizing (simulators render at the model's size).
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from models import checkpoint, generator
from models.tokenize import PAD

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(kw_only=True, frozen=True)
class PiConfig:
    """Widths and depths. The defaults are the embedded default; openpi's π0.5 is in the comments."""

    views: int = 1  # cameras; openpi 3
    image_size: int = 64  # pixels; 224
    patch: int = 8  # pixels; 14
    vision_width: int = 96  # 1152
    vision_depth: int = 3  # 27
    vision_heads: int = 4  # 16
    vision_mlp: int = 384  # 4304
    vocabulary: int = 399  # tokens; 257152
    tokens: int = 24  # prompt length; 200
    width: int = 128  # 2048
    mlp: int = 384  # 16384
    depth: int = 4  # 18, shared by prefix and expert
    heads: int = 4  # 8
    head_dim: int = 32  # 256; one key/value head, as in Gemma-2B
    expert_width: int = 96  # 1024
    expert_mlp: int = 256  # 4096
    value_widths: tuple[int, ...] = (128, 64)  # (1024, 512, 256)
    chunk: int = 10  # C
    action_dim: int = 4  # A; 32 with padding
    denoise_steps: int = 4  # N
    noise_level: float = 1.0  # a of Flow-SDE
    sde_steps: int = 1  # how many of the last denoise steps may be the stochastic one
    train_vlm: bool = False  # False: reinforcement learning updates only expert and value head


def build(config, env_spec, weights: bool = True) -> "Pi":
    """The model of `config.train.checkpoint`; without `weights` a memory-free one of the same shape, to size slots by.

    Raises UserError when the checkpoint is of another model or does not suit the simulator.
    """
    path = checkpoint.find(config.train.checkpoint)
    header = checkpoint.read_header(path)
    if header.family != "pi05":
        raise UserError(f"checkpoint {path} is a {header.family!r} model: give --model {header.family} or another checkpoint")
    chosen = {name: getattr(config.rollout, name) for name in ("denoise_steps", "noise_level", "sde_steps")}
    if not 1 <= chosen["sde_steps"] <= chosen["denoise_steps"]:
        raise UserError(f"--sde-steps {chosen['sde_steps']} must lie between 1 and --denoise-steps {chosen['denoise_steps']}")
    shape = PiConfig(**header.shape | chosen | {"train_vlm": config.actor.train_vlm})
    wanted = {"views": env_spec.views, "image_size": env_spec.image_size, "action_dim": env_spec.action_dim}
    wanted |= {"chunk": config.rollout.chunk, "tokens": config.rollout.tokens}
    for name, value in wanted.items():
        if getattr(shape, name) != value:
            raise UserError(f"checkpoint {path} has {name} = {getattr(shape, name)} and the run asks for {value}: make them agree")
    with torch.device("cpu" if weights else "meta"), checkpoint.Uninitialised():
        model = Pi(shape)
    checkpoint.load(model, path, only_check=not weights)
    model.header = checkpoint.Header("pi05", asdict(shape), header.stats)
    return model


# ---------------------------------------------------------------- the flow as a policy


def denoise_times(steps: int) -> list[float]:
    """N + 1 times from noise to data: linspace(1, 1/N, N), then 0 (openpi's direction)."""
    return [1.0 - i / steps for i in range(steps)] + [0.0]


def ode_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x̂0·(1 − t') + x̂1·t' with x̂0 = x − v·t and x̂1 = x + v·(1 − t), which is x + v·(t' − t)."""
    return x + v * (t_next - t)


def flow_sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one Flow-SDE transition t → t' = t − δ.

    σ = a·√(t/(1 − t)), at t = 1 with t' in the denominator; mean = x̂0·(1 − t') + x̂1·(t' − σ²δ/(2t)); std = √δ·σ.
    x, v [n, C, A]; t, t_next [n, 1, 1]; returns mean [n, C, A], std [n, 1, 1].
    """
    delta = t - t_next
    sigma = a * torch.sqrt(t / (1.0 - torch.where(t >= 1.0, t_next, t)))
    data_end, noise_end = x - v * t, x + v * (1.0 - t)
    mean = data_end * (1.0 - t_next) + noise_end * (t_next - sigma**2 * delta / (2.0 * t))
    return mean, delta.sqrt() * sigma


def normal_logprob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) summed over the chunk and the simulator's action dimensions: [n, C, A] → [n]."""
    z = (x - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2.0 * math.pi)).sum(dim=(1, 2))


# ---------------------------------------------------------------- blocks, bottom up


class RMSNorm(nn.Module):
    """Gemma's: x/rms(x)·(1 + w). With `condition` [n, D], adaRMS: scale, shift and gate come from a Linear of it."""

    def __init__(self, width: int, condition: int | None = None):
        super().__init__()
        if condition is None:
            self.weight = nn.Parameter(torch.zeros(width))
        else:
            self.dense = nn.Linear(condition, 3 * width)
            nn.init.zeros_(self.dense.weight), nn.init.zeros_(self.dense.bias)
            with torch.no_grad():
                self.dense.bias[2 * width :] = 1.0  # gates start open: at small width this trains in minutes, not hours

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if condition is None:
            return x * (1.0 + self.weight), 1.0
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)  # each [n, 1, D]
        return x * (1.0 + scale) + shift, gate


class GeGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding, θ = 10⁴, halves rotated as in Gemma. x [n, heads, S, d], positions [n, S]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None] * frequency  # [n, 1, S, d/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GemmaLayer(nn.Module):
    """One decoder layer, one key/value head. `past` [n, 2, P, d] are keys and values to attend to before one's own."""

    def __init__(self, width: int, mlp: int, heads: int, head_dim: int, condition: int | None = None):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.input_layernorm = RMSNorm(width, condition)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, head_dim, bias=False)
        self.v_proj = nn.Linear(width, head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, condition)
        self.mlp = GeGLU(width, mlp)

    def forward(self, x, positions, mask, past=None, condition=None) -> tuple[Tensor, Tensor]:
        """x [n, S, D], mask [n, 1, 1, P + S] additive → x [n, S, D] and this layer's own keys and values [n, 2, S, d]."""
        n, length, _ = x.shape
        h, gate = self.input_layernorm(x, condition)
        q = self.q_proj(h).view(n, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(n, 1, length, self.head_dim)
        v = self.v_proj(h).view(n, 1, length, self.head_dim)
        q, k = rotary(q, positions), rotary(k, positions)
        own = torch.cat([k, v], dim=1)  # [n, 2, S, d]
        both = own if past is None else torch.cat([past, own], dim=2)
        # One key/value head serves every query head, so the heads fold into the query axis: [n, 1, heads·S, d].
        folded = q.reshape(n, 1, self.heads * length, self.head_dim)
        out = F.scaled_dot_product_attention(folded, both[:, :1], both[:, 1:], attn_mask=mask)
        out = out.view(n, self.heads, length, self.head_dim).transpose(1, 2).reshape(n, length, -1)
        x = x + gate * self.o_proj(out)
        h, gate = self.post_attention_layernorm(x, condition)
        return x + gate * self.mlp(h), own


class VisionLayer(nn.Module):
    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.layer_norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.out_proj(out)
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """SigLIP: patches, learned positions, pre-norm layers, one last norm; then a Linear to the language width."""

    def __init__(self, c: PiConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch, c.patch)
        self.position_embedding = nn.Parameter(torch.empty((c.image_size // c.patch) ** 2, c.vision_width))
        nn.init.normal_(self.position_embedding, std=0.02)
        self.layers = nn.ModuleList(VisionLayer(c.vision_width, c.vision_mlp, c.vision_heads) for _ in range(c.vision_depth))
        self.post_layernorm = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.projector = nn.Linear(c.vision_width, c.width)

    def forward(self, image: Tensor) -> Tensor:
        """image [n, V, H, W, 3] uint8 → tokens [n, V·(H/patch)², D]."""
        n, views = image.shape[:2]
        pixels = image.flatten(0, 1).permute(0, 3, 1, 2).to(self.patch_embedding.weight.dtype) / 127.5 - 1.0
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.post_layernorm(x)).unflatten(0, (n, views)).flatten(1, 2)


class Pi(nn.Module):
    def __init__(self, config: PiConfig):
        super().__init__()
        c = self.config = config
        self.prefix_length = c.views * (c.image_size // c.patch) ** 2 + c.tokens  # P
        self.vision = VisionTower(c)
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        nn.init.normal_(self.embed_tokens.weight, std=c.width**-0.5)
        self.language = nn.ModuleList(GemmaLayer(c.width, c.mlp, c.heads, c.head_dim) for _ in range(c.depth))
        self.language_norm = RMSNorm(c.width)
        self.action_in_proj = nn.Linear(c.action_dim, c.expert_width)
        self.time_mlp_in = nn.Linear(c.expert_width, c.expert_width)
        self.time_mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.expert = nn.ModuleList(
            GemmaLayer(c.expert_width, c.expert_mlp, c.heads, c.head_dim, c.expert_width) for _ in range(c.depth)
        )
        self.expert_norm = RMSNorm(c.expert_width, c.expert_width)
        self.action_out_proj = nn.Linear(c.expert_width, c.action_dim)
        widths = (c.width, *c.value_widths)
        hidden = [m for i, o in zip(widths, widths[1:], strict=False) for m in (nn.Linear(i, o), nn.SiLU())]
        self.value_head = nn.Sequential(*hidden, nn.Linear(widths[-1], 1))
        nn.init.zeros_(self.value_head[-1].weight), nn.init.zeros_(self.value_head[-1].bias)

    # ------------------------------------------------------------ the network

    def prefix(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [n, V, H, W, 3] uint8, tokens [n, L] → cache [n, depth, 2, P, d], feature [n, D], real [n, P] bool."""
        pictures = self.vision(image)
        words = self.embed_tokens(tokens) * math.sqrt(self.config.width)  # Gemma scales words, not pictures
        x = torch.cat([pictures, words], dim=1)
        real = self.real(tokens)
        positions = real.cumsum(1) - 1
        mask = additive(real, x.dtype)
        cache = []
        for layer in self.language:
            x, own = layer(x, positions, mask)
            cache.append(own)
        x, _ = self.language_norm(x)
        feature = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return torch.stack(cache, dim=1), feature, real

    def real(self, tokens: Tensor) -> Tensor:
        """Which prefix positions are not padding: [n, P] bool."""
        pictures = tokens.new_ones(tokens.shape[0], self.prefix_length - tokens.shape[1], dtype=torch.bool)
        return torch.cat([pictures, tokens != PAD], dim=1)

    def velocity(self, cache: Tensor, real: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t | prefix), which points from data to noise. x_t [n, C, A], t [n] → [n, C, A]."""
        n, chunk, _ = x_t.shape
        condition = time_embedding(t, self.config.expert_width).to(x_t.dtype)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(condition))))
        x = self.action_in_proj(x_t)
        positions = real.sum(1, keepdim=True) + torch.arange(chunk, device=x.device)
        mask = additive(F.pad(real, (0, chunk), value=True), x.dtype)
        for i, layer in enumerate(self.expert):
            x, _ = layer(x, positions, mask, cache[:, i].to(x.dtype), condition)
        x, _ = self.expert_norm(x, condition)
        return self.action_out_proj(x)

    def value(self, feature: Tensor) -> Tensor:
        """feature [n, D] → value [n]; the head's gradient stops at the feature."""
        return self.value_head(feature.detach())[:, 0]

    # ------------------------------------------------------------ the policy

    def slot_fields(self) -> dict[str, Shape]:
        c, f = self.config, torch.float32
        fields = {"x_t": ((c.chunk, c.action_dim), f), "x_next": ((c.chunk, c.action_dim), f)}
        fields["denoise_index"] = ((), torch.int32)
        if not c.train_vlm:  # frozen: the same keys and values at rollout and at every epoch
            fields |= {
                "prefix_cache": ((c.depth, 2, self.prefix_length, c.head_dim), f),
                "prefix_feature": ((c.width,), f),
            }
        return fields

    def training_fields(self) -> tuple[str, ...]:
        """What `evaluate` reads from a slot."""
        return ("tokens", *self.slot_fields(), *(("image",) if self.config.train_vlm else ()))

    def draw(self, keys: list[tuple[int, int, int, int]], explore: list[bool]) -> dict[str, Tensor]:
        """x₁ and ε [n, C, A], and the stochastic denoise step's index [n], −1 where `explore` is False (all ODE)."""
        shape = (2, self.config.chunk, self.config.action_dim)
        noise, index = np.empty((len(keys), *shape), np.float32), np.full(len(keys), -1, np.int64)
        for i, (key, stochastic) in enumerate(zip(keys, explore, strict=True)):
            rng = generator(key)
            noise[i] = rng.standard_normal(shape, np.float32)
            if stochastic:
                index[i] = self.config.denoise_steps - 1 - rng.integers(self.config.sde_steps)
        noise = torch.from_numpy(noise)
        return {"x1": noise[:, 0], "epsilon": noise[:, 1], "denoise_index": torch.from_numpy(index)}

    @torch.inference_mode()
    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """obs: image [n, V, H, W, 3] uint8, tokens [n, L]; noise from `draw` → actions, logprob, value, slot fields."""
        cache, feature, real = self.prefix(obs["image"], obs["tokens"])
        x, index = noise["x1"], noise["denoise_index"][:, None, None]
        x_t, x_next, logprob = torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(len(x))
        times = denoise_times(self.config.denoise_steps)
        for i, (now, later) in enumerate(zip(times, times[1:], strict=False)):
            t, t_next = x.new_full((len(x), 1, 1), now), x.new_full((len(x), 1, 1), later)
            v = self.velocity(cache, real, x, t[:, 0, 0])
            mean, std = flow_sde_step(x, v, t, t_next, self.config.noise_level)
            chosen = index == i
            after = torch.where(chosen, mean + std * noise["epsilon"], ode_step(x, v, t, t_next))
            x_t, x_next = torch.where(chosen, x, x_t), torch.where(chosen, after, x_next)
            logprob = torch.where(chosen[:, 0, 0], normal_logprob(after, mean, std), logprob)
            x = after
        out = {"actions": x, "logprob": logprob, "value": self.value(feature), "x_t": x_t, "x_next": x_next}
        out["denoise_index"] = noise["denoise_index"].to(torch.int32)
        if not self.config.train_vlm:
            out |= {"prefix_cache": cache, "prefix_feature": feature}
        return out

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-prob and value of stored chunk steps under today's weights, differentiable.

        batch: slot fields [n, …]; with `train_vlm` also image and tokens. Returns logprob [n], value [n] and entropy [],
        the mean per dimension of the transition's Normal.
        """
        if self.config.train_vlm:
            cache, feature, real = self.prefix(batch["image"], batch["tokens"])
        else:
            cache, feature, real = batch["prefix_cache"], batch["prefix_feature"], self.real(batch["tokens"])
        times = torch.tensor(denoise_times(self.config.denoise_steps), device=cache.device, dtype=cache.dtype)
        index = batch["denoise_index"].long()
        t, t_next = times[index][:, None, None], times[index + 1][:, None, None]
        v = self.velocity(cache, real, batch["x_t"], t[:, 0, 0])
        mean, std = flow_sde_step(batch["x_t"], v, t, t_next, self.config.noise_level)
        entropy = (std.log() + 0.5 * math.log(2.0 * math.pi * math.e)).mean()
        return {"logprob": normal_logprob(batch["x_next"], mean, std), "value": self.value(feature), "entropy": entropy}

    def imitation_loss(self, cache: Tensor, real: Tensor, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Flow matching given a prefix: x_t = t·noise + (1 − t)·actions, target velocity noise − actions. MSE []."""
        x_t = t[:, None, None] * noise + (1.0 - t[:, None, None]) * actions
        return F.mse_loss(self.velocity(cache, real, x_t, t), noise - actions)

    def trainable(self) -> dict[str, nn.Parameter]:
        frozen = () if self.config.train_vlm else ("vision.", "embed_tokens.", "language.", "language_norm.")
        return {name: p for name, p in self.named_parameters() if not name.startswith(frozen)}


def additive(real: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, S] bool → attention mask [n, 1, 1, S]: 0 to attend, −∞ not to."""
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, -math.inf)[:, None, None]


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sine and cosine of t [n] in fp64, periods from 4e-3 to 4 (openpi) → [n, width] fp64."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    angle = t[:, None].double() * (2.0 * math.pi / (4e-3 * (4.0 / 4e-3) ** fraction))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
