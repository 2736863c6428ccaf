"""litgpt: its GPT, its loss and the loop of its `pretrain` command, step for step, through Fabric.

In bf16-mixed, its default for training, which keeps fp32 weights as everywhere else. Weight decay is for
matrices, as everywhere else.
"""

from __future__ import annotations

from importlib import import_module

import torch

from albor.architecture import Architecture
from albor.bench.peers.plain import make_optimizer
from albor.bench.recorder import Recorder
from albor.bench.workload import Spec, Tokens, read_weights


def train(spec: Spec, recorder: Recorder) -> None:
    """torch.compile over the model, as `litgpt pretrain` does."""
    litgpt, fabric_module = import_module("litgpt"), import_module("lightning")
    convert = import_module("litgpt.scripts.convert_hf_checkpoint")
    utils = import_module("litgpt.utils")
    model = Architecture.from_config(spec.config.model)
    train, optimization = spec.config.train, spec.config.optimizer
    config = litgpt.Config(
        name="bench",
        block_size=spec.config.data.sequence_length,
        n_layer=model.num_hidden_layers,
        n_embd=model.hidden_size,
        n_head=model.num_attention_heads,
        n_query_groups=model.num_key_value_heads,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=model.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
        rotary_percentage=1.0,
        rope_base=model.rope_theta,
    )
    fabric = fabric_module.Fabric(
        devices=1,
        accelerator="cuda" if spec.device == "cuda" else "cpu",
        precision="bf16-mixed" if spec.dtype == "bfloat16" else "32-true",
    )
    fabric.launch()
    gpt = litgpt.GPT(config)
    if model.tie_word_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    values: dict[str, torch.Tensor] = {}
    convert.copy_weights_hf_llama(config, {}, values, read_weights(spec.weights))
    gpt.load_state_dict(values)
    gpt = fabric.setup(torch.compile(gpt, backend=spec.compile_backend))
    optimizer = fabric.setup_optimizers(make_optimizer(list(gpt.parameters()), spec))
    tokens = Tokens(spec)

    recorder.begin()
    for step in range(spec.steps):
        for micro_step in range(tokens.micro_steps):
            batch, targets = (
                fabric.to_device(
                    torch.from_numpy(side).pin_memory() if spec.device == "cuda" else torch.from_numpy(side)
                )
                for side in tokens.batch(step, micro_step)
            )
            with fabric.no_backward_sync(gpt, enabled=micro_step + 1 < train.gradient_accumulation_steps):
                loss = utils.chunked_cross_entropy(gpt(batch), targets) / train.gradient_accumulation_steps
                fabric.backward(loss)
            recorder.add_loss(loss)
        norm = None
        if optimization.grad_clip > 0:
            norm = fabric.clip_gradients(gpt, optimizer, max_norm=optimization.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        recorder.end_step(norm)
