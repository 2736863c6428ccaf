"""What the YAML says: the sections, keys, types, defaults and meanings, and the algebra between them.

Reading a file, placing a problem on its line, and overrides are in `albor.configfile`; this module knows
nothing of files. It imports no torch, so that `albor vram-estimate` answers at once.

Model keys have the names that Hugging Face's `LlamaConfig` gives them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from albor.alerts import Action, check_rule
from albor.errors import Problem
from albor.units import Bytes, Count, CountOrZero

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
AttentionKey = Literal["auto", "triton", "cudnn", "flash"]


class Section(BaseModel):
    """A frozen group of keys. Strict: no bool for a number, no number for text, no key that is not here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The transformer: pre-norm, grouped-query attention with rotary positions, SwiGLU, no biases."""

    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of the feed-forward layer (SwiGLU).")
    num_hidden_layers: Count = Field(le=1000, description="Number of transformer blocks, at most 1,000.")
    num_attention_heads: Count = Field(
        description="Number of query heads; the head width is hidden_size / this."
    )
    num_key_value_heads: Count | None = Field(
        None, description="Number of key/value heads (grouped-query attention); null: as many as query heads."
    )
    vocab_size: Count = Field(description="Number of token ids; the tokenizer is trained to this size.")
    max_position_embeddings: Count = Field(
        2048, description="Longest context in tokens that the published model declares and generation uses."
    )
    rope_theta: Positive = Field(10000.0, description="Base of the rotary position frequencies.")
    rms_norm_eps: Positive = Field(1.0e-5, description="Added to the mean square inside RMSNorm.")
    tie_word_embeddings: bool = Field(True, description="Use the embedding matrix as the output head too.")
    initializer_range: Positive = Field(
        0.02,
        description="Standard deviation of the initial weights; the two projections that write to the "
        "residual stream get this divided by sqrt(2 * num_hidden_layers).",
    )
    mup_base_width: Count | None = Field(
        None,
        description="muP: the hidden_size at which optimizer.lr and initializer_range were found, so that "
        "they hold at this one. The blocks' matrices get the learning rate times mup_base_width / "
        "hidden_size and initial weights times its root, the logits are multiplied by it; exports contain "
        "it. docs/mup.md. null: the same for every width.",
    )
    init_from: Text | None = Field(
        None,
        description="Begin with the weights of a Llama that exists already: a Hugging Face directory "
        "(config.json and safetensors) or a GGUF file. The keys above must be that model's, and "
        "tokenizer.path its tokenizer: `albor init-from` prints both. It is read when the run begins, and "
        "no more when it goes on. null: random weights.",
    )


class TokenizerConfig(Section):
    """Where the tokenizer comes from."""

    kind: Literal["sentencepiece", "hf"] = Field(
        "sentencepiece",
        description="sentencepiece: a BPE with byte fallback; hf: a lossless tokenizer.json, such as GPT-2's "
        "byte-level BPE (needs the `hf` extra).",
    )
    path: Text | None = Field(
        None,
        description="A file to use as it is: a SentencePiece .model file; for hf a tokenizer.json, a "
        "directory with one, or a GGUF file. null: train one on the data, which hf cannot.",
    )
    sample_bytes: Bytes = Field(
        200_000_000,
        description="How much text the tokenizer is trained on at most, drawn evenly over the data; of a "
        "data set on the hub, over its first sample_bytes.",
    )


class _SourceConfig(Section):
    kind: str  # narrowed by each source; stands here so that it is a source's first key
    weight: Positive = Field(1.0, description="Share of the training tokens, relative to the other sources.")
    max_bytes: Bytes | None = Field(
        None, description="Read at most this much text from the source; null: all."
    )


class PythonStdlibSource(_SourceConfig):
    """The Python source files of the running interpreter's standard library, without its tests."""

    kind: Literal["python-stdlib"]


