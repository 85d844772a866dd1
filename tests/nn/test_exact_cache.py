"""The exact cache beside a delta memory: equal to a token loop with all gradients, and what it keeps; see also
tests/contracts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import L2, AssociativeMemory, Delta, Gates, Matrix, catalog, scan, scan_with_sizes
from nestlearn.nn import MemoryMixer, MemoryMixerConfig
from nestlearn.nn.state import flatten_state, unflatten_state

CHUNK, SIZE, HEADS, D = 4, 3, 2, 8
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def make(name: str = "gated_deltanet", **changes) -> MemoryMixer:
    """A small float64 layer whose gates differ from token to token."""
    torch.manual_seed(0)
    settings = {"chunk_size": CHUNK, "cache": SIZE, **changes}
    layer = MemoryMixerConfig(name, **settings).build(D, HEADS).double()
    with torch.no_grad():
        assert layer.gates is not None and layer.cache is not None
        layer.gates.weight.normal_()
        layer.cache.log_scale.uniform_(0.5, 1.5)
    return layer


def texts(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop(layer: MemoryMixer, x: Tensor, mask: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """One row ``[t, d]`` token by token from the equations; one memory, one list of kept tokens per head."""
    assert layer.conv is not None and layer.cache is not None and layer.gates is not None
    cache, width = layer.cache, layer.d_head
    logits = {k: z[0] for k, z in layer.gates(x[None]).items()}
    gated = layer.memory.retention.gated
    past, w, kept, chunk, outputs = [], None, None, None, []
    for t in range(len(x)):
        if mask is not None and not mask[t]:
            outputs.append(torch.zeros(HEADS * width, dtype=x.dtype))
            continue
        if w is None or (reset is not None and bool(reset[t])):
            past, w = [], [torch.zeros(width, width, dtype=x.dtype) for _ in range(HEADS)]
            kept, chunk = [[] for _ in range(HEADS)], [[] for _ in range(HEADS)]
        past = [*past, layer.qkv.weight @ x[t]]
        mixed = sum((layer.conv.weight[3 - j] * past[-1 - j] for j in range(min(4, len(past)))), torch.zeros(()))
        q, k, v = F.silu(mixed).view(3, HEADS, width)
        heads = []
        for h in range(HEADS):
            q_h, k_h = (z[h] / (z[h].square().sum() + 1e-6).sqrt() for z in (q, k))
            eta = layer.max_step * torch.sigmoid(logits["lr"][h, t])
            alpha = torch.sigmoid(logits["retain"][h, t]) if "retain" in logits else torch.ones((), dtype=x.dtype)
            p = eta * (v[h] - (alpha if gated else 1) * w[h] @ k_h)
            w[h] = alpha * w[h] + torch.outer(p, k_h)
            chunk[h].append((k_h, v[h], float(p.detach().norm())))
            seen = kept[h] + chunk[h]
            weights = torch.softmax(cache.log_scale[h].exp() * torch.stack([q_h @ key for key, _, _ in seen]), 0)
            read = w[h] @ q_h + weights @ torch.stack([value for _, value, _ in seen])
            heads.append(read / (read.square().mean() + 1e-6).sqrt() * layer.norm.weight)
            if len(chunk[h]) == CHUNK:
                order = sorted(range(len(seen)), key=lambda i, seen=seen: -seen[i][2])
                best = range(len(seen))[-cache.size :] if cache.keep == "recent" else sorted(order[: cache.size])
                kept[h], chunk[h] = [seen[i] for i in best], []
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ layer.out.weight.T


@pytest.mark.parametrize("keep", ["surprise", "recent"])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_equals_the_token_loop_with_all_outer_gradients(name, keep):
    layer, x = make(name, cache_keep=keep), texts(2, 23).requires_grad_()
    inputs = [x, *layer.parameters()]
    weight = texts(2, 23, seed=5)
    y, _ = layer(x)
    expected = torch.stack([loop(layer, row) for row in x])
    torch.testing.assert_close(y, expected, **CLOSE)
    ours, loops = (torch.autograd.grad((z * weight).sum(), inputs) for z in (y, expected))
    for a, b in zip(ours, loops, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert layer.cache is not None and ours[-1].abs().sum() > 0


@pytest.mark.parametrize("sizes", [[23], [5, 5, 5, 8], [3, 1, 9, 10], [1] * 23])
@pytest.mark.parametrize("keep", ["surprise", "recent"])
def test_any_split_with_masks_and_resets_equals_the_token_loop(keep, sizes):
    layer, x = make(cache_keep=keep), texts(3, 23)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 23, generator=generator) > 0.25
    reset = torch.rand(3, 23, generator=generator) > 0.85
    reset[2] = False
    expected = torch.stack([loop(layer, *row) for row in zip(x, mask, reset, strict=True)])
    outputs, state = [], None
    for piece, m, r in zip(x.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1), strict=True):
        y, state = layer(piece, state, m, r)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)


def test_what_comes_later_changes_nothing():
    layer, x = make(), texts(1, 23)
    other = x.clone()
    other[:, 11:] = texts(1, 12, seed=9)
    assert torch.equal(layer(x)[0][:, :11], layer(other)[0][:, :11])
    other[:, 15] = torch.nan
    y, _ = layer(other)
    torch.testing.assert_close(y[:, :11], layer(x)[0][:, :11], **CLOSE)
    assert y[:, 15:].isnan().all()


def test_the_cache_holds_the_tokens_that_wrote_most_since_the_reset():
    layer, x = make(), texts(2, 20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[1, 9] = True
    with torch.no_grad():
        _, state = layer(x, reset=reset)
        assert state is not None and state.cache is not None and layer.cache is not None
        q, k, v, _ = layer._heads(x, None, None, reset)
        gates = layer._gates(x, layer.initial_weights(q), True)
        flags = reset.unsqueeze(1).expand(-1, HEADS, -1)
        _, _, sizes = scan_with_sizes(layer.memory, None, q, k, v, gates, reset=flags)
    for row, first, last in ((0, 0, 20), (1, 9, 17)):  # the second row stands inside a chunk at the end
        for head in range(HEADS):
            best = (sizes[row, head, first:last].topk(SIZE).indices + first).sort().values
            torch.testing.assert_close(state.cache.kept.k[row, :, head], k[row, head, best])
            torch.testing.assert_close(state.cache.kept.v[row, :, head], v[row, head, best])
            torch.testing.assert_close(state.cache.kept.size[row, :, head], sizes[row, head, best])


@pytest.mark.parametrize("objective", [None, L2()])
@pytest.mark.parametrize("to", ["zero", "initial"])
@pytest.mark.parametrize("gated", [False, True])
def test_sizes_are_the_norms_of_the_writes(gated, to, objective):
    """From the weights before and after each token: their difference beyond the decay is one outer product."""
    kinds = {} if objective is None else {"objective": objective}
    memory = AssociativeMemory(Matrix(), retention=Delta(gated=gated), retain_to=to, chunk_size=3, **kinds)
    x = texts(3, 7)
    q, k, v = F.normalize(x, dim=-1)
    lr, retain = (torch.sigmoid(z) for z in texts(2, 7, seed=4)[..., 0])
    initial = {"W": texts(1, D, seed=8)[0]}
    base = initial["W"] if to == "initial" else torch.zeros(D, D, dtype=torch.float64)
    y, end, sizes = scan_with_sizes(memory, None, q, k, v, Gates(lr, retain), initial=initial)
    plain, same = scan(memory, None, q, k, v, Gates(lr, retain), initial=initial)
    torch.testing.assert_close(y, plain, **CLOSE)
    torch.testing.assert_close(end.params["W"], same.params["W"], **CLOSE)
    state, before = None, initial["W"]
    for t in range(7):
        here = slice(t, t + 1)
        gates = Gates(lr[here], retain[here])
        _, state = scan(memory, state, q[here], k[here], v[here], gates, initial=initial)
        write = state.params["W"] - base - retain[t] * (before - base)
        torch.testing.assert_close(write.norm(), sizes[t], **CLOSE)  # keys have norm 1
        before = state.params["W"]


def test_without_writes_nothing_is_kept():
    layer, x = make(), texts(1, 12)
    _, state = layer(x, writes=False)
    assert state is not None and state.cache is not None and not state.cache.kept.size.any()


def test_the_state_is_of_constant_size_and_goes_through_a_file():
    layer = make()
    bytes_of = []
    for tokens in (4, 40):
        _, state = layer(texts(1, tokens))
        tensors, spec = flatten_state(state)
        bytes_of.append(sum(x.untyped_storage().nbytes() for x in tensors.values()))
        again = unflatten_state(tensors, spec)
        x = texts(1, 5, seed=6)
        assert torch.equal(layer(x, state)[0], layer(x, again)[0])
    assert bytes_of[0] == bytes_of[1]


def test_memories_without_the_size_of_a_write_are_refused():
    for name in ("titans", "linear_attention", "hope"):
        with pytest.raises(ValueError, match=f"cache=4 keeps the tokens .* memory='{name}' has no size.*'deltanet'"):
            MemoryMixerConfig(name, cache=4)
    with pytest.raises(ValueError, match="cache_keep"):
        MemoryMixerConfig("deltanet", cache=4, cache_keep="oldest")
    with pytest.raises(ValueError, match="cache"):
        MemoryMixerConfig("deltanet", cache=-1)
    x, gates = torch.ones(1, 2, 3), Gates(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no size of a single write"):
        scan_with_sizes(catalog["linear_attention"], None, x, x, x, gates)
