"""What every layer of `nestlearn.nn` keeps to as it reads a stream. A new layer is one line in `LAYERS`.

Their formulas and settings are tested in tests/nn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.test_miras_mixer import MEMORIES
from torch import Tensor, nn

from nestlearn.memory import catalog
from nestlearn.nn import (
    AttentionConfig,
    ContinuumMemory,
    FeedForward,
    Level,
    MemoryMixer,
    MemoryMixerConfig,
    MixerConfig,
    PMIConfig,
    SelfModifyingConfig,
    SelfModifyingTitans,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TNTConfig,
)
from nestlearn.nn.cms.local import LocalLevel
from nestlearn.nn.state import index_rows, map_tensors, reset_rows, tensors_of

D, HEADS = 8, 2
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
# Layers that run a memory in their own way meet one memory of each kind; the others of the catalog are slow tests.
KINDS = ("deltanet", "titans", "hope", "yaad")
SMALL: dict[str, Any] = {"expansion": 2, "chunk_size": 4}
BARE: dict[str, Any] = {"persistent_tokens": 0, "conv_size": 0}

LAYERS: dict[str, MixerConfig | Callable[[], nn.Module]] = {
    "attention": AttentionConfig(conv_size=4),
    "attention window": AttentionConfig(window=4),
    "attention persistent": AttentionConfig(window=4, conv_size=4, persistent_tokens=2),
    "feed-forward": lambda: FeedForward(D, 2),
    "pmi": PMIConfig(slots=3, topk=2, segments=2, chunk_size=5),
    "pmi sum": PMIConfig(slots=3, topk=3, segments=2, chunk_size=4, merge="sum", conv_size=0),
    "pmi working": PMIConfig(slots=3, topk=2, chunk_size=3, long_term="none"),
    "self-modifying": SelfModifyingConfig(projection_chunk_size=8, **SMALL),
    "self-modifying matrix": SelfModifyingConfig("matrix", chunk_size=4),
    "levels": lambda: ContinuumMemory(D, [Level(2, 1), Level(3, 2), Level(7, 1), Level(None, 1)], "swiglu"),
    "levels delta": lambda: ContinuumMemory(D, [Level(2, 2, rule="delta"), Level(4, 2)], "gelu"),
    **{f"mixer {name}": MemoryMixerConfig(name, output_gate=True, learn_initial=True, **SMALL) for name in catalog},
    **{
        f"mixer {name}": MemoryMixerConfig(memory, chunk_size=4, learn_initial=True)
        for name, memory in MEMORIES.items()
        if name not in catalog
    },
    "mixer with a cache": MemoryMixerConfig("gated_deltanet", chunk_size=4, cache=3, learn_initial=True),
    "mixer with recent tokens": MemoryMixerConfig("deltanet", chunk_size=4, cache=5, cache_keep="recent"),
    **{f"mac {name}": TitansMACConfig(name, segment_length=5, persistent_tokens=3, **SMALL) for name in catalog},
    "mac bare": TitansMACConfig(segment_length=5, **SMALL, **BARE),
    "mag bare": TitansMAGConfig(window=4, **SMALL, **BARE),
    "mal bare": TitansMALConfig(window=4, **SMALL, **BARE),
    **{
        f"{kind} {name}": config(name, window=4, persistent_tokens=3, **SMALL)
        for kind, config in (("mag", TitansMAGConfig), ("mal", TitansMALConfig))
        for name in ("titans", "deltanet")
    },
    **{
        f"hierarchy {name}": TNTConfig(name, expansion=2, chunk_size=5, local_windows=(4, 6), local_chunk_sizes=(2, 3))
        for name in catalog
    },
}
SLOW = {name for name in LAYERS if name.startswith(("mac ", "hierarchy ")) and name.split()[1] not in ("bare", *KINDS)}
# Memories outside the catalog; tests/memory has the same properties of them without a layer.
SLOW |= {f"mixer {name}" for name in MEMORIES if name not in (*catalog, "channels", "orthogonal")}
# Their states hold what they have read: keys and values of every token, or of as many as a window holds by now.
KEEP_TOKENS = {name for name in LAYERS if name.split()[0] in ("attention", "mag", "mal")}


def layers(*without: str) -> pytest.MarkDecorator:
    names = [name for name in LAYERS if name not in without]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]
    )


@torch.no_grad()
def make(name: str) -> Any:
    """A small float64 layer whose gates differ from token to token, and whose norms and levels matter."""
    torch.manual_seed(0)
    entry = LAYERS[name]
    layer = (entry.build(D, HEADS) if isinstance(entry, MixerConfig) else entry()).double()
    for module in layer.modules():
        if isinstance(module, MemoryMixer) and module.gates is not None:
            module.gates.weight.normal_()
        elif isinstance(module, LocalLevel):
            module.value.normal_()
            module.gate.weight.normal_()
            module.keep.logit.fill_(1.0)  # pyright: ignore[reportOptionalMemberAccess]
        elif isinstance(module, SelfModifyingTitans):
            module.alpha_bias.fill_(2.0)
            for vector in (module.alpha_vector, module.eta_vector, module.eta_bias):
                vector.normal_()
        elif isinstance(module, nn.RMSNorm):
            module.weight.uniform_(0.5, 1.5)
    return layer


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(
    layer: Any, x: Tensor, sizes: list[int], mask: Tensor | None = None, reset: Tensor | None = None, state: Any = None
) -> tuple[Tensor, Any]:
    """The layer over pieces of these sizes."""
    outputs, flags = [], [z if z is None else z.split(sizes, 1) for z in (mask, reset)]
    for i, piece in enumerate(x.split(sizes, 1)):
        y, state = layer(piece, state, *(z if z is None else z[i] for z in flags))
        outputs.append(y)
    return torch.cat(outputs, 1), state


def documents(mask: Tensor, reset: Tensor) -> list[list[int]]:
    """Places of the tokens of each document of one row; a reset at a masked token is none."""
    found: list[list[int]] = [[]]
    for t in mask.nonzero().flatten().tolist():
        if reset[t]:
            found.append([])
        found[-1].append(t)
    return found


@layers()
def test_any_split_equals_one_call(name: str) -> None:
    layer, x = make(name), tokens(2, 19)
    whole, _ = layer(x)
    with torch.inference_mode():
        for sizes in ([5, 5, 5, 4], [3, 1, 9, 6], [1] * 19):
            torch.testing.assert_close(run(layer, x, sizes)[0], whole, **CLOSE)


@layers()
def test_padding_phases_and_resets_equal_separate_runs(name: str) -> None:
    layer, x, more = make(name), tokens(4, 22), tokens(4, 7, seed=6)
    mask = torch.ones(4, 22, dtype=torch.bool)
    mask[0, :7] = False  # left padding
    mask[1, 15:] = False  # right padding
    mask[2, 5:9] = False  # a hole
    mask[3] = torch.rand(22, generator=torch.Generator().manual_seed(4)) > 0.4
    x = torch.where(mask.unsqueeze(-1), x, float("nan"))
    reset = torch.zeros_like(mask)
    # Several resets in one segment, at a segment's first token, and at a masked token (without effect).
    for row, places in enumerate([(18,), (3, 4, 11), (6, 12, 14, 15), (9, 10, 11, 12)]):
        reset[row, list(places)] = True
    with torch.inference_mode():
        expected, later = torch.zeros_like(x), torch.zeros_like(more)
        for row in range(4):
            here, last = slice(row, row + 1), x[row : row + 1, :0]
            for document in filter(None, documents(mask[row], reset[row])):
                last = x[here, document]
                expected[here, document] = layer(last)[0]
            later[here] = layer(torch.cat([last, more[here]], 1))[0][:, -7:]
        for sizes in ([22], [2, 3, *[1] * 9, 8]):
            y, state = run(layer, x, sizes, mask, reset)
            if name != "feed-forward":  # keeps nothing, so it gives a masked token whatever it computes
                assert (y[~mask] == 0).all()
            torch.testing.assert_close(y[mask], expected[mask], **CLOSE)
            # Rows stand at different phases: going on equals each row alone.
            torch.testing.assert_close(layer(more, state)[0], later, **CLOSE)


@pytest.mark.parametrize("flagged", [False, True])
@layers()
def test_future_tokens_and_other_rows_change_no_bit(name: str, flagged: bool) -> None:
    layer, values = make(name).float(), (3.0, 1e30, float("nan"), float("inf"))
    # The first row stays as it is; of two others for each value, one gets it at token 8 and one from there on.
    x = tokens(1, 13).float().repeat(1 + 2 * len(values), 1, 1)
    flags = {"mask": torch.ones(x.shape[:2], dtype=torch.bool)} if flagged else {}
    changed = x.clone()
    for i, value in enumerate(values):
        changed[1 + 2 * i, 8] = changed[2 + 2 * i, 8:] = value
    before, after = layer(x, **flags)[0], layer(changed, **flags)[0]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[:, :8], before[:, :8])
    for row in range(1, len(x)):
        assert not torch.equal(after[row, 8:], before[row, 8:])


@layers("feed-forward")
def test_a_reset_cures_a_poisoned_row(name: str) -> None:
    layer, x = make(name), tokens(2, 12)
    poisoned = x.clone()
    poisoned[0, 3] = float("nan")
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    fresh, other = layer(x[:1, 6:])[0], layer(x[1:])[0]
    for sizes in ([12], [5, 7], [6, 6]):
        y, _ = run(layer, poisoned, sizes, reset=reset)
        assert y[0, 3].isnan().all()
        torch.testing.assert_close(y[:1, 6:], fresh, **CLOSE)
        torch.testing.assert_close(y[1:], other, **CLOSE)


@layers()
def test_rows_of_a_state_can_be_reordered_and_start_anew(name: str) -> None:
    layer, x, more = make(name), tokens(3, 7), tokens(3, 6, seed=2)
    y, state = layer(x)
    shapes: list[torch.Size] = []
    map_tensors(lambda t: shapes.append(t.shape) or t, state)
    assert all(shape[0] == 3 for shape in shapes) and bool(shapes) == (name != "feed-forward")
    order = torch.tensor([2, 0, 0])
    expected = layer(torch.cat([x, more], 1))[0][:, 7:]
    torch.testing.assert_close(layer(more[order], index_rows(state, order))[0], expected[order], **CLOSE)
    if name not in KEEP_TOKENS:
        _, fresh = layer(x, mask=torch.zeros(3, 7, dtype=torch.bool))
        y, _ = layer(more, reset_rows(state, fresh, torch.tensor([False, True, False])))
        torch.testing.assert_close(y[1:2], layer(more[1:2])[0], **CLOSE)
        torch.testing.assert_close(y[::2], expected[::2], **CLOSE)


@layers("attention")
def test_the_state_does_not_grow(name: str) -> None:
    layer, sizes, state = make(name), [], None
    for _ in range(4):
        _, state = layer(tokens(2, 5), state)
        sizes.append([x.shape for x in tensors_of(state)])
    assert sizes[1] == sizes[-1]


@layers()
def test_no_state_when_none_is_asked_for(name: str) -> None:
    layer, x = make(name), tokens(2, 13)
    y, state = layer(x, return_state=False)
    assert state is None
    assert torch.equal(y, layer(x)[0])


@layers()
def test_every_parameter_gets_an_outer_gradient(name: str) -> None:
    layer, x = make(name), tokens(2, 21).requires_grad_()
    y, _ = layer(x)
    (y * tokens(2, 21, seed=3)).sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
@layers()
def test_low_precision_inputs_keep_wide_fast_weights(name: str, autocast: bool) -> None:
    layer, x = make(name).float(), tokens(2, 9).float()
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = run(layer, x, [4, 5])
    assert y.dtype == torch.bfloat16 or (autocast and y.dtype == torch.float32)
    assert y.isfinite().all()
    fast = [t for t in tensors_of(state) if t.is_floating_point() and t.dtype != torch.bfloat16]
    assert {t.dtype for t in fast} <= {torch.float32}
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@layers("feed-forward")
def test_bad_inputs_are_refused(name: str) -> None:
    layer = make(name)
    with pytest.raises(ValueError, match="tokens >= 1"):
        layer(torch.zeros(1, 0, D).double())
    with pytest.raises(ValueError, match="expected x"):
        layer(torch.zeros(1, 3, D + 1).double())
    with pytest.raises(TypeError, match=r"not token ids|floating"):
        layer(torch.zeros(1, 3, D, dtype=torch.long))
