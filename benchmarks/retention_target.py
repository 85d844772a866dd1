"""Retention toward zero, as printed, or toward the initial weights: does it train, and how long does a memory last?

    python benchmarks/retention_target.py
    python benchmarks/retention_target.py --steps 400 --lengths 256 4096 --seed 1

Small paper-literal models read the source of this package; the last 256 bytes of longer and longer texts are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import nestlearn
from common import parse, parser, update, windows
from nestlearn import HopeConfig, HopeForCausalLM


def source_text() -> Tensor:
    """The bytes of this package's modules, in order of their names."""
    files = sorted(Path(nestlearn.__file__).parent.rglob("*.py"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in files)))


def train(target: str, text: Tensor, steps: int, seed: int) -> HopeForCausalLM:
    """A model of width 64 after some steps of 4 x 256 bytes."""
    torch.manual_seed(seed)
    levels = [{"period": 64, "expansion": 1}, {"period": 128, "expansion": 1}, {"expansion": 2}]
    config = HopeConfig.from_preset(
        "hope-paper", vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, cms=levels,
        mixer={"chunk_size": 16, "projection_chunk_size": 64, "retain_to": target}, initializer_range=0.05,
    )  # fmt: skip
    model = HopeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        ids = windows(text, 4, 256)
        loss = update(model, model(ids, labels=ids).loss, optimizer)
        if step % 40 == 0:
            print(f"{target}: step {step}, {loss.item() / math.log(2):.2f} bits per byte", flush=True)
    return model.eval()


@torch.no_grad()
def report(target: str, model: HopeForCausalLM, text: Tensor, lengths: list[int]) -> None:
    """Bits per byte of the last 256 bytes, and the norm of the last layer's main memory."""
    for length in lengths:
        ids = text[None, :length]
        output = model(ids, use_cache=True)
        chosen = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-256:]
        weights = output.past_key_values.layers[-1].mixer.memory.params["in"]
        bits = -chosen.mean().item() / math.log(2)
        print(f"{target}: {length} tokens, {bits:.2f} bits per byte, norm {weights.norm().item():.2f}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Train and report every target."""
    made = parser(__doc__)
    made.add_argument("--targets", nargs="+", default=["zero", "initial"])
    made.add_argument("--steps", type=int, default=120)
    made.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    made.add_argument("--seed", type=int, default=0)
    options = parse(made, words)
    text = source_text()
    cut = int(0.9 * len(text))
    for target in options.targets:
        report(target, train(target, text[:cut], options.steps, options.seed), text[cut:], options.lengths)


if __name__ == "__main__":
    main()
