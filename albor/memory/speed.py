"""How long a training step takes on a card that need not be here: what `--fit` ranks by.

The device's work is `albor.floor`'s list of operations at the card's modelled rates. Gradients that are
summed in host memory add what of their way there does not hide behind that work. All of it is modelled: five
cards from published readings, any other one scaled from the most similar of these. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.floor import CARDS, Attention, Card, Operation, step_work
from albor.memory.attention import AttentionChoice, slowdown
from albor.memory.cards import GPUS, Gpu
from albor.memory.plan import MemoryPlan, head_chunk_tokens, rounds_state

# The modelled card that others of a compute capability are scaled from.
_LIKE = {
    (8, 0): "A100 80GB", (8, 6): "RTX 3090", (8, 9): "RTX 4090",
    (9, 0): "H100", (10, 0): "H100", (12, 0): "RTX 4090",
}  # fmt: skip
_SCALED = "scaled from"
MODELLED_DTYPES = ("bfloat16", "float16")  # the tensor cores' rates
# Bytes per second and direction of 16 lanes: 80 % of what PCIe 3.0, 4.0 and 5.0 signal. Assumed.
_LINKS = {3: 12.6e9, 4: 25.2e9, 5: 50.4e9}
_EIGHT_LANES = ("RTX 3050", "RTX 4060", "RTX 5060", "Laptop")  # in the names of cards that have no more
# Bytes per second that the host adds gradients up at: of two channels of DDR5, and of a server. Assumed.
_DESKTOP_SUMS, _SERVER_SUMS = 60e9, 200e9
# Bytes of host memory per gradient: bf16 read, fp32 sum read and written, but not read in the first
# micro-batch; and the sum read for its norm.
_ADDED, _COPIED, _NORM = 10, 6, 4
_BACKWARD_SHARE = 2 / 3  # of a micro-batch, in which sums of the last one can come back


@dataclass(frozen=True)
class SpeedModel:
    """A card and the machine around it, in rates."""

    card: Card
    capability: tuple[int, int]
    link_bytes_per_second: float  # to host memory, and from it
    sums_bytes_per_second: float  # of host memory, when gradients are added up
    note: str  # how far it can be trusted, in a few words
    _known: dict[object, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, gpu: Gpu | None, compute_dtype: str) -> SpeedModel | None:
        """None where no rate is known: no card, a datasheet with gaps, or fp32, which no tensor core has."""
        card = modelled_card(gpu) if gpu is not None else None
        if gpu is None or card is None or compute_dtype not in MODELLED_DTYPES:
            return None
        generation = 3 if gpu.compute_capability < (8, 0) else 4 if gpu.compute_capability < (9, 0) else 5
        lanes = 0.5 if any(name in gpu.name for name in _EIGHT_LANES) else 1.0
        sums = _DESKTOP_SUMS if gpu.name.startswith("RTX") else _SERVER_SUMS
        like = f" after {_like(gpu)}" if card.source.startswith(_SCALED) else ""
        note = f"modelled{like}, not measured"
        return cls(card, gpu.compute_capability, _LINKS[generation] * lanes, sums, note)

    @property
    def source(self) -> str:
        """Of the card's rates."""
        return self.card.source

    def step_seconds(self, config: RunConfig, plan: MemoryPlan) -> float:
        """One optimizer step of `config` as `plan` lays it out."""
        early = any(buffer.name == "gradients.returned.head" for buffer in plan.buffers)
        return self.seconds(
            config, plan.compute_dtype, plan.accumulator == "gpu", plan.attention, early=early
        )

    def seconds(
        self,
        config: RunConfig,
        compute_dtype: str,
        sums_on_device: bool,
        attention: AttentionChoice,
        *,
        early: bool = True,
    ) -> float:
        """The same before there is a plan. `early`: summed gradients come back during the last backward, and
        not for the update; it is never slower.
        """
        model = Architecture.from_config(config.model)
        micro_steps = config.train.gradient_accumulation_steps
        rounded = rounds_state(config, compute_dtype)
        micro_batch, update = self._device_seconds(config, model, sums_on_device, rounded, attention)
        if sums_on_device:
            return micro_steps * micro_batch + update
        # Gradients leave in bf16, are added up and come back in fp32, beside the work and one after another.
        leave, come_back = 2 / self.link_bytes_per_second, 4 / self.link_bytes_per_second
        host = (_COPIED + (micro_steps - 1) * _ADDED + _NORM) / self.sums_bytes_per_second
        count = model.parameter_count
        work = max(micro_steps * micro_batch, micro_steps * leave * count, host * count)
        # The embedding's gradient is there last, with nothing left to hide behind.
        last = count - sum(p.size for p in model.parameters if p.block != "embedding")
        tail = last * (leave + (_ADDED + _NORM) / self.sums_bytes_per_second + come_back)
        if not early:
            return work + tail + max(update, count * come_back)
        return work + tail + max(0.0, count * come_back - _BACKWARD_SHARE * micro_batch) + update

    def _device_seconds(
        self,
        config: RunConfig,
        model: Architecture,
        sums_on_device: bool,
        rounded_state: bool,
        attention: AttentionChoice,
    ) -> tuple[float, float]:
        """Of one micro-batch, and of the update."""
        train, length = config.train, config.data.sequence_length
        work = step_work(
            model, length, train.micro_batch_size, 1, head_chunk_tokens(config, "cuda"),
            recompute=train.recompute, sums_on_device=sums_on_device, rounded_state=rounded_state,
        )  # fmt: skip
        slower = slowdown(config, attention.backend, self.capability)
        times = [
            one.count
            * self._operation_seconds(one.operation)
            * (slower if isinstance(one.operation, Attention) else 1.0)
            for one in work
        ]
        return sum(times[:-1]), times[-1]

    def _operation_seconds(self, operation: Operation) -> float:
        if operation not in self._known:
            self._known[operation] = self.card.seconds(operation)
        return self._known[operation]


def modelled_card(gpu: Gpu) -> Card | None:
    """The model of `gpu`: its own, or the most similar card's, scaled by what their datasheets say.

    None where a datasheet has no figure to scale by.
    """
    own = next((card for card in CARDS if card.name == gpu.name), None)
    like = next((other for other in GPUS if other.name == _like(gpu)), None)
    if own is not None or like is None:
        return own
    card = next(card for card in CARDS if card.name == like.name.removesuffix(" 80GB"))
    if gpu.bf16_peak_flops is None or gpu.bandwidth is None or gpu.multiprocessors is None:
        return None
    assert like.bf16_peak_flops is not None
    assert like.bandwidth is not None
    faster, wider = gpu.bf16_peak_flops / like.bf16_peak_flops, gpu.bandwidth / like.bandwidth
    scaled = f"{_SCALED} {card.name} by the datasheets' peak, bandwidth and multiprocessors"
    return replace(
        card,
        name=gpu.name,
        peak_flops=gpu.bf16_peak_flops,
        sustained_flops=card.sustained_flops * faster,
        bandwidth=card.bandwidth * wider,
        multiprocessors=gpu.multiprocessors,
        attention_flops={
            width: (forward * faster, backward * faster)
            for width, (forward, backward) in card.attention_flops.items()
        },
        source=card.source if faster == wider == 1 else scaled,
    )


def _like(gpu: Gpu) -> str | None:
    return _LIKE.get(gpu.compute_capability)
