"""Flow matching as a stochastic policy: what π0, π0.5 and GR00T share beside their networks.

    noise x [n, H, A] ──► N denoise steps ──► actions          time: the share of noise, from 1 to 0

One denoise step, drawn from the last `sde_steps`, is a Gaussian transition (Flow-SDE, πRL arXiv
2510.25889); the others follow the ODE. The log-prob is that transition's, over the steps and
dimensions that the robot executes. πRL draws from all N; the flow contracts early noise, so its
samples say little about the action: the default draws the last.

Time and velocity have openpi's direction here: the velocity points from data to noise. Left out:
πRL's joint log-prob over the whole chain, several stochastic steps per sample.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from checks import AboveZero, Count
from errors import require
from models import lora
from models.lora import LoraConfig
from models.noise import Key, generator

Shape = tuple[tuple[int, ...], torch.dtype]


def normal_logprob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) of every number of a chunk: [n, C, A]."""
    z = (x - mean) / std
    return -0.5 * z**2 - std.log() - 0.5 * math.log(2.0 * math.pi)


def normal_entropy(std: Tensor) -> Tensor:
    """Mean entropy per dimension of Normals with these standard deviations: []."""
    return (std.log() + 0.5 * math.log(2.0 * math.pi * math.e)).mean()


def ode_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x̂0·(1 − t') + x̂1·t' with x̂0 = x − v·t and x̂1 = x + v·(1 − t), which is x + v·(t' − t)."""
    return x + v * (t_next - t)


def flow_sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, a: float) -> tuple[Tensor, ...]:
    """Mean [n, H, A] and standard deviation [n, 1, 1] of one Flow-SDE transition t → t' = t − δ.

    σ = a·√(t/(1 − t)), at t = 1 with t' in the denominator; mean = x̂0·(1 − t') + x̂1·(t' −
    σ²δ/(2t)); std = √δ·σ. x, v [n, H, A]; t, t_next [n, 1, 1]."""
    delta = t - t_next
    sigma = a * torch.sqrt(t / (1.0 - torch.where(t >= 1.0, t_next, t)))
    data_end = x - v * t
    noise_end = x + v * (1.0 - t)
    mean = data_end * (1.0 - t_next) + noise_end * (t_next - sigma**2 * delta / (2.0 * t))
    return mean, delta.sqrt() * sigma


@dataclass(kw_only=True, frozen=True)
class FlowConfig(LoraConfig):
    """Of the chain, and of what is trained. In the comments what RLinf has on LIBERO."""

    denoise_steps: Count = 4  # N
    noise_level: AboveZero = 1.0  # a of Flow-SDE; 0.5
    sde_steps: Count = 1  # how many of the last denoise steps may be the stochastic one; all
    # whether the VLM learns, or has adapters that do; False: only what comes after it
    train_vlm: bool = False
    cache_prefix: bool = True  # slots keep what a frozen VLM gave; False recomputes it
    # of a frozen VLM's weights and of what slots keep; bfloat16
    prefix_dtype: Literal["float32", "bfloat16"] = "float32"


class FlowPolicy(nn.Module):
    """The policy around a flow network. A family derives it, and offers

    config            a `FlowConfig`, and more
    FROZEN            beginnings of the names of the VLM's parameters
    WIDE              and of those that compute in fp32 whatever the others do, beside the heads
    ADAPTED           layers that have adapters where nobody says which (`lora.matching`)
    ADAPTED_VLM       and these, with --train-vlm
    .value_head       the critic
    .noise_shape()    (H, A) of what the flow denoises, padding included
    .times()          N + 1 shares of noise, from 1 to 0
    .cache_fields()   what of `look` a slot keeps while the VLM is frozen: {name: (shape, dtype)}
    .look(obs)        the part of the network that does not see the actions → {name: tensor or
                      tuple of tensors}; from the fields of `cache_fields`, where obs has them
    .denoise(seen, x, t, step)  the part that does: x [n, H, A], t [n] share of noise, step [n]
                      number of the denoise step → features [n, H, E]
    .direction(h, x)  those features → velocity from data to noise [n, H, A], in x's type
    .value_of(seen, h)   → value [n]

    The robot executes the first steps and dimensions of what the flow denoises, `config.played`."""

    FROZEN: tuple[str, ...] = ()
    WIDE: tuple[str, ...] = ()
    ADAPTED: tuple[str, ...] = ()
    ADAPTED_VLM: tuple[str, ...] = ()
    # what it computes in over weights in fp32, of which `models.build` decides; None: their type
    compute: torch.dtype | None = None
    learns_noise = False  # whether the transition's deviation depends on the weights

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        most = config.denoise_steps
        sentence = f"--sde-steps {config.sde_steps} must lie between 1 and --denoise-steps {most}"
        require(1 <= config.sde_steps <= most, sentence)

    @property
    def adapted(self) -> tuple[str, ...]:
        return self.ADAPTED + (self.ADAPTED_VLM if self.config.train_vlm else ())

    def asked(self, stored: FlowConfig, actor) -> FlowConfig:
        """The configuration with the adapters that a run asks for. They say whether the VLM learns:
        then what it gives is neither kept in slots nor computed without gradients."""
        c = lora.asked(stored, actor, self.adapted)
        if not c.rank:
            return c
        names = lora.matching(self, c.lora_targets)
        return replace(c, train_vlm=any(name.startswith(self.FROZEN) for name in names))

    def begin(self, config, stats: dict) -> None:
        """Makes the adapters; what they were folded into gets the type that it is to have."""
        lora.adapt(self, self.adapted)
        for name, p in self.named_parameters():
            p.data = p.data.to(self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """What is trained stays in fp32, as do the weights around it; a VLM whose own weights are
        frozen may be kept in half precision."""
        vlm = name.startswith(self.FROZEN) and ".lora_" not in name
        frozen = vlm and self.vlm_frozen
        return getattr(torch, self.config.prefix_dtype) if frozen else torch.float32

    @property
    def vlm_frozen(self) -> bool:
        """Whether the VLM's own weights are frozen: it may have adapters that learn."""
        return bool(self.config.rank) or not self.config.train_vlm

    @property
    def vlm_compute(self) -> torch.dtype | None:
        """`compute` of the VLM. A frozen one computes in the type of its weights."""
        return None if self.vlm_frozen else self.compute

    def acts_in(self, name: str) -> torch.dtype | None:
        if name.startswith((*self.HEADS, *self.WIDE)):
            return None
        if name.startswith(self.FROZEN) and self.vlm_frozen:  # adapters follow the weights
            return getattr(torch, self.config.prefix_dtype) if self.config.rank else None
        return self.compute

    @property
    def cached(self) -> bool:
        """Whether slots keep what `look` saw: a frozen VLM sees the same at every epoch."""
        return self.config.cache_prefix and not self.config.train_vlm

    @torch.no_grad()
    def look_once(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what a frozen VLM sees of frames: the fields that a slot would keep [n, …]."""
        assert not self.config.train_vlm, "a VLM that learns sees something else after every step"
        return self.kept(obs)

    def kept(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = self.look(obs)
        return {name: seen[name] for name in self.cache_fields()}

    def slot_fields(self) -> dict[str, Shape]:
        step = (self.noise_shape(), torch.float32)
        fields: dict[str, Shape] = {"x_t": step, "x_next": step, "denoise_index": ((), torch.int32)}
        return fields | (self.cache_fields() if self.cached else {})

    def training_fields(self) -> tuple[str, ...]:
        observed = self.observation_fields()
        if self.cached:
            del observed["image"]
        return (*observed, *self.slot_fields())

    def trainable(self) -> dict[str, nn.Parameter]:
        if self.config.rank:
            return lora.trained(self)
        frozen = () if self.config.train_vlm else self.FROZEN
        return {name: p for name, p in self.named_parameters() if not name.startswith(frozen)}

    def critic(self) -> dict[str, nn.Parameter]:
        return dict(self.value_head.named_parameters(prefix="value_head"))

    def idle(self) -> tuple[str, ...]:
        return self.FROZEN if self.cached else ()

    def draw(self, keys: list[Key], explore: list[bool]) -> dict[str, Tensor]:
        """noise and epsilon [n, H, A], and the stochastic denoise step's index [n], −1 where
        `explore` is False (all steps follow the ODE)."""
        noise = np.empty((len(keys), 2, *self.noise_shape()), np.float32)
        index = np.full(len(keys), -1, np.int64)
        for i, (key, stochastic) in enumerate(zip(keys, explore, strict=True)):
            rng = generator(key)
            noise[i] = rng.standard_normal(noise.shape[1:], np.float32)
            if stochastic:
                index[i] = self.config.denoise_steps - 1 - rng.integers(self.config.sde_steps)
        noise, epsilon = torch.from_numpy(noise).unbind(1)
        return {"noise": noise, "epsilon": epsilon, "denoise_index": torch.from_numpy(index)}

    def executed(self, x: Tensor) -> Tensor:
        """[n, H, A] → [n, C, A], what the robot executes."""
        chunk, action_dim = self.config.played
        return x[:, :chunk, :action_dim]

    def transition(self, x: Tensor, h: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, ...]:
        """x [n, H, A], features h [n, H, E], t and t_next [n, 1, 1] → the ODE's step and the
        stochastic one's mean [n, H, A], and its standard deviation [n, 1, 1] or [n, H, A]."""
        v = self.direction(h, x)
        mean, std = flow_sde_step(x, v, t, t_next, self.config.noise_level)
        return ode_step(x, v, t, t_next), mean, std

    def logprob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Of what the robot executes, not of the flow's padding: [n, C, A]."""
        return normal_logprob(self.executed(x), self.executed(mean), self.executed(std))

    def at(self, step: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times before and after denoise step [n], each [n, 1, 1]."""
        return times[step][:, None, None], times[step + 1][:, None, None]

    @torch.inference_mode()
    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """obs: what `observation_fields` lists [n, …]; noise from `draw` → actions, logprob, value,
        slot fields."""
        seen = self.look(obs)
        # The flow itself stays in fp32. A copy like what later steps make of it: compiled code
        # tells tensors made in inference mode and their strides apart.
        x = noise["noise"].clone(memory_format=torch.contiguous_format)
        times = self.times()
        index = noise["denoise_index"][:, None, None]
        x_t = torch.zeros_like(x)
        x_next = torch.zeros_like(x)
        logprob = torch.zeros_like(self.executed(x))
        kept = None
        for i in range(self.config.denoise_steps):
            step = torch.full((len(x),), i, device=x.device)
            t, t_next = (x.new_full((len(x), 1, 1), time) for time in times[i : i + 2])
            h = self.denoise(seen, x, t[:, 0, 0], step)
            following, mean, std = self.transition(x, h, t, t_next)
            chosen = index == i
            after = torch.where(chosen, mean + std * noise["epsilon"], following)
            x_t = torch.where(chosen, x, x_t)
            x_next = torch.where(chosen, after, x_next)
            logprob = torch.where(chosen, self.logprob(after, mean, std), logprob)
            # The value belongs to the step that `evaluate` will see.
            kept = h if kept is None else torch.where(chosen, h, kept)
            x = after
        out = {
            "actions": self.executed(x),
            "logprob": logprob,
            "value": self.value_of(seen, kept),
            "x_t": x_t,
            "x_next": x_next,
            "denoise_index": noise["denoise_index"].to(torch.int32),
        }
        return out | {name: seen[name] for name in (self.cache_fields() if self.cached else ())}

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-prob and value of stored chunk steps under today's weights, differentiable.

        batch: what `training_fields` lists [n, …] → logprob [n, C, A], value [n], and where the
        transition's deviation is learned its entropy []: Flow-SDE's is a constant of time."""
        seen = self.look(batch)
        x_t = batch["x_t"]
        step = batch["denoise_index"].long()
        # Filled by kernels: a list would travel from pageable memory, and the host wait for it.
        times = torch.cat([x_t.new_full((1,), time) for time in self.times()])
        t, t_next = self.at(step, times)
        h = self.denoise(seen, x_t, t[:, 0, 0], step)
        _, mean, std = self.transition(x_t, h, t, t_next)
        logprob = self.logprob(batch["x_next"], mean, std)
        out = {"logprob": logprob, "value": self.value_of(seen, h)}
        if self.learns_noise:
            out["entropy"] = normal_entropy(self.executed(std))
        return out
