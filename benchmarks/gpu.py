"""Training speed on a GPU: Hope beside a Transformer and flash-linear-attention's own DeltaNet.

    python benchmarks/gpu.py                    # sizes 340m and 760m at T 2,048, 8,192 and 32,768; extra `gpu`
    python benchmarks/gpu.py --sizes 340m --lengths 2048 --repetitions 3
    python benchmarks/gpu.py --cpu-smoke        # the same program at tiny sizes, without a device

One step is forward, backward, clipping and AdamW, in bfloat16 autocast. A model that fails its correctness gate is not
measured: on a short text the logits and gradients of the fast engine equal those of the slower one, a changed future
token leaves earlier logits alone, and the loss falls. MFU counts three forward passes (`nestlearn.flops`) against the
peak of the device, dense and in bfloat16. Operations are those that torch dispatches for one more layer; a kernel
written in Triton counts on the device, where the profiler counts the launches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import parse, parser, processor, table, update
from nestlearn import HopeConfig, HopeForCausalLM, flops
from nestlearn.memory import use_engine

FAMILIES = ("hope", "transformer", "fla-deltanet")
SMOKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 259}
PEAKS = {"H200": 989, "H100": 989, "GH200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L40": 181, "4090": 165}
"""TFLOP/s of dense bfloat16 products with float32 sums, by a part of the device's name (the vendor's data sheets)."""


class Counter(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def build(family: str, size: str, smoke: bool, layers: int | None = None) -> nn.Module:
    """A model of a family; DeltaNet in the shape of the Transformer of that size."""
    torch.manual_seed(0)
    name = f"{'transformer' if family == 'fla-deltanet' else family}-{size}"
    config = HopeConfig.from_preset(name, **({"reset_token_id": None} | (SMOKE if smoke else {})))
    if layers is not None:
        config.num_hidden_layers = layers
    if family != "fla-deltanet":
        return HopeForCausalLM(config)
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    shape = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    heads = max(1, config.hidden_size // 128)  # its usual width of a head
    return DeltaNetForCausalLM(DeltaNetConfig(**{key: getattr(config, key) for key in shape}, num_heads=heads))


def logits_and_gradients(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; the gradients of the loss of all weights in one vector."""
    model.zero_grad(set_to_none=True)
    output = model(tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return output.logits.detach(), torch.cat(gradients).detach()


def relative(have: Tensor, want: Tensor) -> float:
    return ((have - want).norm() / want.norm()).item()


def gate(model: nn.Module, family: str, device: str) -> dict[str, Any]:
    """Correctness before speed; raises RuntimeError with the reason if the model fails."""
    tokens = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(1)).to(device)
    cut = 100
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % 256
    with torch.no_grad():
        before, after = (model(x, use_cache=False).logits[:, :cut] for x in (tokens, changed))
    found = {"causality_error": relative(after, before)}
    if family != "fla-deltanet":
        # On the device the fast engines are kernels; their float32 products are TF32.
        slow = "chunked" if device == "cuda" else "reference"
        with use_engine(slow):
            want = logits_and_gradients(model, tokens)
        have = logits_and_gradients(model, tokens)
        found |= dict(zip(("logits_error", "gradients_error"), map(relative, have, want), strict=True))
    for name, allowed in {"causality_error": 1e-5, "logits_error": 1e-2, "gradients_error": 5e-2}.items():
        if not found.get(name, 0.0) <= allowed:
            raise RuntimeError(f"{name} is {found[name]:.2g}, allowed {allowed}")
    return found


