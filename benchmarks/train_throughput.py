"""Training speed of Hope, Titans, DeltaNet and a Transformer in one run.

    python benchmarks/train_throughput.py                                # all models, a few minutes
    python benchmarks/train_throughput.py --length 2048 --batch 1 --models hope deltanet transformer
    python benchmarks/train_throughput.py --autocast --models hope transformer

Each model lives in a process of its own (so that its peak memory is its own) and takes one training step (forward,
loss, backward, clipping, AdamW) at a time; the processes take turns, so that a slow phase of the machine hits all of
them. Nothing is reported for a model that fails its correctness gate: logits of a text read in parts, single tokens
among them, equal those of the whole; a changed future token leaves earlier logits bit-identical; the loss is finite
and falls.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from common import parse, parser, processor, table, update
from nestlearn import HopeConfig, HopeForCausalLM, flops
from nestlearn.allocator import tune_allocator

FROZEN = [{"period": None, "expansion": 4}]
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 256,
         "tie_word_embeddings": False, "reset_token_id": None, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "hope": {"preset": "hope-tiny"},
    "hope, MLP memories": {
        "preset": "hope-tiny",
        "mixer": {"type": "self_modifying", "expansion": 2, "projection_chunk_size": 256},
    },
    "titans": {"preset": "titans-tiny"},
    "deltanet": {"preset": "titans-tiny", "mixer": {"memory": "deltanet"}, "cms": FROZEN},
    "transformer": {"preset": "transformer-tiny", "cms": FROZEN},
}
BASELINE = "transformer"


def build(name: str, overrides: dict[str, Any]) -> Any:
    """The benchmark's model of that name."""
    fields = {**SHAPE, **{k: v for k, v in MODELS[name].items() if k != "preset"}, **overrides}
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig.from_preset(MODELS[name]["preset"], **fields))


