"""The plain side of the canary: a textbook training loop in fp32, by autograd and torch.optim.

It sees one sequence at a time and sums their gradients, which is the same step mathematically. So beside its
16 bytes per parameter it needs room for the activations of a single sequence, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from albor import __version__
from albor.architecture import IGNORED_TARGET, Architecture
from albor.canary.reference import Reference, own_document
from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.train.step import Batch

Kind = Literal["auto", "transformers", "oracle"]
# Tokens (B, T), and which keys each query sees where that is not all up to itself, (B, 1, T, T) bool: logits
# (B, T, V).
Logits = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_TRANSFORMERS_MAJOR = 5  # an earlier one has other names for the rotary base, and would take the default


def choose(kind: Kind) -> Literal["transformers", "oracle"]:
    """What `auto` means here. Raises ConfigError where transformers is asked for and cannot be had."""
    if kind == "oracle":
        return "oracle"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        version = None
    if version is not None and int(version.partition(".")[0]) >= _TRANSFORMERS_MAJOR:
        return "transformers"
    if kind == "auto":
        return "oracle"
    found = "is not installed" if version is None else f"{version} is too old"
    remedy = "pip install 'albor[hf]', or take --reference oracle"
    raise ConfigError([Problem("--reference", f"transformers {found}", remedy, "command line")])


def make_model(
    kind: Literal["transformers", "oracle"], model: Architecture, device: torch.device
) -> tuple[nn.Module, Logits, str]:
    """A module with arbitrary weights, its logits, and its name and version for people."""
    with device:
        if kind == "oracle":
            oracle = Reference(model)
            return oracle, oracle, f"albor {__version__} oracle"
        return _make_llama(model)


def _make_llama(model: Architecture) -> tuple[nn.Module, Logits, str]:
    import transformers

    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(  # type: ignore[call-arg]  # the base class takes attn_implementation
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            rms_norm_eps=model.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tie_word_embeddings,
            use_cache=False,
            attn_implementation="sdpa",  # eager attention would not take a mask of bool
        )
    )

    def logits(tokens: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = llama(input_ids=tokens, attention_mask=visible).logits
        # In place: a second copy of the logits would be memory that `plain_bytes` does not count.
        return found if model.mup_base_width is None else found.mul_(model.mup_base_width / model.hidden_size)

    return llama, logits, f"transformers {transformers.__version__} LlamaForCausalLM"


def short_name(name: str) -> str:
    """A parameter as people name it: without the prefix of the model that wraps it and the common ending."""
    return name.removeprefix("model.").removesuffix(".weight")


class PlainTraining:
    """A model in fp32 with torch.optim.AdamW. Parameters go by `short_name`; a tied matrix is there once."""

    def __init__(self, config: RunConfig, module: nn.Module, logits: Logits, end_of_document: int):
        """`end_of_document` is the token that ends a document, for `data.document_mask`."""
        self.config, self.logits, self.end_of_document = config, logits, end_of_document
        self.parameters = {short_name(name): p for name, p in module.named_parameters()}
        self.optimizer = make_adamw(self.parameters, config)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes these weights, by short name; every parameter must be among them, and nothing else."""
        if weights.keys() != self.parameters.keys():
            differing = sorted(weights.keys() ^ self.parameters.keys())
            raise ValueError(f"parameters of one side only: {', '.join(differing)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def accumulate(self, batches: Sequence[Batch], done: Callable[[int, int], None]) -> float:
        """The loss of a global batch, in nats per target token; its gradient is then in each `.grad`.

        `done` is called with (sequences that are through, sequences in all).
        """
        device = next(iter(self.parameters.values())).device
        for parameter in self.parameters.values():
            parameter.grad = None
        targets_in_all = sum(int((targets != IGNORED_TARGET).sum()) for _, targets in batches)
        sequences = [pair for tokens, targets in batches for pair in zip(tokens, targets, strict=True)]
        total = 0.0
        for number, pair in enumerate(sequences):
            tokens, targets = (torch.from_numpy(part).to(device) for part in pair)
            loss = self._summed_loss(tokens[None], targets) / max(targets_in_all, 1)
            loss.backward()
            total += loss.item()
            done(number + 1, len(sequences))
        return total

    def _summed_loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        train = self.config.train
        apart = self.config.data.document_mask
        visible = own_document(tokens, self.end_of_document) if apart else None
        logits = self.logits(tokens, visible)[0]
        loss = F.cross_entropy(
            logits,
            targets,
            ignore_index=IGNORED_TARGET,
            label_smoothing=train.label_smoothing,
            reduction="sum",
        )
        if train.z_loss:
            counted = logits[targets != IGNORED_TARGET]
            loss = loss + train.z_loss * counted.logsumexp(-1).square().sum()
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of `accumulate`'s loss by short name, before clipping."""
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def update(self, lr: float) -> None:
        """Clips the gradient and takes one step of AdamW."""
        limit = self.config.optimizer.grad_clip or math.inf
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit, foreach=False)
        step_adamw(self.optimizer, lr)


def make_adamw(parameters: Mapping[str, torch.Tensor], config: RunConfig) -> torch.optim.AdamW:
    """For tensors by `short_name`: matrices decay, vectors do not. In muP the layers' matrices have a
    learning rate of their own, and decay as the others do.
    """
    model, options = config.model, config.optimizer
    slower = model.hidden_size / model.mup_base_width if model.mup_base_width else 1.0
    matrices = {name: tensor for name, tensor in parameters.items() if tensor.dim() > 1}
    groups = [
        {
            "params": [tensor for name, tensor in matrices.items() if name.startswith("layers.")],
            "weight_decay": options.weight_decay * slower,  # AdamW multiplies it by the learning rate
            "slower": slower,
        },
        {
            "params": [tensor for name, tensor in matrices.items() if not name.startswith("layers.")],
            "weight_decay": options.weight_decay,
            "slower": 1.0,
        },
        {
            "params": [tensor for tensor in parameters.values() if tensor.dim() == 1],
            "weight_decay": 0.0,
            "slower": 1.0,
        },
    ]
    # foreach=True would take scratch of the size of all parameters at once.
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, foreach=False)


def step_adamw(optimizer: torch.optim.AdamW, lr: float) -> None:
    """One step at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr / group["slower"]
    optimizer.step()


def plain_bytes(model: Architecture, sequence_length: int) -> int:
    """What the plain side takes beside albor's arena, in bytes: an estimate, a little above what is.

    The optimizer's state (weights, gradient, two moments), and what autograd keeps of one sequence: of each
    layer and token 16 C + 4 F values and the attention weights, and at the end three times the logits.
    """
    length, ffn = sequence_length, model.intermediate_size
    per_token = 16 * model.hidden_size + 4 * ffn + model.num_attention_heads * length
    activations = model.num_hidden_layers * length * per_token + 3 * length * model.vocab_size
    return 16 * model.parameter_count + 4 * activations
