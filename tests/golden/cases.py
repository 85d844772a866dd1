"""Small runs whose losses are recorded in `losses.json`: a refactoring must give the same numbers.

    python -m tests.golden.cases            # compare with the record
    python -m tests.golden.cases --write    # replace the record; say in CHANGELOG.md why the numbers changed

A run is five training steps in float64 on one thread. The batch has a padded row and a document that starts in the
middle of a row. The last number is the loss of the trained model on a text that is read in three pieces with a cache.
Only the public API is used.

Weights do not come from the constructors' random draws, whose order is no promise: each is drawn anew from its shape
and its number among the parameters of that shape. A renamed parameter changes nothing.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM, Level, MemorySession, stack_levels
from nestlearn.data import byte_tokenizer
from nestlearn.memory import catalog
from nestlearn.optim import DGD, M3, param_groups

RECORD = Path(__file__).with_name("losses.json")
STEPS, VOCABULARY, START = 5, 50, 1

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": START,
    "eos_token_id": None,
    "pad_token_id": 0,
    "reset_token_id": START,
}
MEMORY: dict[str, Any] = {"expansion": 2, "chunk_size": 4}
MIXERS: dict[str, dict[str, Any]] = {
    "self_modifying": MEMORY | {"architecture": "mlp", "projection_chunk_size": 8},
    "memory": MEMORY,
    "attention": {},
    "titans_mac": MEMORY | {"segment_length": 6, "persistent_tokens": 2},
    "titans_mag": MEMORY | {"window": 5, "persistent_tokens": 2},
    "titans_mal": MEMORY | {"window": 5, "persistent_tokens": 2},
    "pmi": {"slots": 3, "topk": 2, "segments": 2, "chunk_size": 4},
    "tnt": {"expansion": 2, "chunk_size": 8, "local_windows": [4, 8], "local_chunk_sizes": [2, 4]},
}
FAST = [{"period": 6, "expansion": 0.5}, {"expansion": 2}]
RULES = [{"period": 3, "rank": 2, "rule": "momentum"}, {"period": 6, "expansion": 1, "rule": "delta"}, {"expansion": 1}]
NESTED = [{"period": 3, "expansion": 0.5}, {"period": 6, "expansion": 1, "rule": "momentum"}]
FROZEN = [{"period": None, "expansion": 3}]
MATRIX = {"architecture": "matrix", "expansion": None, "projection_chunk_size": None}
MIXED = [{"type": "memory", "memory": "deltanet"} | MEMORY, {"type": "attention", "conv_size": 4}]


def families() -> dict[str, tuple[str, dict[str, Any]]]:
    """``{name: (preset, what differs from it)}``: every preset family, mixer and kind of level."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "hope-tiny": ("hope-tiny", {"cms": FAST}),
        "hope-matrix": ("hope-tiny", {"cms": FAST, "mixer": MATRIX}),
        "hope-paper": ("hope-paper", {"cms": RULES}),
        "hope-normalized": (
            "hope-tiny",
            {"cms": FROZEN, "mixer": {"step_size": {"in": "normalized", "out": "proximal"}}},
        ),
        "hope-given-values": ("hope-tiny", {"cms": FROZEN, "mixer": {"self_values": False, "delta": False}}),
        "hope-attention": ("hope-attention-tiny", {"cms": FAST}),
        "hope-nested": ("hope-attention-tiny", {"cms": NESTED, "cms_variant": "nested"}),
        "hope-independent": ("hope-attention-tiny", {"cms": FAST, "cms_variant": "independent"}),
        "hope-loss": ("hope-attention-tiny", {"cms": FAST, "cms_signal": "loss"}),
        "hope-loss-second": ("hope-attention-tiny", {"cms": FAST, "cms_signal": "loss", "cms_meta": "second"}),
        "transformer": ("transformer-tiny", {"cms": FROZEN}),
        "sliding": ("transformer-tiny", {"cms": FROZEN, "mixer": {"window": 5}}),
        "tnt": ("titans-tiny", {"cms": FROZEN, "mixer": {"type": "tnt"}}),
        "pmi": ("transformer-tiny", {"cms": FROZEN, "mixer": {"type": "pmi"}}),
        "mixed": ("hope-tiny", {"cms": FAST, "mixer": MIXED}),
    }
    found |= {name: (f"{name}-tiny", {"cms": FROZEN}) for name in ("titans-mac", "titans-mag", "titans-mal")}
    return found | {f"memory-{name}": ("titans-tiny", {"cms": FROZEN, "mixer": {"memory": name}}) for name in catalog}


