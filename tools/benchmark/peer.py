"""The same micro-batch in PyTorch: diffusers' transformer with PEFT adapters, the loss written from the formulas.

`Upstream` runs it as upstream's trainer does: one model whose adapters are switched and switched off for the three
passes, full precision weights under autocast on a GPU, normalisers and therefore losses in float64. `Tuned` is what we
would do to make that fast and keep its method: the rollout policy merged into a copy of the weights and the base model
free of adapter layers, both under inference mode; losses in float32; weights in the compute dtype; compiled on request.

Either way harmonisation costs K + 1 backward passes through the retained graph.

Source: the formulas and the order of passes of MARBLE's released trainer (arXiv 2605.06507).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model

from marble_jax.families.sd3.family import FAMILY
from marble_jax.families.sd3.layer_names import entries
from marble_jax.trainable import lora
from marble_jax.weights.key_map import save_params
from tools.benchmark.sizes import Problem, Size


def make_transformer(problem: Problem, device: str) -> SD3Transformer2DModel:
    """diffusers' transformer in float32: with our weights where these are whole and float32, else with random ones."""
    size = problem.size
    with torch.device(device):
        model = (
            SD3Transformer2DModel(**dataclasses.asdict(size.config)).eval().requires_grad_(False)
        )
    if size.dtype == "float32" and size.table_side is None:
        tensors = save_params(problem.params, entries(problem.params))
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    else:
        for parameter in model.parameters():
            parameter.normal_(
                1.0
                if parameter.ndim == 1 and len(parameter) == size.config.attention_head_dim
                else 0.0,
                0.02,
            )
    return model


def adapter_config(size: Size) -> LoraConfig:
    return LoraConfig(
        r=size.rank,
        lora_alpha=size.alpha,
        target_modules=list(FAMILY.default_targets),
        init_lora_weights="gaussian",
    )


def fill_adapter(model: torch.nn.Module, name: str, adapter: Any) -> None:
    """Copies one of our adapters into PEFT's layers."""
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    pairs = lora.unstack(FAMILY.layers_at, adapter)
    assert set(layers) == set(pairs)
    with torch.no_grad():
        for key, (a, b) in pairs.items():
            layers[key].lora_A[name].weight.copy_(torch.from_numpy(np.array(a.T)))
            layers[key].lora_B[name].weight.copy_(torch.from_numpy(np.array(b.T)))


