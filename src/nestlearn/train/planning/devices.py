"""What devices can do: data sheets of GPUs, and this machine's processor, measured."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nestlearn.allocator import tune_allocator
from nestlearn.fields import unknown_name
from nestlearn.train.planning.trace import StepCost, count

PER_MACHINE = 8
"""GPUs of one machine; beyond it data goes through the network."""


@dataclass(frozen=True)
class Device:
    """Rates that a step reaches on one device, and the memory it has.

    Attributes:
        name: of the device.
        products, batched, attention: FLOP/s of matrix products, of the batches of small ones in memories, and of
            softmax attention.
        bandwidth: bytes/s of everything else.
        launch: seconds that the host needs per operation.
        memory: bytes.
        reserved: bytes that the libraries take on the device before a model is there.
        slack: of what tensors take, for what the allocator cannot use.
        link, network: bytes/s that a device exchanges with others in its machine, and with those of other machines.
        overlaps: the host runs ahead of the device, and data is exchanged during the step.
        peak: FLOP/s of the data sheet (dense), for MFU; None where there is none.
        width: bytes of a number of an activation, relative to float32.
        assumptions: where the numbers come from.
    """

    name: str
    products: float
    batched: float
    attention: float
    bandwidth: float
    launch: float
    memory: float
    reserved: float
    slack: float
    link: float
    network: float
    overlaps: bool
    peak: float | None = None
    width: float = 1.0
    assumptions: tuple[str, ...] = field(default=())

    def seconds(self, cost: StepCost) -> float:
        """Time of a step of one process, without what it exchanges with others.

        Products and the other operations do not overlap: kernels run one after another.
        """
        device = (
            cost.products / self.products
            + cost.batched / self.batched
            + cost.attention / self.attention
            + self.width * cost.moved / self.bandwidth
        )
        host = cost.operations * self.launch
        return max(device, host) if self.overlaps else device + host


@dataclass(frozen=True)
class _Sheet:
    """A data sheet: dense FLOP/s in bfloat16 and float32, memory, its bandwidth, and the link, in bytes and bytes/s."""

    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float


# NVIDIA's data sheets; the link is one direction of NVLink, or of PCIe where there is none.
GPUS = {
    "b200": _Sheet(2250e12, 75e12, 180e9, 8.0e12, 900e9),
    "h200": _Sheet(989e12, 67e12, 141e9, 4.8e12, 450e9),
    "h100": _Sheet(989e12, 67e12, 80e9, 3.35e12, 450e9),
    "a100": _Sheet(312e12, 19.5e12, 80e9, 2.04e12, 300e9),
    "l40s": _Sheet(362e12, 91.6e12, 48e9, 0.864e12, 32e9),
    "4090": _Sheet(165e12, 82.6e12, 24e9, 1.01e12, 32e9),
}
# Of the data sheet, as training reaches it.
PRODUCTS, BATCHED, ATTENTION, BANDWIDTH, LINK = 0.65, 0.35, 0.5, 0.8, 0.7
LAUNCH, NETWORK, CONTEXT, SLACK = 5e-6, 50e9, 1e9, 0.1
HALF = 0.6
"""Bytes of activations in bfloat16 autocast: some stay in float32."""


def gpu(name: str, dtype: str = "bfloat16") -> Device:
    """A GPU by its name, with the rates that training reaches.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> gpu("H100").memory
        80000000000.0
    """
    key = name.lower().replace("nvidia-", "").replace("rtx-", "")
    if key not in GPUS:
        raise unknown_name("GPU", name, [*GPUS, "cpu"])
    sheet = GPUS[key]
    half = dtype == "bfloat16"
    peak = sheet.bfloat16 if half else sheet.float32
    return Device(
        name=key,
        products=PRODUCTS * peak,
        batched=BATCHED * peak,
        attention=ATTENTION * peak,
        bandwidth=BANDWIDTH * sheet.bandwidth,
        launch=LAUNCH,
        memory=sheet.memory,
        reserved=CONTEXT,
        slack=SLACK,
        link=LINK * sheet.link,
        network=LINK * NETWORK,
        overlaps=True,
        peak=peak,
        width=HALF if half else 1.0,
        assumptions=(
            f"{peak / 1e12:,.0f} TFLOP/s and {sheet.bandwidth / 1e12:.2f} TB/s by the data sheet",
            f"linear maps reach {PRODUCTS:.0%} of it, memories {BATCHED:.0%}, attention {ATTENTION:.0%}, "
            f"other operations {BANDWIDTH:.0%} of the bandwidth",
            f"{LAUNCH * 1e6:.0f} µs of the host per operation; a memory with a kernel of its own is a few operations",
            f"{LINK:.0%} of {sheet.link / 1e9:.0f} GB/s inside a machine of {PER_MACHINE} GPUs, of "
            f"{NETWORK / 1e9:.0f} GB/s between machines",
            *([f"activations take {HALF:.0%} of their bytes in float32"] if half else []),
        ),
    )


def _rate(work: float, run: Callable[[], object], seconds: float = 0.25) -> float:
    """Work per second of the median call. The processor's time: what else runs on the machine does not count."""
    run()
    threads, spent = torch.get_num_threads(), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not spent:
        began = time.process_time()
        run()
        spent.append((time.process_time() - began) / threads)
    return work / max(statistics.median(spent), 1e-9)