def text(rows: int, length: int, device: str) -> Tensor:
    """A repeated random sentence with noise, so that the loss can fall within a few steps."""
    generator = torch.Generator().manual_seed(2)
    sentence = torch.randint(0, 256, (-(-length // 4),), generator=generator).repeat(4)[:length]
    noise = torch.randint(0, 256, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.95, sentence.expand(rows, -1), noise).to(
        device
    )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forward(model: nn.Module, tokens: Tensor, device: str) -> Tensor:
    """The loss, in bfloat16 autocast on a device."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(tokens, labels=tokens, use_cache=False).loss


def measure(model: nn.Module, tokens: Tensor, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every training step; raises RuntimeError if the loss did not fall."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses, seconds = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.warmup + options.repetitions):
        synchronize(device)
        began = time.perf_counter()
        losses.append(update(model, forward(model, tokens, device), optimizer))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    first, last = losses[0].item(), losses[-1].item()
    if not math.isfinite(last) or last >= first:
        raise RuntimeError(f"the loss went from {first:.3f} to {last:.3f}")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds[options.warmup :], "first_loss": first, "last_loss": last, "peak_bytes": peak}


def counts(model: nn.Module, tokens: Tensor, device: str) -> dict[str, int]:
    """Operations dispatched and, on the device, kernels launched by one forward and one backward pass."""
    model.zero_grad(set_to_none=True)
    with Counter() as ahead:
        loss = forward(model, tokens, device)
    with Counter() as back:
        loss.backward()
    found = {"forward": ahead.count, "backward": back.count}
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward(model, tokens, device).backward()
            torch.cuda.synchronize()
        kernel = torch.autograd.DeviceType.CUDA
        found["kernels"] = sum(event.device_type == kernel for event in profile.events() or ())
    return found


def operations(family: str, size: str, length: int, device: str, smoke: bool) -> dict[str, int]:
    """Of one layer: the difference of models with two and with one."""
    tokens = text(1, length, device)
    one, two = (counts(build(family, size, smoke, layers=n).to(device), tokens, device) for n in (1, 2))
    return {name: two[name] - one[name] for name in one}


def run(family: str, size: str, length: int, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model at one length, or why it was not measured."""
    try:
        model = build(family, size, options.cpu_smoke).to(device)
        result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        result["gate"] = gate(model, family, device)
        rows = max(1, options.tokens // length)
        result |= {"rows": rows} | measure(model, text(rows, length, device), device, options)
        best, median = min(result["seconds"]), statistics.median(result["seconds"])
        result["tokens_per_second"] = {"best": rows * length / best, "median": rows * length / median}
        if isinstance(model.config, HopeConfig):
            result["training_flops_per_token"] = 3 * flops(model.config, length)
            if options.peak_tflops:
                rate = result["tokens_per_second"]["median"] * result["training_flops_per_token"]
                result["mfu"] = rate / (options.peak_tflops * 1e12)
        del model
        result["operations_per_layer"] = operations(family, size, length, device, options.cpu_smoke)
        return result
    except (RuntimeError, ImportError) as error:  # out of memory is a RuntimeError
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def hardware(device: str) -> dict[str, Any]:
    """What ran, and with which packages."""
    packages = {}
    for name in ("torch", "triton", "flash-linear-attention", "nestlearn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["capability"] = f"{properties.major}.{properties.minor}"
    return found | {"packages": packages}


def peak_of(device: str) -> float | None:
    """TFLOP/s of the device, if its name is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


HEADER = ("model", "T", "rows", "tokens/s (median)", "of Transformer", "MFU", "peak memory", "operations forward",
          "backward", "kernels")  # fmt: skip


def rows_of(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The records as rows of a table."""
    base = {
        (r["size"], r["length"]): r["tokens_per_second"]["median"]
        for r in records
        if r["family"] == "transformer" and "error" not in r
    }
    rows = []
    for record in records:
        name = [f"{record['family']}-{record['size']}", f"{record['length']:,}"]
        if "error" in record:
            rows.append([*name, f"not measured: {record['error']}", *[""] * (len(HEADER) - 3)])
            continue
        speed, whole = record["tokens_per_second"]["median"], base.get((record["size"], record["length"]))
        counted, peak = record["operations_per_layer"], record["peak_bytes"]
        rows.append(
            [
                *name,
                str(record["rows"]),
                f"{speed:,.0f}",
                f"{speed / whole:.2f}" if whole else "",
                f"{record['mfu']:.1%}" if "mfu" in record else "",
                f"{peak / 2**30:.1f} GiB" if peak else "",
                str(counted["forward"]),
                str(counted["backward"]),
                str(counted.get("kernels", "")),
            ]
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write benchmarks/results/gpu_*.json and .md."""
    made = parser(__doc__, Path(__file__).parent / "results", threads=2)
    made.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    made.add_argument("--sizes", nargs="+", default=["340m", "760m"])
    made.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    made.add_argument("--tokens", type=int, default=32768, help="tokens of a step, in rows of each length")
    made.add_argument("--repetitions", type=int, default=10)
    made.add_argument("--warmup", type=int, default=3)
    made.add_argument("--peak-tflops", type=float, default=None, help="of the device; known for common ones")
    made.add_argument("--cpu-smoke", action="store_true", help="tiny models on the CPU: checks this program only")
    options = parse(made, words)
    device = "cpu" if options.cpu_smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "this benchmark measures a CUDA device, and there is none. --cpu-smoke checks the program without one."
        )
    if options.cpu_smoke:
        options.families = [family for family in options.families if family != "fla-deltanet"]  # needs a device
        options.sizes, options.lengths, options.tokens, options.repetitions, options.warmup = ["tiny"], [64], 128, 2, 1
    options.peak_tflops = options.peak_tflops or peak_of(device)
    records = []
    for size in options.sizes:
        for length in options.lengths:
            for family in options.families:
                records.append(
                    {"family": family, "size": size, "length": length, **run(family, size, length, device, options)}
                )
                print(f"{family}-{size}, T {length}: {records[-1].get('error') or 'done'}", flush=True)
    machine = hardware(device)
    report = {
        "version": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": machine,
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "records": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    place = "cpu-smoke" if options.cpu_smoke else machine["device"].lower().replace(" ", "-")
    page = f"# Training speed, {report['date']}\n\n{json.dumps(machine)}\n\n{table(HEADER, rows_of(records))}"
    (options.out / f"gpu_{place}.json").write_text(json.dumps(report, indent=1))
    (options.out / f"gpu_{place}.md").write_text(page)
    print("\n" + page)
    if any("error" in record for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