class Peer:
    """A torch micro-batch on the rollouts of `problem.batch(K)`; gradients are added up over calls.

    Args:
      problem: sizes, weights and rollouts.
      num_rewards: K.
      device: "cpu" or "cuda".
    """

    autocast: torch.dtype | None = None

    def __init__(self, problem: Problem, num_rewards: int, device: str):
        self.size, self.device = problem.size, device
        batch = problem.batch(num_rewards)

        def tensor(x: Any) -> torch.Tensor:
            return torch.from_numpy(np.array(x)).to(device)

        self.x0 = tensor(batch.kept).permute(0, 3, 1, 2).contiguous()
        self.embeds, self.pooled = tensor(batch.cond["embeds"]), tensor(batch.cond["pooled"])
        self.advantages, self.valid = tensor(batch.advantages), tensor(batch.valid)
        self.sigma = torch.rand(self.size.num, device=device).clamp(min=0.1)
        self.noise: torch.Tensor | None = None  # drawn at every call, unless a test sets it
        self.vectors: torch.Tensor | int = 0

    def predict(self, model: torch.nn.Module, xt: torch.Tensor) -> torch.Tensor:
        half = (
            contextlib.nullcontext()
            if self.autocast is None
            else torch.autocast(self.device, self.autocast)
        )
        with half:
            return model(
                hidden_states=xt,
                timestep=self.sigma * 1000,
                encoder_hidden_states=self.embeds,
                pooled_projections=self.pooled,
                return_dict=False,
            )[0]

    def velocities(self, xt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """v, v_rollout, v_base at xt."""
        raise NotImplementedError

    def errors(
        self, xt: torch.Tensor, v: torch.Tensor, v_rollout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P and N of every sample."""
        raise NotImplementedError

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """P, N and the divergence of every sample."""
        noise = torch.randn_like(self.x0) if self.noise is None else self.noise
        t = self.sigma[:, None, None, None]
        xt = (1 - t) * self.x0 + t * noise
        v, v_rollout, v_base = self.velocities(xt)
        return *self.errors(xt, v, v_rollout), ((v - v_base) ** 2).mean(dim=(1, 2, 3))

    def each(
        self, positive: torch.Tensor, negative: torch.Tensor, advantage: torch.Tensor
    ) -> torch.Tensor:
        """Losses [n] under an advantage [n]."""
        clip = self.size.clip
        r = (advantage.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)
        return clip * (r * positive + (1 - r) * negative) / self.size.nft_beta

    def weighted_sum(self) -> None:
        """One loss, one backward pass, gradients into `.grad`."""
        positive, negative, divergence = self.parts()
        loss = self.each(positive, negative, self.advantages[:, 0]).mean()
        (loss + self.size.kl_weight * divergence.mean()).backward()
        self.wait()

    def harmonised(self) -> None:
        """K + 1 backward passes through one graph; the flat gradients of the rewards and of the divergence add up in
        `vectors` [K + 1, P]."""
        positive, negative, divergence = self.parts()
        losses = []
        for advantage, valid in zip(self.advantages.T, self.valid.T):
            each = self.each(positive, negative, advantage)
            losses.append((each * valid).sum() / valid.sum().clamp(min=1))
        losses.append(divergence.mean())
        flat = []
        for loss in losses:
            found = torch.autograd.grad(
                loss, self.leaves, retain_graph=loss is not losses[-1], allow_unused=True
            )
            flat.append(
                torch.cat(
                    [
                        (torch.zeros_like(leaf) if g is None else g).flatten().float()
                        for g, leaf in zip(found, self.leaves)
                    ]
                )
            )
        self.vectors = self.vectors + torch.nan_to_num(torch.stack(flat), 0.0, 0.0, 0.0)
        self.wait()

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Trained tensors."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def gradient(self) -> Any:
        """What `weighted_sum` left in `.grad`, in our layout: {layer: (a, b)}."""
        return self._by_layer(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.leaves]
        )

    def reward_gradients(self) -> list[Any]:
        """What `harmonised` left in `vectors`, in our layout: K + 1 of {layer: (a, b)}."""
        sizes = [p.numel() for p in self.leaves]
        return [
            self._by_layer([part.view(p.shape) for part, p in zip(row.split(sizes), self.leaves)])
            for row in self.vectors
        ]

    def _by_layer(self, tensors: list[torch.Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in zip(names, tensors):
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(layer, {})[rest[0]] = tensor.float().cpu().numpy().T
        return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


class Upstream(Peer):
    """As upstream runs it."""

    def __init__(self, problem: Problem, num_rewards: int, device: str):
        super().__init__(problem, num_rewards, device)
        self.model = get_peft_model(make_transformer(problem, device), adapter_config(self.size))
        self.model.add_adapter("rollout", adapter_config(self.size))
        for name, adapter in (("default", problem.current), ("rollout", problem.rollout)):
            fill_adapter(self.model, name, adapter)
        self.model.set_adapter("default")
        if self.size.dtype != "float32":
            self.autocast = torch.float16

    def velocities(self, xt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.model.set_adapter("rollout")
        with torch.no_grad():
            v_rollout = self.predict(self.model, xt)
        self.model.set_adapter("default")
        v = self.predict(self.model, xt)
        with torch.no_grad(), self.model.disable_adapter():
            v_base = self.predict(self.model, xt)
        return v, v_rollout, v_base

    def errors(
        self, xt: torch.Tensor, v: torch.Tensor, v_rollout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta, t = self.size.nft_beta, self.sigma[:, None, None, None]
        found = []
        for mixed in (beta * v + (1 - beta) * v_rollout, (1 + beta) * v_rollout - beta * v):
            clean = xt - t * mixed
            with torch.no_grad():
                weight = (
                    (clean.double() - self.x0.double())
                    .abs()
                    .mean(dim=(1, 2, 3), keepdim=True)
                    .clip(min=1e-5)
                )
            found.append(((clean - self.x0) ** 2 / weight).mean(dim=(1, 2, 3)))
        return found[0], found[1]


class Tuned(Peer):
    """The same method with its best reasonable settings.

    Args:
      problem, num_rewards, device: as `Peer`.
      compiled: whether the three networks go through `torch.compile`.
    """

    def __init__(self, problem: Problem, num_rewards: int, device: str, compiled: bool = False):
        super().__init__(problem, num_rewards, device)
        base = make_transformer(problem, device)
        adapted = {}
        for name, adapter in (("current", problem.current), ("rollout", problem.rollout)):
            adapted[name] = get_peft_model(copy.deepcopy(base), adapter_config(self.size))
            fill_adapter(adapted[name], "default", adapter)
        self.model, rollout = adapted["current"], adapted["rollout"].merge_and_unload()
        if self.size.dtype != "float32":
            self.autocast = torch.bfloat16
            for network in (base, rollout, self.model):
                for name, parameter in network.named_parameters():
                    parameter.data = (
                        parameter.data if "lora_" in name else parameter.data.bfloat16()
                    )
        self.networks = tuple(
            torch.compile(network) if compiled else network
            for network in (self.model, rollout, base)
        )

    def velocities(self, xt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        current, rollout, base = self.networks
        with torch.inference_mode():
            v_rollout, v_base = self.predict(rollout, xt), self.predict(base, xt)
        return self.predict(current, xt), v_rollout.clone(), v_base.clone()

    def errors(
        self, xt: torch.Tensor, v: torch.Tensor, v_rollout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.sigma[:, None, None, None]
        error = xt - t * v_rollout.float() - self.x0
        step = t * self.size.nft_beta * (v.float() - v_rollout)
        found = []
        for difference in (error - step, error + step):
            weight = difference.detach().abs().mean(dim=(1, 2, 3)).clip(min=1e-5)
            found.append((difference**2).mean(dim=(1, 2, 3)) / weight)
        return found[0], found[1]