def set_weights(model: nn.Module) -> None:
    """Matrices become noise of scale ``1/√in``; vectors and scalars keep their value, with some noise added."""
    seen: Counter[tuple[int, ...]] = Counter()
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            seen[shape] += 1
            generator = torch.Generator().manual_seed(seen[shape] + 1000 * sum(n * 7**i for i, n in enumerate(shape)))
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(shape[-1]))


def built(preset: str, fields: dict[str, Any]) -> HopeForCausalLM:
    """The model of a run."""
    mixer = fields.get("mixer", {})
    if isinstance(mixer, dict):
        kind = mixer.get("type", HopeConfig.from_preset(preset).mixers[0].type)
        mixer = MIXERS[kind] | mixer
    model = HopeForCausalLM(HopeConfig.from_preset(preset, **(SMALL | fields | {"mixer": mixer}))).double()
    set_weights(model)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels of three rows: a plain one, one padded left, one with a second document."""
    ids = torch.randint(3, VOCABULARY, (3, 22), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[1, :5], ids[2, 9] = 0, START
    return ids, mask, ids.masked_fill(mask == 0, -100)


def train(model: HopeForCausalLM, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses of all steps, and that of a text read in pieces afterwards."""
    ids, mask, labels = batch()
    losses = []
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, read_in_pieces(model.eval(), ids)]


def read_in_pieces(model: HopeForCausalLM, ids: Tensor) -> float:
    """The mean next-token loss of a text that is read in three calls with one cache."""
    cache = HopeCache()
    with torch.no_grad():
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([7, 13, 2], 1)], 1)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def with_adamw(preset: str, fields: dict[str, Any]) -> list[float]:
    model = built(preset, fields)
    return train(model, AdamW(model.parameters(), lr=0.01))


def with_m3() -> list[float]:
    model = built("hope-tiny", {"cms": FAST})
    return train(model, M3(param_groups(model, lr=0.02, adamw_lr=0.01), slow_period=2))


def with_dgd() -> list[float]:
    model = built("transformer-tiny", {"cms": FROZEN, "tie_word_embeddings": False})
    return train(model, DGD(param_groups(model, lr=0.05, adamw_lr=0.01), model))


def stacked() -> list[float]:
    """Bits per byte of every segment that a stacked Llama reads, with and without what it wrote."""
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = stack_levels(LlamaForCausalLM(config).double(), [Level(16, lr=20, rank=2), Level(32, lr=20)], mode="split")
    set_weights(model.eval())  # after stacking: the maps of low rank begin at random too
    report = MemorySession(model, byte_tokenizer(), compare="off").read("What is read once may be known later. " * 4)
    return [figure for segment in report.segments for figure in (segment.nats, segment.off or 0.0)]


def runs() -> dict[str, Callable[[], list[float]]]:
    """Every recorded run by name."""
    found: dict[str, Callable[[], list[float]]] = {
        name: lambda preset=preset, fields=fields: with_adamw(preset, fields)
        for name, (preset, fields) in families().items()
    }
    return found | {"m3": with_m3, "dgd": with_dgd, "stacked": stacked}


def largest_difference(found: list[float], recorded: list[float]) -> float:
    """Relative; infinite where the numbers are not finite or not as many."""
    if len(found) != len(recorded) or not all(map(math.isfinite, found)):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(found, recorded, strict=True))


def _compared() -> Iterator[str]:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, run in runs().items():
        yield f"{largest_difference(run(), record.get(name, [])):.1e}  {name}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--write" in sys.argv[1:]:
        found = {name: run() for name, run in runs().items()}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(losses)}" for name, losses in found.items())
        RECORD.write_text(f"{{\n{lines}\n}}\n")
    else:
        for line in _compared():
            sys.stdout.write(line + "\n")
