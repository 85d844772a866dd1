"""Associative memories contain the sequence layers of the literature: each is written out here on its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import L2, MLP, AssociativeMemory, Delta, Gates, Matrix, Momentum, catalog, scan
from nestlearn.memory.objectives import needs_threshold

ROWS, TOKENS, D = 2, 37, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (normal(ROWS, TOKENS, D, seed=s) for s in range(3))
KEYS = F.normalize(K, dim=-1)
RATE = torch.sigmoid(normal(ROWS, TOKENS, seed=3))
KEEP = torch.sigmoid(normal(ROWS, TOKENS, seed=4) + 2)
CARRY = 0.8 * torch.sigmoid(normal(ROWS, TOKENS, seed=5))
ONE, ZERO = torch.ones(ROWS, TOKENS, dtype=torch.float64), torch.zeros(ROWS, TOKENS, dtype=torch.float64)

ENGINES = pytest.mark.parametrize("engine", ["reference", "chunked"])
CHUNKS = pytest.mark.parametrize("chunk", [1, 5, 64])


def run(memory: AssociativeMemory, gates: Gates, engine="chunked", params=None, q=Q, k=K, v=V, **options):
    state = memory.init_state((ROWS,), D, D, params=params, dtype=torch.float64)
    return scan(memory, state, q, k, v, gates, initial=state.params, engine=engine, **options)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def loop(step, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Answers ``W_t q_t`` and the last weights of ``W_t = step(W_{t-1}, t)``."""
    outputs = []
    for t in range(TOKENS):
        weights = step(weights, t)
        outputs.append((weights @ Q[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), weights


EMPTY = torch.zeros(ROWS, D, D, dtype=torch.float64)


@ENGINES
@CHUNKS
def test_linear_attention_is_a_hebbian_memory(engine: str, chunk: int):
    y, state = run(replace(catalog["linear_attention"], chunk_size=chunk), Gates(ONE, ONE), engine)
    close(y, (Q @ K.mT).tril() @ V)
    close(state.params["W"], V.mT @ K)


@ENGINES
@CHUNKS
def test_retnet_is_a_hebbian_memory_with_constant_decay(engine: str, chunk: int):
    gamma = 0.9
    y, _ = run(replace(catalog["retnet"], chunk_size=chunk), Gates(ONE, gamma * ONE), engine)
    t = torch.arange(TOKENS)
    decay = torch.where(t[:, None] >= t, gamma ** (t[:, None] - t).double(), 0)
    close(y, (Q @ K.mT * decay) @ V)


@ENGINES
@CHUNKS
def test_deltanet_in_two_ways(engine: str, chunk: int):
    """L2 with chunks of one token equals the dot product with delta retention and any chunk."""

    def step(w: Tensor, t: int) -> Tensor:
        key, eta = KEYS[:, t], RATE[:, t, None, None]
        return w - eta * outer((w @ key.unsqueeze(-1)).squeeze(-1) - V[:, t], key)

    expected, last = loop(step, EMPTY)
    gates = Gates(RATE, ONE)
    y, state = run(replace(catalog["deltanet"], chunk_size=chunk), gates, engine, k=KEYS)
    close(y, expected)
    close(state.params["W"], last)
    y, state = run(AssociativeMemory(Matrix(), L2(), chunk_size=1), gates, engine, k=KEYS)
    close(y, expected)
    close(state.params["W"], last)


@ENGINES
@CHUNKS
def test_gated_deltanet(engine: str, chunk: int):
    eye = torch.eye(D, dtype=torch.float64)

    def step(w: Tensor, t: int) -> Tensor:
        key, eta = KEYS[:, t], RATE[:, t, None, None]
        return KEEP[:, t, None, None] * w @ (eye - eta * outer(key, key)) + eta * outer(V[:, t], key)

    expected, last = loop(step, EMPTY)
    y, state = run(replace(catalog["gated_deltanet"], chunk_size=chunk), Gates(RATE, KEEP), engine, k=KEYS)
    close(y, expected)
    close(state.params["W"], last)


@ENGINES
@CHUNKS
def test_oja(engine: str, chunk: int):
    values = F.normalize(V, dim=-1)

    def step(w: Tensor, t: int) -> Tensor:
        held = (w.mT @ values[:, t, :, None]).squeeze(-1)
        return KEEP[:, t, None, None] * w + RATE[:, t, None, None] * outer(values[:, t], KEYS[:, t] - held)

    expected, last = loop(step, EMPTY)
    y, state = run(replace(catalog["oja"], chunk_size=chunk), Gates(RATE, KEEP), engine, k=KEYS, v=values)
    close(y, expected)
    close(state.params["W"], last)


@ENGINES
def test_oja_is_the_delta_rule_with_keys_and_values_exchanged(engine: str):
    values = F.normalize(V, dim=-1)
    _, oja = run(catalog["oja"], Gates(RATE, ONE), engine, k=KEYS, v=values)
    _, delta = run(catalog["deltanet"], Gates(RATE, ONE), engine, k=values, v=KEYS)
    close(oja.params["W"], delta.params["W"].mT)


@ENGINES
@CHUNKS
def test_ttt_linear_descends_from_the_chunk_anchor(engine: str, chunk: int):
    anchor = 0.3 * normal(ROWS, D, D, seed=6)

    def step(w: Tensor, t: int) -> Tensor:
        nonlocal anchor
        anchor = w if t % chunk == 0 else anchor
        error = (anchor @ KEYS[:, t, :, None]).squeeze(-1) - V[:, t]
        return w - RATE[:, t, None, None] * outer(error, KEYS[:, t])

    expected, last = loop(step, anchor)
    memory = replace(catalog["ttt_linear"], chunk_size=chunk)
    y, state = run(memory, Gates(RATE, ONE), engine, {"W": 0.3 * normal(ROWS, D, D, seed=6)}, k=KEYS)
    close(y, expected)
    close(state.params["W"], last)


@ENGINES
@CHUNKS
def test_titans_by_hand(engine: str, chunk: int):
    """Titans Eq. 9-14 on a two-layer memory, the gradient written out by the chain rule."""
    hidden = 2 * D
    w1, w2 = 0.4 * normal(ROWS, hidden, D, seed=6), 0.4 * normal(ROWS, D, hidden, seed=7)
    params = {"in": w1, "out": w2}
    s1, s2, rate, outputs = torch.zeros_like(w1), torch.zeros_like(w2), 0.1 * RATE, []
    for t in range(TOKENS):
        if t % chunk == 0:
            a1, a2 = w1, w2
        x, theta = KEYS[:, t, :, None], rate[:, t, None, None]
        z = a1 @ x
        density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
        cumulative = (1 + torch.erf(z / 2**0.5)) / 2
        h, slope = z * cumulative, cumulative + z * density
        residual = x + a2 @ h - V[:, t, :, None]
        g2, g1 = residual @ h.mT, (slope * (a2.mT @ residual)) @ x.mT
        s1, s2 = (CARRY[:, t, None, None] * s - theta * g for s, g in ((s1, g1), (s2, g2)))
        w1, w2 = (KEEP[:, t, None, None] * w + s for w, s in ((w1, s1), (w2, s2)))
        query = Q[:, t, :, None]
        outputs.append((query + w2 @ F.gelu(w1 @ query)).squeeze(-1))
    memory = replace(catalog["titans"], architecture=MLP(2), chunk_size=chunk)
    y, state = run(memory, Gates(rate, KEEP, CARRY), engine, params, k=KEYS)
    close(y, torch.stack(outputs, 1))
    close(state.params["in"], w1)
    close(state.params["out"], w2)
    assert state.momentum is not None
    close(state.momentum["in"], s1)


@CHUNKS
def test_momentum_is_linear_attention_over_inputs_and_errors(chunk: int):
    """NL Eq. 33-34: the momentum after t tokens is the state of a decayed linear attention with values -eta e."""
    memory = AssociativeMemory(Matrix(), L2(), algorithm=Momentum(), chunk_size=64)
    start = 0.3 * normal(ROWS, D, D, seed=6)
    _, state = run(memory, Gates(RATE, ONE, CARRY), params={"W": start})
    errors = K @ start.mT - V
    _, attention = run(replace(catalog["retnet"], chunk_size=chunk), Gates(ONE, CARRY), v=-RATE[..., None] * errors)
    assert state.momentum is not None
    close(state.momentum["W"], attention.params["W"])


def test_momentum_equals_torch_sgd():
    """One inner sequence is one training run: every token a step of SGD with momentum on the memory's objective."""
    weights = torch.nn.Parameter(0.3 * normal(D, D, seed=6))
    optimizer = torch.optim.SGD([weights], lr=0.05, momentum=0.7)
    for t in range(TOKENS):
        optimizer.zero_grad()
        (0.5 * (weights @ K[0, t] - V[0, t]).square().sum()).backward()
        optimizer.step()
    memory = AssociativeMemory(Matrix(), L2(), algorithm=Momentum(), chunk_size=1)
    gates = Gates(0.05 * ONE, ONE, 0.7 * ONE)
    _, state = run(memory, gates, params={"W": 0.3 * normal(D, D, seed=6)})
    close(state.params["W"][0], weights.detach())


@pytest.mark.parametrize("name", catalog)
@pytest.mark.parametrize("retain_to", ["zero", "initial"])
@ENGINES
def test_nothing_happens_at_retention_one_and_step_zero(name: str, retain_to: str, engine: str):
    memory = replace(catalog[name], chunk_size=8, retain_to=retain_to)  # type: ignore[arg-type]
    fresh = memory.init_state((ROWS,), D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    momentum = ONE if isinstance(memory.algorithm, Momentum) else None
    gates = Gates(ZERO, ONE, momentum, ONE if needs_threshold(memory.objective) else None)
    y, state = scan(memory, fresh, Q, K, V, gates, initial=fresh.params, engine=engine)  # type: ignore[arg-type]
    for key, w in fresh.params.items():
        close(state.params[key], w, 1e-14)
    plain = memory.architecture(lambda key, x: x @ memory.retention.anchored(fresh.params[key]).mT, Q)
    close(y, plain, 1e-13)


@pytest.mark.parametrize("name", catalog)
@ENGINES
def test_masked_tokens_leave_the_state_to_the_bit(name: str, engine: str):
    memory = replace(catalog[name], chunk_size=8)
    momentum = CARRY if isinstance(memory.algorithm, Momentum) else None
    fresh = memory.init_state((ROWS,), D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates = Gates(0.1 * RATE, KEEP, momentum, KEEP if needs_threshold(memory.objective) else None)
    _, before = scan(memory, fresh, Q, KEYS, V, gates, initial=fresh.params, engine=engine)  # type: ignore[arg-type]
    nothing = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for reset in (None, ~nothing):
        y, after = scan(
            memory, before, Q, KEYS, V, gates, initial=fresh.params, mask=nothing, reset=reset, engine=engine
        )  # type: ignore[arg-type]
        assert not y.any() and torch.equal(after.position, before.position)
        for group in ("params", "anchor", "momentum"):
            for key, w in (getattr(before, group) or {}).items():
                assert torch.equal(getattr(after, group)[key], w), (group, key)


@pytest.mark.parametrize("retention", ["decay", "delta", "gated"])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_chunk_size_does_not_matter_to_a_matrix_with_the_dot_product(retention: str, momentum: bool):
    kinds = {"decay": catalog["retnet"], "delta": catalog["deltanet"], "gated": catalog["gated_deltanet"]}
    memory = kinds[retention]
    gates = Gates(0.5 * RATE, KEEP)
    if momentum:
        memory, gates = replace(memory, algorithm=Momentum()), gates._replace(momentum=CARRY)
    expected, state = run(replace(memory, chunk_size=1), gates, k=KEYS)
    for chunk in (2, 7, 16, 64, 192):
        y, end = run(replace(memory, chunk_size=chunk), gates, k=KEYS)
        close(y, expected)
        close(end.params["W"], state.params["W"])


def test_the_chunk_size_matters_to_everything_else():
    """The anchor is part of the function: an L2 or a deep memory reads differently with another chunk."""
    for memory in (catalog["ttt_linear"], replace(catalog["dla"], architecture=MLP(2))):
        params = memory.init_state((), D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).params
        outputs = [run(replace(memory, chunk_size=c), Gates(0.1 * RATE, ONE), params=params)[0] for c in (1, 8)]
        assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)


@CHUNKS
def test_a_chunk_read_answers_from_the_weights_at_the_start_of_the_chunk(chunk: int):
    memory = replace(catalog["deltanet"], chunk_size=chunk)
    y, _ = run(memory, Gates(RATE, KEEP), read="chunk", k=KEYS)
    for t in range(TOKENS):
        first = t // chunk * chunk
        state = memory.init_state((ROWS,), D, D, dtype=torch.float64)
        if first:
            args = (x[:, :first] for x in (Q, KEYS, V))
            _, state = scan(memory, state, *args, Gates(RATE[:, :first], KEEP[:, :first]))
        close(y[:, t], (state.params["W"] @ Q[:, t, :, None]).squeeze(-1))


def test_delta_retention_recalls_what_was_written_last():
    """The delta rule with unit keys and step 1 answers a repeated key with its newest value."""
    memory = AssociativeMemory(Matrix(), retention=Delta(), chunk_size=4)
    keys = torch.eye(D, dtype=torch.float64)[torch.arange(TOKENS) % D].expand(ROWS, TOKENS, D)
    y, _ = run(memory, Gates(ONE, ONE), k=keys, q=keys)
    close(y, V)
    late, _ = run(memory, Gates(ONE, ONE), k=keys, q=keys.roll(1, 1))
    close(late[:, 1:], V[:, :-1])