def _product_rate(shape: tuple[int, ...], half: bool) -> float:
    """FLOP/s of a linear map: forward, and the two products of its backward pass."""
    *rows, width, out = shape
    x = torch.randn(*rows, width, requires_grad=True)
    weight = torch.randn(*rows[:-1], width, out, requires_grad=True)
    slope = torch.randn(*rows, out)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = x @ weight
        torch.autograd.grad(y, (x, weight), slope.to(y.dtype))

    return _rate(3 * 2 * math.prod(shape), run)


def _attend(heads: torch.Tensor) -> None:
    read = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.autograd.grad(read.sum(), heads)


def _few_small(one: torch.Tensor) -> None:
    """Operations that take the host longer than the processor, forward and backward."""
    torch.autograd.grad(((one @ one) * one + one).transpose(0, 1).sum(), one)


def this_processor(processes: int = 1, dtype: str = "float32") -> Device:
    """The processor of this machine, measured for about two seconds; ``processes`` share its threads and memory."""
    tune_allocator()
    threads = torch.get_num_threads()
    half = dtype == "bfloat16"
    products, batched = _product_rate((4096, 160, 480), half), _product_rate((64, 32, 128, 32), half)
    heads = torch.randn(1, 4, 2048, 32, requires_grad=True)
    scores = _rate(3.5 * 2 * 4 * 2048**2 * 32, lambda: _attend(heads))
    # Larger than the caches: what a pass keeps for its backward pass.
    values = torch.randn(2**23)
    bandwidth = _rate(3 * values.nbytes, lambda: values * values)
    one = torch.randn(8, 8, requires_grad=True)
    launch = 1 / _rate(count(lambda: _few_small(one)).operations, lambda: _few_small(one))
    share = min(1.0, (os.cpu_count() or 1) / (threads * processes))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        name="cpu",
        products=products * share,
        batched=batched * share,
        attention=scores * share,
        bandwidth=bandwidth * share,
        launch=launch / share,
        memory=memory / processes,
        reserved=0.5e9,
        slack=0.2,
        link=2e9,
        network=0.1e9,
        overlaps=False,
        width=HALF if half else 1.0,
        assumptions=(
            f"measured now with {threads} threads: {products / 1e9:.0f} GFLOP/s of linear maps, "
            f"{batched / 1e9:.0f} of memories, {scores / 1e9:.0f} of attention, {bandwidth / 1e9:.1f} GB/s, "
            f"{launch * 1e6:.1f} µs per operation",
            "processes exchange 2 GB/s by gloo inside a machine, 0.1 GB/s between machines",
        ),
    )