class FilesSource(_SourceConfig):
    """Text or code files, one document each or several with a separator between them."""

    kind: Literal["files"]
    path: Text = Field(description="A file, a folder (read recursively), or a glob such as corpus/**/*.txt.")
    separator: Text | None = Field(
        None,
        description="Text between the documents of one file, such as <|endoftext|> or a blank line; null: a "
        "file is one document. A file that turns out not to be UTF-8 half-way is named, and the documents "
        "before that stay.",
    )


class JsonlSource(_SourceConfig):
    """Files with one JSON object per line (.jsonl, .jsonl.gz), one document each line."""

    kind: Literal["jsonl"]
    path: Text = Field(
        description="A file, a folder (read recursively), or a glob such as corpus/*.jsonl.gz."
    )
    text_key: Text = Field("text", description="The key of each object that holds the document's text.")


class ParquetSource(_SourceConfig):
    """Parquet files, one document per row (needs the `hf` extra, for pyarrow)."""

    kind: Literal["parquet"]
    path: Text = Field(description="A file, a folder (read recursively), or a glob such as corpus/*.parquet.")
    text_key: Text = Field("text", description="The column that holds the document's text.")


class HubSource(_SourceConfig):
    """A data set of the Hugging Face hub, or a local folder of one, streamed (needs the `hf` extra). Hub data
    is streamed once for tokenising, after its beginning for the tokenizer's sample; a preparation that is
    interrupted starts that source again.
    """

    kind: Literal["hf"]
    path: Text = Field(description="The data set's name on the hub, such as HuggingFaceFW/fineweb-edu.")
    subset: Text | None = Field(None, description="The data set's configuration, such as sample-10BT.")
    split: Text = Field("train", description="The split to read.")
    revision: Text | None = Field(
        None, description="Commit of the data set, so that a later run reads the same."
    )
    text_key: Text = Field("text", description="The column that holds the document's text.")


Source = Annotated[
    PythonStdlibSource | FilesSource | JsonlSource | ParquetSource | HubSource, Field(discriminator="kind")
]


class DataConfig(Section):
    """What the model reads."""

    sequence_length: Count = Field(1024, description="Tokens per training sequence.")
    sources: tuple[Source, ...] = Field(
        (PythonStdlibSource(kind="python-stdlib"),),
        min_length=1,
        strict=False,
        description="Where documents come from; each is tokenised once, and weights are shares of tokens.",
    )
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.005, description="Share of documents held out, chosen by their hash so that copies stay together."
    )
    document_mask: bool = Field(
        False,
        description="true: a token attends only to its own document, where several share a sequence; false: "
        "to all before it, across their borders.",
    )
    max_epochs: Positive = Field(
        4.0, description="How often any source may be repeated; a run that would need more is refused."
    )
    cache_dir: Text = Field("data", description="Where tokenizers and token shards are kept, by content.")


def _check_pair(value: Any) -> Any:
    # Pydantic would call what is not there by its place in the list: "betas[1] is missing".
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError(f"has length {len(value)}; give two numbers, such as [0.9, 0.95]")
    return value


class OptimizerConfig(Section):
    """AdamW, and what its state is kept in."""

    name: Literal["adamw"] = Field("adamw", description="Adam with decoupled weight decay.")
    lr: Positive = Field(3.0e-4, description="Peak learning rate.")
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_check_pair)] = Field(
        (0.9, 0.95), strict=False, description="Decay of the first and the second moment."
    )
    eps: Positive = Field(1.0e-8, description="Added to the root of the second moment.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Decoupled decay, on matrices only (never on norms)."
    )
    grad_clip: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Largest global gradient norm; a larger gradient is scaled down to it. 0: no clipping.",
    )

    state_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="fp32: master weights and moments in fp32, 14 bytes per parameter with the weights; "
        "bf16: no master weights, moments in bf16, stochastic rounding: 6 bytes per parameter, a little more "
        "noise in each update. Needs train.precision bf16.",
    )


