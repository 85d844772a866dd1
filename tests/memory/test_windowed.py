"""The Omega rule (NL Eq. 68): the last tokens written together, against a loop of its own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Delta,
    Gates,
    Huber,
    Matrix,
    Momentum,
    absorb,
    catalog,
    has_write_sizes,
    scan,
    surprise,
)
from nestlearn.memory.contract import check_contract

ROWS, TOKENS, D, HIDDEN = 3, 23, 4, 8
SHAPES = {"in": (HIDDEN, D), "out": (D, HIDDEN)}


def normal(*shape: int, seed: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves() -> dict[str, Tensor]:
    made = {name: normal(ROWS, TOKENS, D, seed=seed) for seed, name in enumerate("qkv")}
    made |= {name: normal(ROWS, *shape, seed=9 + shape[0]) for name, shape in SHAPES.items()}
    made["lr"] = 0.1 * torch.sigmoid(normal(ROWS, TOKENS, seed=5))
    made["retain"] = torch.sigmoid(normal(ROWS, TOKENS, seed=6) + 3)
    return {name: x.requires_grad_() for name, x in made.items()}


def flags(kind: str) -> tuple[Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(8)
    mask = torch.rand(ROWS, TOKENS, generator=generator) > 0.3
    reset = torch.rand(ROWS, TOKENS, generator=generator) < 0.15
    return (mask if kind in ("mask", "both") else None), (reset if kind in ("reset", "both") else None)


def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return x + w["out"] @ F.gelu(w["in"] @ x)


def written(given: dict[str, Tensor], window: int, chunk: int, read: str, mask, reset) -> Tensor:
    """``W_t = α_t W_{t-1} - Σ_{i=t-c+1..t} η_i ∇ ½‖M(k_i) - v_i‖²``, token by token, without padding."""
    outputs = []
    for row in range(ROWS):
        start = {name: given[name][row] for name in SHAPES}
        w, anchor, past = start, start, []
        for t in range(TOKENS):
            if mask is not None and not mask[row, t]:
                outputs.append(torch.zeros(D, dtype=torch.float64))
                continue
            if reset is not None and reset[row, t]:
                w, past = start, []
            if len(past) % chunk == 0:
                anchor = w
            past = [*past, t]
            loss = sum(
                given["lr"][row, i] * 0.5 * (network(anchor, given["k"][row, i]) - given["v"][row, i]).square().sum()
                for i in past[-window:]
            )
            # Leaves of their own: step sizes and tokens are constants of the inner gradient only.
            slopes = torch.autograd.grad(loss, list(anchor.values()), create_graph=True)
            w = {name: given["retain"][row, t] * w[name] - g for name, g in zip(w, slopes, strict=True)}
            outputs.append(network(w if read == "token" else anchor, given["q"][row, t]))
    return torch.stack(outputs).view(ROWS, TOKENS, D)


def scanned(given: dict[str, Tensor], memory: AssociativeMemory, mask, reset, engine: str, splits=()) -> Tensor:
    start = {name: given[name] for name in SHAPES}
    state = memory.init_state((ROWS,), D, D, params=start, dtype=torch.float64)
    outputs = []
    for first, last in itertools.pairwise((0, *splits, TOKENS)):
        q, k, v, lr, retain = (given[name][:, first:last] for name in ("q", "k", "v", "lr", "retain"))
        part = {name: None if x is None else x[:, first:last] for name, x in (("mask", mask), ("reset", reset))}
        y, state = scan(memory, state, q, k, v, Gates(lr, retain), initial=start, engine=engine, **part)  # type: ignore[arg-type]
        outputs.append(y)
    assert state.recent is None or state.recent.shape == (ROWS, memory.window - 1, 2 * D + 2)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", ["none", "mask", "reset", "both"])
@pytest.mark.parametrize(
    ("window", "chunk", "read"), [(1, 4, "token"), (3, 1, "token"), (4, 3, "token"), (30, 5, "chunk")]
)
def test_equals_the_written_rule_with_all_outer_gradients(kind: str, window: int, chunk: int, read: str):
    memory = replace(catalog["omega"], architecture=MLP(2), window=window, chunk_size=chunk, read=read)
    given, (mask, reset) = leaves(), flags(kind)
    weight = normal(ROWS, TOKENS, D, seed=7)
    expected = written(given, window, chunk, read, mask, reset)
    wanted = torch.autograd.grad((expected * weight).sum(), list(given.values()), allow_unused=True)
    for engine, splits in (("reference", ()), ("chunked", ()), ("chunked", (1, 2, 9, 17))):
        y = scanned(given, memory, mask, reset, engine, splits)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        for got, want in zip(torch.autograd.grad((y * weight).sum(), list(given.values())), wanted, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "memory",
    [
        replace(catalog["deltanet"], window=3),
        AssociativeMemory(Matrix(), Huber("norm"), window=5, step_size="proximal"),
        AssociativeMemory(MLP(2), L2(), Delta(), window=2, step_size="proximal", retain_to="initial"),
        replace(catalog["moneta"], window=3, read="chunk"),
    ],
    ids=str,
)
def test_the_contract_holds_with_other_parts(memory: AssociativeMemory):
    check_contract(memory)


def test_a_window_writes_a_token_again_until_it_is_left():
    """After c tokens of step 0 for themselves, a token has been written c times and no more."""
    memory = AssociativeMemory(Matrix(), window=3)
    k = torch.eye(6, dtype=torch.float64)
    gates = Gates(torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.ones(6))
    for tokens, times in ((1, 1), (2, 2), (3, 3), (4, 3), (6, 3)):
        _, state = scan(memory, None, *(k[:tokens] for _ in range(3)), gates.map(lambda g, n=tokens: g[:n].double()))
        assert state.params["W"][0, 0] == times


def test_a_padded_token_may_hold_anything():
    memory, mask = replace(catalog["omega"], architecture=MLP(2), window=3), torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[1, 5:9] = False
    given = {name: x.detach() for name, x in leaves().items()}
    clean = scanned(given, memory, mask, None, "chunked")
    spoiled = given | {"k": torch.where(mask[..., None], given["k"], torch.nan)}
    assert torch.equal(scanned(spoiled, memory, mask, None, "chunked"), clean)


def test_what_cannot_work_is_refused():
    for window in (0, True, 2.0):
        with pytest.raises(ValueError, match="positive number of tokens, 1 for the ordinary rule"):
            AssociativeMemory(window=window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"as momentum does, and Momentum\(\).*Use Descent"):
        AssociativeMemory(algorithm=Momentum(), window=2)
    memory = replace(catalog["deltanet"], window=2)
    assert not has_write_sizes(memory) and has_write_sizes(catalog["deltanet"])
    state, k, one = memory.init_state((), D, D), torch.ones(1, D), torch.ones(1)
    with pytest.raises(ValueError, match="writes tokens of earlier chunks again; use scan"):
        absorb(memory, state, surprise(memory, state.anchor, k, k), Gates(one, one))
