"""transformers.Trainer over LlamaForCausalLM, with the settings its documentation gives for speed."""

from __future__ import annotations

import tempfile
from importlib import import_module
from typing import Any

import torch

from albor.architecture import Architecture
from albor.bench.recorder import LOG_EVERY, Recorder
from albor.bench.workload import Spec, Tokens, read_weights


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The token file as a data set of sequences."""

    def __init__(self, spec: Spec):
        self.tokens = Tokens(spec)
        self.count = spec.steps * self.tokens.micro_steps * self.tokens.sequences

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, targets = map(torch.from_numpy, self.tokens.window(index))
        # shift_labels are the targets as they are; labels alone would lose the last one of each sequence.
        return {"input_ids": tokens, "labels": targets, "shift_labels": targets}


def make_model(spec: Spec, attention: str = "sdpa") -> Any:
    """LlamaForCausalLM in fp32, with the workload's weights."""
    transformers = import_module("transformers")
    model = Architecture.from_config(spec.config.model)
    shape = {
        name: getattr(model, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps",
            "tie_word_embeddings",
        )
    }  # fmt: skip
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, use_cache=False, attn_implementation=attention)
    )
    found = llama.load_state_dict(read_weights(spec.weights), strict=False)
    tied = ["lm_head.weight"] if model.tie_word_embeddings else []
    if set(found.missing_keys) - set(tied) or found.unexpected_keys:
        raise RuntimeError(f"the weights do not fit LlamaForCausalLM: {found}")
    return llama


def _maskless() -> str:
    """The name of SDPA without a mask, which then is causal by its flag.

    Under torch.compile transformers hands a mask over (`masking_utils._ignore_causal_mask_sdpa`; 5.23 does so
    for torch before 2.14), and with a mask there is neither flash attention nor grouped heads. A peer is to
    be as fast as it can, so this one is spared the mask, in the way that transformers has for it.
    """
    sdpa = import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    import_module("transformers").AttentionInterface.register("sdpa_without_mask", sdpa)
    return "sdpa_without_mask"


def train(spec: Spec, recorder: Recorder, *, compiled: bool = False, liger: bool = False) -> None:
    """`compiled`: torch_compile=True; `liger`: use_liger_kernel=True."""
    if liger:
        import_module("liger_kernel")  # the Trainer's own message does not name the package
    import_module("accelerate")
    transformers = import_module("transformers")  # a library that need not be there
    o, t = spec.config.optimizer, spec.config.train
    cuda = spec.device == "cuda"
    model = make_model(spec, _maskless() if compiled else "sdpa")

    class Recorded(transformers.Trainer):  # type: ignore[name-defined]
        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **keywords)
            recorder.add_loss(loss)
            return loss

    class EndOfStep(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            recorder.end_step()

        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            recorder.begin()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=t.micro_batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            learning_rate=o.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=o.betas[0],
            adam_beta2=o.betas[1],
            adam_epsilon=o.eps,
            weight_decay=o.weight_decay,
            max_grad_norm=o.grad_clip,
            bf16=spec.dtype == "bfloat16",
            use_cpu=not cuda,
            torch_compile=compiled,
            torch_compile_backend=spec.compile_backend if compiled else None,
            use_liger_kernel=liger,
            logging_steps=LOG_EVERY,
            logging_nan_inf_filter=False,  # it reads the loss back to the host at every micro-step
            dataloader_num_workers=2 if cuda else 0,
            dataloader_pin_memory=cuda,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Recorded(model=model, args=arguments, train_dataset=Windows(spec), callbacks=[EndOfStep()]).train()
