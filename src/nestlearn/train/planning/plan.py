"""What a training run will take: memory, time, and the settings that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch

from nestlearn.models import HopeConfig, flops
from nestlearn.models.flops import meta_model
from nestlearn.train.config import TrainConfig
from nestlearn.train.load import resolve_model_config
from nestlearn.train.optimizers import ENGINE, build_optimizer
from nestlearn.train.planning.devices import PER_MACHINE, Device
from nestlearn.train.planning.trace import StepCost, count, step_cost

Strategy = Literal["auto", "ddp", "fsdp", "hsdp"]
DAY = 86_400
ABOUT = 0.97
FULL = 4
"""Bytes of a weight, a gradient or a number of an optimizer's state."""


class Memory(NamedTuple):
    """Bytes of one device, when a step takes most.

    Attributes:
        weights, gradients, optimizer: what lasts; with fsdp and hsdp a part of the whole.
        copies: gathered units of fsdp and hsdp, buckets of ddp, weights in bfloat16.
        activations: kept for the backward pass, fast states and workspace among them.
        reserved: libraries, and what the allocator cannot use.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    reserved: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Choice(NamedTuple):
    """One way to run, with what it takes.

    Attributes:
        strategy, shard_size, checkpointing, batch, accumulation: settings of the run; ``batch`` is of one process.
        memory: of one device.
        seconds: of one update.
        tokens: that one update reads, on all devices.
    """

    strategy: str
    shard_size: int | None
    checkpointing: bool
    batch: int
    accumulation: int
    memory: Memory
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """On all devices."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        settings: of the run, complete: what `nestlearn train --config` reads.
        device, devices: what it runs on, and how many.
        parameters, flops_per_token: of the model; FLOPs of forward and backward, a multiply-add counting 2.
        chosen: the fastest way that fits, or a simpler one that is nearly as fast.
        others: the other ways, each at its fastest batch that fits, or at 1 if none does.
        days: until the tokens of the run are read.
        mfu: FLOPs of the model per second, of the data sheet's; None where there is none.
    """

    settings: TrainConfig
    device: Device
    devices: int
    parameters: int
    flops_per_token: int
    chosen: Choice
    others: tuple[Choice, ...]
    days: float
    mfu: float | None


class Update(NamedTuple):
    """What an optimizer takes: bytes of its state, and the cost of an update."""

    state: float
    cost: StepCost


def plan(
    settings: TrainConfig,
    device: Device,
    devices: int = 1,
    *,
    tokens: float = 1e9,
    strategy: Strategy = "auto",
    batch_size: int | None = None,
    update_tokens: int = 2**19,
) -> Plan:
    """How a run fits on so many devices, and how long it takes.

    Args:
        settings: of the run. Strategy, batch, accumulation, checkpointing and steps are replaced by what fits.
        device: with its rates.
        devices: how many; one process each.
        tokens: that the run reads in all.
        strategy: "auto" takes the fastest one that fits.
        batch_size: sequences of one process at once; None takes the smallest that is about as fast as any that fits.
        update_tokens: that one update should read on all devices; rounded up to whole batches.

    Raises:
        ValueError: nothing fits, a strategy that so many devices cannot run, levels that learn from the loss, or an
            optimizer that cannot be counted.

    Example:
        >>> from nestlearn.train.planning import gpu
        >>> found = plan(TrainConfig(preset="transformer-tiny", sequence_length=512), gpu("h100"), tokens=1e8)
        >>> found.chosen.strategy, found.chosen.memory.total < 80e9
        ('ddp', True)
    """
    if devices < 1:
        raise ValueError(f"{devices=} must be at least 1.")
    model = resolve_model_config(settings)
    parameters = sum(p.numel() for p in meta_model(model).parameters())
    judged = _Judged(settings, device, devices, parameters, _largest_unit(model), optimizer_cost(settings, model))
    chosen, found = _choose(judged, model, strategy, batch_size, update_tokens)
    flops_per_token = 3 * flops(model, settings.sequence_length)
    rate = flops_per_token * chosen.tokens_per_second / devices
    return Plan(
        settings=dataclasses.replace(
            settings,
            strategy=cast(Any, chosen.strategy),
            shard_size=chosen.shard_size,
            gradient_checkpointing=chosen.checkpointing,
            batch_size=chosen.batch,
            gradient_accumulation=chosen.accumulation,
            steps=max(1, math.ceil(tokens / chosen.tokens)),
        ),
        device=device,
        devices=devices,
        parameters=parameters,
        flops_per_token=flops_per_token,
        chosen=chosen,
        others=tuple(choice for choice in found if choice is not chosen),
        days=tokens / chosen.tokens_per_second / DAY,
        mfu=None if device.peak is None else rate / device.peak,
    )


def _choose(
    judged: _Judged, model: HopeConfig, strategy: Strategy, batch_size: int | None, update_tokens: int
) -> tuple[Choice, list[Choice]]:
    """The way to run, and all that were compared."""
    settings, device, devices = judged.settings, judged.device, judged.devices
    found: list[Choice] = []
    # Checkpointing computes each block twice: it is taken where nothing fits without it.
    for checkpointing in (True,) if settings.gradient_checkpointing else (False, True):
        cost = step_cost(model, 1, settings.sequence_length, checkpointing=checkpointing, kernels=device.overlaps)
        for name, size in _strategies(strategy, devices):
            found.append(_Run(judged, cost, name, size, checkpointing).best(batch_size, update_tokens))
        fitting = [choice for choice in found if choice.memory.total <= device.memory]
        if fitting:
            # The simplest one that is about as fast as the fastest.
            fastest = max(choice.tokens_per_second for choice in fitting)
            return next(choice for choice in fitting if choice.tokens_per_second >= ABOUT * fastest), found
    raise ValueError(_no_room(min(found, key=lambda choice: choice.memory.total), device, devices, settings))


def _strategies(strategy: Strategy, devices: int) -> Iterator[tuple[str, int | None]]:
    """The strategies to compare, with the processes that hold one copy of the parameters."""
    groups = devices > PER_MACHINE and devices % PER_MACHINE == 0
    possible = {"ddp": True, "fsdp": devices > 1, "hsdp": groups}
    if strategy != "auto" and not possible[strategy]:
        needs = "more than one device" if strategy == "fsdp" else f"a multiple of {PER_MACHINE} devices, 16 or more"
        raise ValueError(f"strategy={strategy!r} needs {needs}, and there are {devices}. Take --strategy auto.")
    for name, can in possible.items():
        if can and strategy in ("auto", name):
            yield name, PER_MACHINE if name == "hsdp" else None


def _no_room(smallest: Choice, device: Device, devices: int, settings: TrainConfig) -> str:
    memory = smallest.memory
    part, size = max(memory._asdict().items(), key=lambda item: item[1])
    fixes = {
        "activations": f"a shorter context than {settings.sequence_length:,} tokens",
        "reserved": "a device with more memory",
    }
    return (
        f"{settings.preset} does not fit: with {smallest.strategy}, gradient checkpointing and {smallest.batch} "
        f"sequence(s) of {settings.sequence_length:,} tokens a device needs {memory.total / 1e9:.1f} GB, and "
        f"{device.name} has {device.memory / 1e9:.1f} GB. Most goes to {part} ({size / 1e9:.1f} GB). Take "
        f"{fixes.get(part, f'more than {devices} device(s), so that they are divided')}, or a smaller model."
    )


def _largest_unit(config: HopeConfig) -> int:
    """Bytes of the largest part of a model that is gathered at once: a block, or the embeddings and the head."""
    network = meta_model(config)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in network.model.layers]
    everything = sum(p.nbytes for p in network.parameters())
    return max(*blocks, everything - sum(blocks))


class _Judged(NamedTuple):
    """What all strategies of a plan share. ``unit``: bytes of the largest part that is gathered at once."""

    settings: TrainConfig
    device: Device
    devices: int
    parameters: int
    unit: int
    update: Update


class _Run(NamedTuple):
    """A strategy with the cost of its passes."""

    of: _Judged
    cost: StepCost
    strategy: str
    shard_size: int | None
    checkpointing: bool

    @property
    def parts(self) -> int:
        """Devices over which the parameters are divided."""
        return 1 if self.strategy == "ddp" else self.shard_size or self.of.devices

    def best(self, batch_size: int | None, update_tokens: int) -> Choice:
        """The smallest batch that fits and is about as fast as the fastest that fits; 1 if none fits."""
        if batch_size is not None:
            return self.choice(batch_size, update_tokens)
        most = max(1, update_tokens // (self.of.devices * self.of.settings.sequence_length))
        sizes = [2**power for power in range(most.bit_length())]
        choices = [self.choice(size, update_tokens) for size in sizes]
        fitting = [choice for choice in choices if choice.memory.total <= self.of.device.memory]
        fastest = max((choice.tokens_per_second for choice in fitting), default=0.0)
        return next((choice for choice in fitting if choice.tokens_per_second >= ABOUT * fastest), choices[0])

    def choice(self, batch: int, update_tokens: int) -> Choice:
        """What a batch takes."""
        tokens = batch * self.of.devices * self.of.settings.sequence_length
        accumulation = max(1, math.ceil(update_tokens / tokens))
        return Choice(
            self.strategy,
            self.shard_size,
            self.checkpointing,
            batch,
            accumulation,
            self.memory(batch),
            self.seconds(batch, accumulation),
            tokens * accumulation,
        )

    def memory(self, batch: int) -> Memory:
        """Bytes of one device."""
        weights = FULL * self.of.parameters
        unit = self.of.unit
        half = self.of.settings.dtype == "bfloat16"
        cast_weights = (2 * (unit / FULL if self.checkpointing else self.of.parameters)) if half else 0.0
        copies = 3 * unit if self.parts > 1 else weights * (self.of.devices > 1)
        activations = self.of.device.width * self.cost.peak * batch
        held = (weights + weights + self.of.update.state) / self.parts + copies + cast_weights
        return Memory(
            weights / self.parts,
            weights / self.parts,
            self.of.update.state / self.parts,
            copies + cast_weights,
            activations,
            self.of.device.reserved + self.of.device.slack * (activations + 0.1 * held),
        )

    def seconds(self, batch: int, accumulation: int) -> float:
        """Time of one update: the passes, what is exchanged, and the optimizer."""
        cost = StepCost(*(x * batch for x in self.cost))._replace(operations=self.cost.operations)
        compute = self.of.device.seconds(cost)
        each, once = self._exchanged()
        join = max if self.of.device.overlaps else lambda a, b: a + b
        passes = accumulation * join(compute, each)
        own = self.of.update.cost
        share = own._replace(products=own.products / self.of.devices, batched=own.batched / self.of.devices)
        share = share._replace(moved=share.moved / self.parts / self.of.device.width)
        return passes + once + self.of.device.seconds(share)

    def _exchanged(self) -> tuple[float, float]:
        """Seconds of communication of one pass, and of one update."""
        weights, device = FULL * self.of.parameters, self.of.device
        near = device.link if self.of.devices <= PER_MACHINE else device.network
        if self.strategy == "ddp":
            # The gradients are summed in the last pass of an update, most of it during that pass.
            return 0.0, 2 * weights * (self.of.devices - 1) / self.of.devices / near / (2 if device.overlaps else 1)
        inner = device.link if self.shard_size else near
        # Gathered forward and backward, gradients scattered.
        each = 3 * weights * (self.parts - 1) / self.parts / inner
        groups = self.of.devices // self.parts
        return each + 2 * weights / self.parts * (groups - 1) / groups / device.network, 0.0


def optimizer_cost(settings: TrainConfig, config: HopeConfig) -> Update:
    """State and cost of one update of a run's optimizer, on the meta device.

    Raises:
        ValueError: an optimizer whose update asks for values of its tensors.

    Example:
        >>> optimizer_cost(TrainConfig(), HopeConfig(num_hidden_layers=1)).state % 8
        0.0
    """
    one, two = (_traced_update(settings, config, layers) for layers in (1, 2))
    more = config.num_hidden_layers - 1
    state = one.state + more * (two.state - one.state)
    return Update(state, one.cost.plus(two.cost.plus(one.cost, -1), more))


def _traced_update(settings: TrainConfig, config: HopeConfig, layers: int) -> Update:
    fields = {name: getattr(config, name) for name in config.field_names()}
    model = meta_model(HopeConfig(**fields | {"num_hidden_layers": layers, "mixer": config.mixers[0]}))
    parameters = sum(p.numel() for p in model.parameters())
    clipping = 4 * FULL * parameters  # norms, and a product in place
    if settings.optimizer == ENGINE:
        # One kernel that reads weights, gradients and two moments, and writes three of them.
        return Update(2.0 * FULL * parameters, StepCost(moved=7.0 * FULL * parameters + clipping, operations=50.0))
    optimizer = build_optimizer(
        settings.optimizer,
        model,
        lr=1e-3,
        adamw_lr=1e-3,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        options=settings.optimizer_options,
    )
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
        cost = count(optimizer.step)
    except RuntimeError as error:
        raise ValueError(
            f"An update of {settings.optimizer} cannot be counted without data ({error}). Plan with --optimizer m3 or "
            "adamw: the passes take the same."
        ) from error
    states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return Update(float(sum(x.nbytes for x in states)), cost.plus(StepCost(moved=float(clipping))))