class ScheduleConfig(Section):
    """How the learning rate moves between its peak and its minimum."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="Shape after the warm-up; wsd stays at the peak and then decays linearly."
    )
    warmup_steps: CountOrZero = Field(100, description="Steps of linear rise from 0 to the peak.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="Learning rate of the last step, as a share of the peak; constant has no use for it.",
    )
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="wsd only: share of the run's steps that the final decay takes."
    )


class TrainConfig(Section):
    """How much is trained, in which batches, at which precision."""

    max_steps: Count | None = Field(None, description="Optimizer steps of the run. Give this or max_tokens.")
    max_tokens: Count | None = Field(
        None, description="Tokens of the run, rounded up to whole steps. Give this or max_steps."
    )
    max_hours: Positive | None = Field(
        None,
        description="Wall-clock hours from the start of the command within which the run saves and exits "
        "with 75, to go on when it is started again; null: no limit.",
    )
    micro_batch_size: Count = Field(4, description="Sequences per forward and backward pass.")
    gradient_accumulation_steps: Count = Field(
        1,
        description="Micro-batches per optimizer step; tokens per step are this x micro_batch_size x "
        "sequence_length.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="What the arithmetic runs in; master weights and moments are fp32 in any case. A CPU "
        "without bf16 instructions computes bf16 runs in fp32, and says so.",
    )
    accumulator: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="Where gradients are summed in fp32: in host memory block by block, on the device, or "
        "on the device where the plan says that it fits.",
    )
    attention: AttentionKey = Field(
        "auto",
        description="What computes attention on a GPU: albor's Triton kernels, or cuDNN's or "
        "FlashAttention-2's in PyTorch. auto: what was measured to be fastest for such a card and shape, and "
        "triton where nothing was measured; the log says which and why. A CPU has one way only, auto.",
    )
    deterministic: bool = Field(
        True,
        description="The same bits on every run. false lets `attention` be a backend whose backward adds in "
        "any order, which may be faster.",
    )
    recompute: Literal["none", "cheap", "block"] = Field(
        "none",
        description="What backward computes again rather than keep: nothing, the norms, or the whole block.",
    )
    head_chunk_tokens: Count | None = Field(
        None, description="Tokens whose logits exist at one time; null: 256 on the CPU, 4096 on a GPU."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of each target that is spread evenly over the vocabulary, in training."
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of logsumexp(logits)^2 in the training loss, which keeps the logits from "
        "drifting; 1e-4 is PaLM's.",
    )


class DivergenceConfig(Section):
    """What happens when loss or gradient are not finite, or jump. A step with a loss or a gradient norm that
    is not finite, or exactly 0, is always skipped: weights, moments and bias correction stay as they are,
    data and schedule go on.
    """

    max_skips: Count = Field(
        5,
        description="Skipped steps among the last window_steps at which the run goes back to its newest good "
        "checkpoint, and on from there with the data behind those that have been read.",
    )
    window_steps: Count = Field(20, description="Steps over which skipped ones are counted.")
    max_rollbacks: CountOrZero = Field(
        2, description="Times that a run goes back; then it stops, with exit code 3."
    )
    on_spike: Literal["none", "clip", "skip"] = Field(
        "none",
        description="What happens at a step whose loss or gradient norm is finite but far above those before "
        "it: nothing; its gradient is scaled down to the mean norm of the window; or it is skipped.",
    )
    spike_zscore: Positive = Field(
        6.0,
        description="Far above: by more than this many standard deviations of the last spike_window steps.",
    )
    spike_window: Annotated[Count, Field(ge=8)] = Field(
        128, description="Steps that a spike is compared with; there is none until half of them are done."
    )
    keep_spikes: CountOrZero = Field(
        20,
        description="Newest skipped steps and spikes of which the batch is kept in spikes/, for "
        "`albor inspect-spike`.",
    )


class EvaluateConfig(Section):
    """Validation and samples during training."""

    every_steps: Count = Field(
        500, description="Steps between evaluations; the last step is always evaluated."
    )
    batches: Count = Field(64, description="Micro-batches of held-out text per evaluation, at most.")
    micro_batch_size: Count | None = Field(
        None,
        description="Sequences that an evaluation runs at a time; null: train.micro_batch_size. It changes "
        "memory and speed, but not which text is evaluated: batches and final_batches count micro-batches of "
        "train.micro_batch_size.",
    )
    prompts: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Texts that the model continues after each evaluation; empty: no samples.",
    )
    final_batches: Count = Field(
        512, description="Micro-batches of held-out text in the report at the end of the run, at most."
    )
    sample_tokens: Count = Field(64, description="Tokens that each sample is long, at most.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.8, description="Sampling temperature; 0: the likeliest token."
    )
    smoke_test: bool = Field(
        True,
        description="Let the model go on from a few fixed prompts at the end of the run, and say what is "
        "plainly wrong with the texts (`albor smoke`); it needs the memory to write in, which a run with "
        "`evaluate.prompts` has.",
    )


class CheckpointConfig(Section):
    """When the run's state is saved, and how many states are kept."""

    every_steps: Count = Field(1000, description="Steps between checkpoints; the last step is always saved.")
    keep_last: Count = Field(
        3, description="Newest checkpoints that are kept; older ones are removed, but for those below."
    )
    keep_every: Count | None = Field(
        None, description="Checkpoints at multiples of this step are kept for good; null: none."
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the lowest validation loss too; albor generate RUN/best takes "
        "it. It is one of those that were evaluated at their own step (evaluate.every_steps).",
    )
    retries: CountOrZero = Field(
        5,
        le=20,
        description="Further attempts at a save that the disk refused, after 1, 2, 4, 8, ... seconds, and a "
        "minute at most; then the run ends. Nothing else happens meanwhile.",
    )
    background: bool = Field(
        False,
        description="Copy the state into host memory, which the plan counts, and write it from there while "
        "the training goes on. One save at a time; the last one of the run is waited for.",
    )