def gate(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Correctness before speed; raises RuntimeError with the reason if the model fails."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (2, min(length, 160)), generator=generator)
    cut = tokens.shape[1] * 2 // 3
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % model.config.vocab_size
    model.eval()
    with torch.no_grad():
        before, after = (model(x, use_cache=False).logits[:, :cut] for x in (tokens, changed))
        whole = model(tokens, use_cache=False).logits
        cache, parts = None, []
        for part in torch.tensor_split(tokens, [1, 41, 42, 90], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    error = (torch.cat(parts, 1) - whole).abs().max().item()
    if not torch.equal(before, after):
        raise RuntimeError("a changed future token changed earlier logits")
    if error > 1e-3:
        raise RuntimeError(f"read in parts, the logits differ by {error:.1e}")
    return {"causal": True, "split_error": error}


class Worker:
    """One model in this process: trains when told to."""

    def __init__(self, name: str, options: argparse.Namespace):
        torch.set_num_threads(options.threads)
        self.model = build(name, json.loads(options.overrides))
        self.tokens = options.batch * options.length
        self.flops_per_token = 3 * flops(self.model.config, options.length)
        self.gate = gate(self.model, options.batch, options.length)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(2)
        # Text-like data: a repeated random sentence with noise, so that the loss can fall within a few steps.
        sentence = torch.randint(0, 256, (options.length // 4,), generator=generator).repeat(4)
        noise = torch.randint(0, 256, (options.batch, options.length), generator=generator)
        keep = torch.rand(options.batch, options.length, generator=generator) < 0.95
        self.data = torch.where(keep, sentence[: options.length].expand(options.batch, -1), noise)
        self.losses: list[float] = []
        self.autocast: bool = options.autocast

    def step(self) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(self.data, labels=self.data, use_cache=False).loss
        self.losses.append(update(self.model, loss, self.optimizer).item())
        return time.perf_counter() - began

    def summary(self) -> dict[str, Any]:
        """What does not change between steps; raises RuntimeError if the loss did not fall."""
        first, last = self.losses[0], self.losses[-1]
        if not all(abs(loss) < 1e9 for loss in self.losses) or last >= first:
            raise RuntimeError(f"the loss went from {first:.3f} to {last:.3f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_flops_per_token": self.flops_per_token,
            "peak_bytes": peak,
            "gate": {**self.gate, "first_loss": first, "last_loss": last},
        }


def serve(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Body of a worker process: answers "step" with seconds and "end" with the summary, errors as text."""
    tune_allocator()
    try:
        worker = Worker(name, options)
        pipe.send({})
        while pipe.recv() == "step":
            pipe.send({"seconds": worker.step()})
        pipe.send({"summary": worker.summary()})
    except (RuntimeError, ValueError) as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All models, step by step in turn."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, {}, {}
    for name in options.models:
        pipes[name], other = context.Pipe()
        processes[name] = context.Process(target=serve, args=(name, options, other), daemon=True)
        processes[name].start()
        answer = pipes[name].recv()
        results[name] = {"seconds": [], **({"error": answer["error"]} if "error" in answer else {})}
        print(f"{name}: {answer.get('error') or 'ready'}", flush=True)
    alive = [name for name in options.models if "error" not in results[name]]
    for repetition in range(options.warmup + options.repetitions):
        for name in list(alive):
            pipes[name].send("step")
            answer = pipes[name].recv()
            if "error" in answer:
                results[name]["error"] = answer["error"]
                alive.remove(name)
            elif repetition >= options.warmup:
                results[name]["seconds"].append(answer["seconds"])
    for name in alive:
        pipes[name].send("end")
        answer = pipes[name].recv()
        results[name].update(answer.get("summary") or {"error": answer["error"]})
    for process in processes.values():
        process.join(timeout=10)
    return results


def rates(results: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Adds tokens/s, FLOP/s and ratios to the baseline to each model that passed."""
    passed = [result for result in results.values() if "error" not in result]
    for result in passed:
        times = {"best": min(result["seconds"]), "median": statistics.median(result["seconds"])}
        speeds = {key: tokens / seconds for key, seconds in times.items()}
        flops = {key: rate * result["training_flops_per_token"] for key, rate in speeds.items()}
        result |= {"tokens_per_second": speeds, "flops_per_second": flops}
    base = results.get(BASELINE, {})
    for result in passed if "tokens_per_second" in base else ():
        result["ratio_to_transformer"] = {
            key: rate / base["tokens_per_second"][key] for key, rate in result["tokens_per_second"].items()
        }
        result["flop_ratio_to_transformer"] = result["training_flops_per_token"] / base["training_flops_per_token"]
    return results


HEADER = ("model", "parameters", "tokens/s best", "median", "of Transformer (median)", "FLOPs/token vs Transformer",
          "GFLOP/s (median)", "peak memory")  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = []
    for name, result in report["models"].items():
        if "error" in result:
            rows.append([name, f"failed: {result['error']}", *[""] * (len(HEADER) - 2)])
            continue
        rate, flop = result["tokens_per_second"], result["flops_per_second"]
        ratio, cost = result.get("ratio_to_transformer"), result.get("flop_ratio_to_transformer")
        compared = [f"{ratio['median']:.3f}", f"{cost:.2f}"] if ratio else ["", ""]
        speeds = [f"{result['parameters']:,}", f"{rate['best']:,.0f}", f"{rate['median']:,.0f}"]
        size = f"{result['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append([name, *speeds, *compared, f"{flop['median'] / 1e9:.1f}", size])
    return (
        f"# Training throughput, {report['date']}\n\n{report['machine']}; {report['setting']}.\n"
        f"Command: `{report['command']}`. Steps of the models alternate; best and median of "
        f"{report['options']['repetitions']}.\n\n{table(HEADER, rows)}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write benchmarks/results/train_throughput_*.json and .md."""
    made = parser(__doc__, Path(__file__).parent / "results", threads=2)
    made.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    made.add_argument("--repetitions", type=int, default=7)
    made.add_argument("--warmup", type=int, default=2)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--autocast", action="store_true", help="matrix products in bfloat16")
    made.add_argument("--overrides", default="{}", help="JSON with HopeConfig fields set for every model")
    options = parse(made, words)
    models = rates(measure(options), options.batch * options.length)
    report = {
        "version": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {options.threads} of {os.cpu_count()} threads, torch {torch.__version__}",
        "setting": f"d 256, 4 layers, 4 heads, T {options.length}, batch {options.batch}, vocabulary 256, "
        f"{'bfloat16 autocast' if options.autocast else 'float32'}, "
        "one step = forward, backward, clipping, AdamW",
        "command": shlex.join(
            ["python", "benchmarks/train_throughput.py", *(sys.argv[1:] if words is None else words)]
        ),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "models": models,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    kind = f"train_throughput_{options.length}{'_bf16' if options.autocast else ''}_"
    name = kind + "".join(c if c.isalnum() else "-" for c in processor().lower()).strip("-")
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    (options.out / f"{name}.md").write_text(markdown(report))
    print("\n" + markdown(report))
    if any("error" in result for result in models.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