class LogConfig(Section):
    """What is reported while training."""

    every_steps: Count = Field(10, description="Steps between rows in metrics.jsonl and on the terminal.")


Tracker = Literal["tensorboard", "trackio", "wandb"]


class TrackConfig(Section):
    """Where the rows of metrics.jsonl, the samples and the result are written to as well (needs the `track`
    extra). None of it stops or slows the training: docs/trackers.md.
    """

    to: tuple[Tracker, ...] = Field(
        (),
        strict=False,
        description="tensorboard: event files in RUN/tensorboard; trackio: a database in RUN/trackio; wandb: "
        "RUN/wandb, offline unless wandb_mode says otherwise; [] is none.",
    )
    project: Text = Field("albor", description="The project in trackio and wandb.")
    group: Text | None = Field(None, description="The group of runs in trackio and wandb; null: none.")
    tags: tuple[Text, ...] = Field((), strict=False, description="Tags in wandb.")
    entity: Text | None = Field(None, description="The user or team in wandb; null: your own.")
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="offline: nothing is sent, and `wandb sync` may do it later; online: sent."
    )
    trackio_dir: Text | None = Field(
        None,
        description="trackio's directory (TRACKIO_DIR); several runs with the same one share a dashboard. "
        "null: RUN/trackio.",
    )


class RunConfig(Section):
    """One training run, as one YAML file describes it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="The run's name, and its directory below runs_dir."
    )
    runs_dir: Text = Field("runs", description="Directory of all runs, relative to the current directory.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1337, description="All randomness follows from this number."
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="Where to train; auto: CUDA if there is a GPU."
    )
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    divergence: DivergenceConfig = DivergenceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    track: TrackConfig = TrackConfig()
    alerts: dict[Annotated[str, AfterValidator(check_rule)], Action] = Field(
        {},
        description="Rules on metrics, each with what happens when it holds after a step or an evaluation: "
        "`warn` says so once, `stop` saves and ends the run with exit code 1. `train/loss > 10: stop`, "
        "`gradients/* > 100: warn`, `val/loss is not finite: stop`; * stands for any characters, and a rule "
        "that begins with it is to be quoted. The metrics are those in metrics.jsonl; `memory/*`, "
        "`train/mfu` and `train/tokens_per_second` are measured when a row is due (`log.every_steps`).",
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return (
            self.train.micro_batch_size * self.train.gradient_accumulation_steps * self.data.sequence_length
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.max_tokens is not None, "check_algebra refuses a run without a horizon"
        return -(-self.train.max_tokens // self.tokens_per_step)


def check_algebra(config: RunConfig) -> list[Problem]:
    """What is wrong between keys that are each fine by themselves: heads that do not divide, a warm-up longer
    than the run, a horizon given twice. Returns every problem; its `key` is the one a person would change.
    """
    problems: list[Problem] = []
    model, train, data, schedule = config.model, config.train, config.data, config.schedule
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads

    def refuse(keys: str, message: str, remedy: str) -> None:
        key, *related = keys.split()
        problems.append(Problem(key, message, remedy, related=tuple(related)))

    if model.hidden_size % heads:
        below = heads * (model.hidden_size // heads)
        refuse(
            "model.hidden_size model.num_attention_heads",
            f"{model.hidden_size} does not divide into {heads} heads (num_attention_heads)",
            f"use {below + heads}" + (f" or {below}" if below else ""),
        )
    elif (model.hidden_size // heads) % 2:
        refuse(
            "model.num_attention_heads model.hidden_size",
            f"the head width {model.hidden_size} / {heads} = {model.hidden_size // heads} is odd, "
            "and rotary positions turn pairs",
            "choose a number of heads that makes hidden_size / num_attention_heads even",
        )
    elif model.mup_base_width is not None and model.mup_base_width % (model.hidden_size // heads):
        head_dim = model.hidden_size // heads
        nearest = head_dim * max(1, round(model.mup_base_width / head_dim))
        refuse(
            "model.mup_base_width model.hidden_size model.num_attention_heads",
            f"{model.mup_base_width} is no multiple of the head width, {model.hidden_size} / {heads} = "
            f"{head_dim}, which has to be the same at both widths",
            f"use {nearest}, or the number of heads that gives both widths one head width",
        )
    if model.mup_base_width is not None and model.init_from is not None:
        refuse(
            "model.mup_base_width model.init_from",
            "scales initial weights and logits, and the weights of model.init_from are a model as they are",
            "set one of them to null",
        )
    if heads % kv_heads:
        divisors = [n for n in range(1, min(heads, 1024) + 1) if heads % n == 0]
        refuse(
            "model.num_key_value_heads model.num_attention_heads",
            f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
            f"use one of {', '.join(map(str, divisors))}",
        )
    if config.optimizer.state_dtype == "bf16" and train.precision != "bf16":
        refuse(
            "optimizer.state_dtype train.precision",
            f"bf16 state needs bf16 weights, and train.precision is {train.precision}",
            "use fp32, or train.precision=bf16",
        )
    every = config.checkpoint.every_steps
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_every % every:
        refuse(
            "checkpoint.keep_every checkpoint.every_steps",
            f"{config.checkpoint.keep_every} is no multiple of every_steps ({every}), so there would be no "
            "checkpoint at most of its multiples",
            f"use {every * max(1, config.checkpoint.keep_every // every)}",
        )
    if train.attention != "auto" and config.device == "cpu":
        message = f"{train.attention} needs a GPU, and device is cpu"
        refuse("train.attention device", message, "use auto")
    for keys, message, remedy in attention_obstacles(config, train.attention):
        refuse(f"train.attention {keys}", message, remedy)
    if data.sequence_length > model.max_position_embeddings:
        refuse(
            "data.sequence_length model.max_position_embeddings",
            f"{data.sequence_length} is longer than model.max_position_embeddings, "
            f"{model.max_position_embeddings}",
            f"set model.max_position_embeddings to at least {data.sequence_length}",
        )
    divergence = config.divergence
    if divergence.max_skips > divergence.window_steps:
        refuse(
            "divergence.max_skips divergence.window_steps",
            f"{divergence.max_skips} steps cannot be skipped within {divergence.window_steps} "
            "(divergence.window_steps)",
            f"use at most {divergence.window_steps}",
        )
    if (train.max_steps is None) == (train.max_tokens is None):
        given = "both are given" if train.max_steps is not None else "neither is given"
        refuse(
            "train.max_steps train.max_tokens",
            f"the run's length is train.max_steps or train.max_tokens, and {given}",
            "set one of them to null" if train.max_steps is not None else "give one",
        )
    elif schedule.warmup_steps >= config.steps:
        tokens = (
            "train.max_tokens train.micro_batch_size train.gradient_accumulation_steps data.sequence_length"
        )
        horizon = "train.max_steps" if train.max_steps is not None else tokens
        refuse(
            f"schedule.warmup_steps {horizon}",
            f"a warm-up of {schedule.warmup_steps} steps does not end within the run's {config.steps} "
            f"({horizon.split()[0]})",
            f"use at most {config.steps - 1}",
        )
    if model.vocab_size > 2**31:
        refuse(
            "model.vocab_size", f"{model.vocab_size} token ids do not fit 32 bits", "use at most 2147483648"
        )
    if config.tokenizer.path is None:
        if config.tokenizer.kind == "hf":
            refuse(
                "tokenizer.path tokenizer.kind",
                "is null, and a tokenizer of kind hf is not trained here",
                "give a tokenizer.json or its directory, or set tokenizer.kind to sentencepiece",
            )
        elif model.init_from is not None:
            refuse(
                "tokenizer.path model.init_from",
                "is null, and the weights of model.init_from know the tokens of no new tokenizer",
                "give the model's own; albor init-from prints it",
            )
    if len(set(config.evaluate.prompts)) != len(config.evaluate.prompts):
        refuse("evaluate.prompts", "a prompt stands there twice", "remove one")
    if len(set(config.track.to)) != len(config.track.to):
        refuse("track.to", "a tracker stands there twice", "remove one")
    micro_batch = train.micro_batch_size * data.sequence_length
    if train.head_chunk_tokens and train.head_chunk_tokens > micro_batch:
        refuse(
            "train.head_chunk_tokens train.micro_batch_size data.sequence_length",
            f"{train.head_chunk_tokens} is more than a micro-batch has "
            f"({train.micro_batch_size} x {data.sequence_length} = {micro_batch})",
            "use null, or at most that many",
        )
    return problems


# Heads are multiples of 8 wide, and at most this: more is for some cards only (PyTorch's sdp_utils.cpp).
_WIDEST_HEAD = {"cudnn": 128, "flash": 192}


def attention_obstacles(config: RunConfig, backend: str) -> list[tuple[str, str, str]]:
    """Why `backend` cannot compute the attention of `config`: the keys that say so, what is wrong, and what
    would be right. Empty for albor's own kernels, which take everything.
    """
    if backend not in _WIDEST_HEAD:
        return []
    found = []
    model, train, data = config.model, config.train, config.data
    if backend == "cudnn" and train.deterministic:
        message = "the backward of cudnn adds in any order, and train.deterministic is true"
        found.append(("train.deterministic", message, "use auto or flash, or train.deterministic=false"))
    if data.document_mask:
        message = f"{backend} attends across documents, and data.document_mask keeps them apart"
        found.append(("data.document_mask", message, "use auto, or data.document_mask=false"))
    if train.precision == "fp32":
        message = f"{backend} computes in bf16 or fp16, and train.precision is fp32"
        found.append(("train.precision", message, "use auto, or train.precision=bf16"))
    width, odd = divmod(model.hidden_size, model.num_attention_heads)
    widest = _WIDEST_HEAD[backend]
    if not odd and (width % 8 or width > widest):
        message = f"{backend} takes heads of 8, 16, 24, ... {widest} columns, and here they have {width}"
        found.append(("model.hidden_size model.num_attention_heads", message, "use auto"))
    if backend == "cudnn" and data.sequence_length == 1:
        found.append(("data.sequence_length", "cudnn has no attention to one key alone", "use auto"))
    return found
