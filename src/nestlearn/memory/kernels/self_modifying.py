"""Self-modifying matrix memories on chip: one Triton program walks the chunks of a row, forward and backward.

The keys of a chunk depend on the fast matrix H at its start, so no two chunks of a row run at once. Here H never leaves
the chip between them. With ``D = H - I``, C the chunk and c its start, for every token t of a chunk:

    k = unit(M_k H_c x^k)      v = unit(M_v H_c x^v)      u = unit(H_c v)      q = unit(x^q)
    eta = max_step sigmoid(m_eta . H_c x^k + b_eta)       alpha = sigmoid(m_alpha . H_c x^k + b_alpha)
    eta' = eta / (1 + eta |k|^2)                          D_t = D_{t-1} (alpha I - eta' k k^T) + eta' u k^T
    y_t = q + D_t q

That is a layer whose keys, values and gates all adapt. Where a stream does not, its ``M H_c`` is left out (MOVE_K,
MOVE_V, MOVE_G), and with given values u is v (OWN).

In matrices, with ``g = cumsum(log alpha)`` in the chunk and ``g_- = g - log alpha``:

    (I + L) W = diag(eta') (U - diag(e^{g_-}) K D_c^T)    L[t, s] = eta'_t e^{g_-[t] - g[s]} k_t . k_s      (s < t)
    Y = Q + diag(e^g) Q D_c^T + P W                       P[t, s] = e^{g[t] - g[s]} q_t . k_s               (s <= t)
    D_{c+1} = e^{g[C]} D_c + (diag(e^{g[C] - g}) W)^T K

Everything is computed in float32; products take their factors in bfloat16 where the tokens have that dtype. The
backward pass keeps D at every chunk's start and computes the rest again.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

EPS = tl.constexpr(1e-6)
"""Added to squared norms, as `nestlearn.memory.kernels.products.unit_norm` does."""


@triton.jit
def _dot(a, b, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """``a b`` in float32, its factors in bfloat16 if NARROW."""
    if NARROW:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _load(streams, t, n, T, d, C: tl.constexpr, D: tl.constexpr, stride_t, stride_n):
    """Stream n of C tokens from t on, ``[C, D]``; zero beyond T and d."""
    rows, columns = t + tl.arange(0, C), tl.arange(0, D)
    at = rows[:, None].to(tl.int64) * stride_t + n * stride_n + columns[None, :]
    return tl.load(streams + at, mask=(rows[:, None] < T) & (columns[None, :] < d), other=0.0).to(tl.float32)


@triton.jit
def _store(streams, x, t, n, T, d, C: tl.constexpr, D: tl.constexpr, stride_t, stride_n):
    rows, columns = t + tl.arange(0, C), tl.arange(0, D)
    at = rows[:, None].to(tl.int64) * stride_t + n * stride_n + columns[None, :]
    tl.store(streams + at, x.to(streams.dtype.element_ty), mask=(rows[:, None] < T) & (columns[None, :] < d))


@triton.jit
def _load_square(matrix, d, D: tl.constexpr):
    """A contiguous ``[d, d]``, zero beyond d."""
    i, j = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    return tl.load(matrix + i * d + j, mask=(i < d) & (j < d), other=0.0).to(tl.float32)


@triton.jit
def _store_square(matrix, x, d, D: tl.constexpr):
    i, j = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    tl.store(matrix + i * d + j, x, mask=(i < d) & (j < d))


@triton.jit
def _inverse(L, C: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + L)^-1`` of a strictly lower-triangular ``[C, C]``: diagonal blocks row by row, then block by block."""
    N: tl.constexpr = C // BLOCK
    block, row = tl.arange(0, N), tl.arange(0, BLOCK)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(L, [N, BLOCK, N, BLOCK]), 0.0), axis=2)  # [N, BLOCK, BLOCK]
    inner = tl.where(row[None, :, None] == row[None, None, :], 1.0, 0.0) + tl.zeros([N, BLOCK, BLOCK], tl.float32)
    for i in range(1, BLOCK):
        here = row[None, :, None] == i
        of_row = tl.sum(tl.where(here, blocks, 0.0), axis=1)
        inner -= tl.where(here, tl.sum(of_row[:, :, None] * inner, axis=1)[:, None, :], 0.0)
    whole = tl.reshape(tl.where(diagonal, tl.expand_dims(inner, 2), 0.0), [C, C])
    if N > 1:
        # (I + L) = (I + diagonal blocks) (I + R), R strictly block-lower: (I + R)^-1 = (I - R)(I + R^2)(I + R^4)...
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        R = tl.dot(whole, tl.where(i // BLOCK > j // BLOCK, L, 0.0), input_precision=PRECISION)
        outer = tl.where(i == j, 1.0, 0.0) - R
        if N > 2:
            R = tl.dot(R, R, input_precision=PRECISION)
            outer += tl.dot(outer, R, input_precision=PRECISION)
        if N > 4:
            R = tl.dot(R, R, input_precision=PRECISION)
            outer += tl.dot(outer, R, input_precision=PRECISION)
        whole = tl.dot(outer, whole, input_precision=PRECISION)
    return whole


@triton.jit
def _unit(x):
    """``x / sqrt(|x|^2 + eps)`` of every row, and one over that norm."""
    scale = tl.rsqrt(tl.sum(x * x, 1) + EPS)
    return x * scale[:, None], scale


@triton.jit
def _unit_back(grad, y, scale):
    return (grad - y * tl.sum(y * grad, 1)[:, None]) * scale[:, None]


@triton.jit
def _moved(x, Dt, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """``H x`` of every row, from ``D^T = H^T - I``."""
    return x + _dot(x, Dt, NARROW, PRECISION)


@triton.jit
def _mapped(x, Dt, Mt, MOVE: tl.constexpr, NEED: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """``H x`` where it is needed, ``unit(M H x)`` (``unit(x)`` if it does not adapt), and one over the norm."""
    moved = x
    if NEED:
        moved = _moved(x, Dt, NARROW, PRECISION)
    y = x
    if MOVE:
        y = _dot(moved, Mt, NARROW, PRECISION)
    y, scale = _unit(y)
    return moved, y, scale


@triton.jit
def _gates(hk, me, ma, be, ba, max_step, real):
    """Step eta and log alpha of every token, with eta / max_step and 1 - alpha; ``hk`` is H x^k, or x^k."""
    sigma = tl.sigmoid(tl.sum(hk * me[None, :], 1) + be)
    logit = tl.sum(hk * ma[None, :], 1) + ba
    log_alpha = tl.where(real, _log_sigmoid(logit), 0.0)
    return tl.where(real, max_step * sigma, 0.0), log_alpha, sigma, tl.sigmoid(-logit)


@triton.jit
def _written(
    k,
    v,
    D,
    Dt,
    eta,
    log_alpha,
    OWN: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk writes, W, with all that leads to it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    step = eta / (1.0 + eta * tl.sum(k * k, 1))
    u, u_scale = v, tl.sum(v, 1)
    if OWN:
        u, u_scale = _unit(_moved(v, Dt, NARROW, PRECISION))
    # Two sums, and not a difference: with gates near 0 it would lose the digits of before[t] = g[t - 1].
    g = tl.sum(tl.where(i >= j, log_alpha[None, :], 0.0), 1)
    before = tl.sum(tl.where(i > j, log_alpha[None, :], 0.0), 1)
    held = _dot(k, Dt, NARROW, PRECISION)
    # Above the diagonal the difference is positive and may overflow: it is cut off before the exponential.
    erase = tl.where(i > j, tl.exp(tl.where(i > j, before[:, None] - g[None, :], 0.0)), 0.0)
    gram = _dot(k, tl.trans(k), NARROW, PRECISION)
    inverse = _inverse(step[:, None] * erase * gram, C, SOLVE, PRECISION)
    rest = u - tl.exp(before)[:, None] * held
    W = tl.dot(inverse, step[:, None] * rest, input_precision=PRECISION)
    decay = tl.where(i >= j, tl.exp(tl.where(i >= j, g[:, None] - g[None, :], 0.0)), 0.0)
    return step, u, u_scale, g, before, held, erase, gram, inverse, rest, W, decay


@triton.jit
def forward_kernel(
    streams,
    y,
    states,
    end,
    start,
    map_k,
    map_v,
    vector_eta,
    vector_alpha,
    bias_eta,
    bias_alpha,
    T,
    H,
    d,
    max_step,
    stride_b,
    stride_t,
    stride_n,
    stride_h,
    N_Q: tl.constexpr,
    N_K: tl.constexpr,
    N_V: tl.constexpr,
    MOVE_K: tl.constexpr,
    MOVE_V: tl.constexpr,
    MOVE_G: tl.constexpr,
    OWN: tl.constexpr,
    C: tl.constexpr,
    D_PAD: tl.constexpr,
    SOLVE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    chunks = tl.cdiv(T, C)
    streams += b * stride_b + h * stride_h
    y += b * T * H * d + h * d
    states += row * chunks * d * d
    Mk = tl.trans(_load_square(map_k + h * d * d, d, D_PAD))
    Mv = tl.trans(_load_square(map_v + h * d * d, d, D_PAD))
    column = tl.arange(0, D_PAD)
    me = tl.load(vector_eta + h * d + column, mask=column < d, other=0.0).to(tl.float32)
    ma = tl.load(vector_alpha + h * d + column, mask=column < d, other=0.0).to(tl.float32)
    be, ba = tl.load(bias_eta + h).to(tl.float32), tl.load(bias_alpha + h).to(tl.float32)
    D = _load_square(start + row * d * d, d, D_PAD)
    for c in range(chunks):
        t = c * C
        _store_square(states + c * d * d, D, d, D_PAD)
        real = t + tl.arange(0, C) < T
        Dt = tl.trans(D)
        xk = _load(streams, t, N_K, T, d, C, D_PAD, stride_t, stride_n)
        xv = _load(streams, t, N_V, T, d, C, D_PAD, stride_t, stride_n)
        hk, k, _ = _mapped(xk, Dt, Mk, MOVE_K, MOVE_K or MOVE_G, NARROW, PRECISION)
        _, v, _ = _mapped(xv, Dt, Mv, MOVE_V, MOVE_V, NARROW, PRECISION)
        of_gates = hk if MOVE_G else xk
        eta, log_alpha, _, _ = _gates(of_gates, me, ma, be, ba, max_step, real)
        _, _, _, g, _, _, _, _, _, _, W, decay = _written(k, v, D, Dt, eta, log_alpha, OWN, C, SOLVE, NARROW, PRECISION)
        q, _ = _unit(_load(streams, t, N_Q, T, d, C, D_PAD, stride_t, stride_n))
        scores = decay * _dot(q, tl.trans(k), NARROW, PRECISION)
        out = q + tl.exp(g)[:, None] * _dot(q, Dt, NARROW, PRECISION) + _dot(scores, W, NARROW, PRECISION)
        _store(y, out, t, 0, T, d, C, D_PAD, H * d, 0)
        last = tl.sum(log_alpha, 0)
        D = tl.exp(last) * D + _dot(tl.trans(tl.exp(last - g)[:, None] * W), k, NARROW, PRECISION)
    _store_square(end + row * d * d, D, d, D_PAD)


@triton.jit
def _limited(grad, limit):
    """A gradient scaled down to the norm ``limit``; 0 if it is not finite."""
    norm = tl.sqrt(tl.sum(grad * grad))
    finite = norm < float("inf")  # False for NaN
    scale = tl.where(finite, tl.minimum(1.0, limit / tl.maximum(norm, 1e-30)), 0.0)
    return tl.where(finite, grad, 0.0) * scale


@triton.jit
def _map_back(grad, more, x, moved, y, scale, M, D, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of ``y = unit(M H x)`` to x, M and D; ``moved`` is H x, and ``more`` what else reaches it."""
    grad = _unit_back(grad, y, scale)
    grad_map = _dot(tl.trans(grad), moved, NARROW, PRECISION)
    through = more + _dot(grad, M, NARROW, PRECISION)
    grad_D = _dot(tl.trans(through), x, NARROW, PRECISION)
    return through + _dot(through, D, NARROW, PRECISION), grad_map, grad_D


@triton.jit
def backward_kernel(
    streams,
    grad_y,
    states,
    grad_end,
    grad_anchor,
    map_k,
    map_v,
    vector_eta,
    vector_alpha,
    bias_eta,
    bias_alpha,
    grad_streams,
    grad_start,
    grad_map_k,
    grad_map_v,
    grad_vector_eta,
    grad_vector_alpha,
    grad_bias_eta,
    grad_bias_alpha,
    T,
    H,
    d,
    max_step,
    limit,
    stride_b,
    stride_t,
    stride_n,
    stride_h,
    N_Q: tl.constexpr,
    N_K: tl.constexpr,
    N_V: tl.constexpr,
    MOVE_K: tl.constexpr,
    MOVE_V: tl.constexpr,
    MOVE_G: tl.constexpr,
    OWN: tl.constexpr,
    C: tl.constexpr,
    D_PAD: tl.constexpr,
    SOLVE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    chunks = tl.cdiv(T, C)
    streams += b * stride_b + h * stride_h
    grad_streams += b * stride_b + h * stride_h
    grad_y += b * T * H * d + h * d
    states += row * chunks * d * d
    Mk, Mv = _load_square(map_k + h * d * d, d, D_PAD), _load_square(map_v + h * d * d, d, D_PAD)
    column = tl.arange(0, D_PAD)
    me = tl.load(vector_eta + h * d + column, mask=column < d, other=0.0).to(tl.float32)
    ma = tl.load(vector_alpha + h * d + column, mask=column < d, other=0.0).to(tl.float32)
    be, ba = tl.load(bias_eta + h).to(tl.float32), tl.load(bias_alpha + h).to(tl.float32)
    G = _load_square(grad_end + row * d * d, d, D_PAD)
    dMk, dMv = tl.zeros([D_PAD, D_PAD], tl.float32), tl.zeros([D_PAD, D_PAD], tl.float32)
    dme, dma = tl.zeros([D_PAD], tl.float32), tl.zeros([D_PAD], tl.float32)
    # Vectors of one number: a scalar would change its type in the loop.
    dbe, dba = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for back in range(chunks):
        c = chunks - 1 - back
        t = c * C
        real = t + tl.arange(0, C) < T
        D = _load_square(states + c * d * d, d, D_PAD)
        Dt = tl.trans(D)
        # Forward once more.
        xk = _load(streams, t, N_K, T, d, C, D_PAD, stride_t, stride_n)
        xv = _load(streams, t, N_V, T, d, C, D_PAD, stride_t, stride_n)
        hk, k, k_scale = _mapped(xk, Dt, tl.trans(Mk), MOVE_K, MOVE_K or MOVE_G, NARROW, PRECISION)
        hv, v, v_scale = _mapped(xv, Dt, tl.trans(Mv), MOVE_V, MOVE_V, NARROW, PRECISION)
        of_gates = hk if MOVE_G else xk
        eta, log_alpha, sigma, closing = _gates(of_gates, me, ma, be, ba, max_step, real)
        step, u, u_scale, g, before, held, erase, gram, inverse, rest, W, decay = _written(
            k, v, D, Dt, eta, log_alpha, OWN, C, SOLVE, NARROW, PRECISION
        )
        q, q_scale = _unit(_load(streams, t, N_Q, T, d, C, D_PAD, stride_t, stride_n))
        dy = _load(grad_y, t, 0, T, d, C, D_PAD, H * d, 0)

        # D_{c+1} = e^last D + (X W)^T K
        G = _limited(G, limit)
        last = tl.sum(log_alpha, 0)
        X = tl.exp(last - g)[:, None]
        dXW = _dot(k, tl.trans(G), NARROW, PRECISION)
        dk = _dot(X * W, G, NARROW, PRECISION)
        dW = X * dXW
        a = tl.sum(dW * W, 1)
        dlast = tl.exp(last) * tl.sum(G * D) + tl.sum(a, 0)
        dg = -a
        dD = tl.exp(last) * G

        # Y = Q + e^g Q D^T + P W,  P = decay * Q K^T
        scaled = tl.exp(g)[:, None] * dy
        dq = dy + _dot(scaled, D, NARROW, PRECISION)
        dD += _dot(tl.trans(scaled), q, NARROW, PRECISION)
        dg += tl.sum(scaled * _dot(q, Dt, NARROW, PRECISION), 1)
        P = decay * _dot(q, tl.trans(k), NARROW, PRECISION)
        dW += _dot(tl.trans(P), dy, NARROW, PRECISION)
        dP = _dot(dy, tl.trans(W), NARROW, PRECISION)
        dg += tl.sum(dP * P, 1) - tl.sum(dP * P, 0)
        dS = dP * decay
        dq += _dot(dS, k, NARROW, PRECISION)
        dk += _dot(tl.trans(dS), q, NARROW, PRECISION)
        dxq = _unit_back(dq, q, q_scale)
        _store(grad_streams, dxq, t, N_Q, T, d, C, D_PAD, stride_t, stride_n)

        # (I + L) W = step (U - e^before K D^T)
        dR = tl.dot(tl.trans(inverse), dW, input_precision=PRECISION)
        dL = tl.where(i > j, -_dot(dR, tl.trans(W), NARROW, PRECISION), 0.0)
        dstep = tl.sum(dR * rest, 1)
        dU = step[:, None] * dR
        dheld = -tl.exp(before)[:, None] * dU
        dbefore = tl.sum(dheld * held, 1)
        dk += _dot(dheld, D, NARROW, PRECISION)
        dD += _dot(tl.trans(dheld), k, NARROW, PRECISION)

        # L = step erase K K^T
        dE = dL * erase
        dstep += tl.sum(dE * gram, 1)
        dE *= step[:, None]
        dbefore += tl.sum(dE * gram, 1)
        dg -= tl.sum(dE * gram, 0)
        dk += _dot(dE + tl.trans(dE), k, NARROW, PRECISION)

        # g = cumsum(log alpha), before = the same without the token's own
        dlog = tl.cumsum(dg + dbefore, 0, reverse=True) + dlast - dbefore
        dla = tl.where(real, dlog * closing, 0.0)
        dma += tl.sum(dla[:, None] * of_gates, 0)
        dba += tl.sum(dla, 0)

        # step = eta / (1 + eta |k|^2)
        shrink = 1.0 + eta * tl.sum(k * k, 1)
        dstep = dstep / (shrink * shrink)
        dk -= (2.0 * dstep * eta * eta)[:, None] * k
        dle = tl.where(real, dstep * max_step * sigma * (1.0 - sigma), 0.0)
        dme += tl.sum(dle[:, None] * of_gates, 0)
        dbe += tl.sum(dle, 0)
        dgate = dla[:, None] * ma[None, :] + dle[:, None] * me[None, :]

        # u = unit(H v), v = unit(M_v H x^v), k = unit(M_k H x^k)
        dv = dU
        if OWN:
            dU = _unit_back(dU, u, u_scale)
            dD += _dot(tl.trans(dU), v, NARROW, PRECISION)
            dv = dU + _dot(dU, D, NARROW, PRECISION)
        if MOVE_V:
            dxv, dM, dD_c = _map_back(dv, 0.0, xv, hv, v, v_scale, Mv, D, NARROW, PRECISION)
            dMv += dM
            dD += dD_c
        else:
            dxv = _unit_back(dv, v, v_scale)
        _store(grad_streams, dxv, t, N_V, T, d, C, D_PAD, stride_t, stride_n)
        if MOVE_K:
            through = dgate if MOVE_G else 0.0 * dgate
            dxk, dM, dD_c = _map_back(dk, through, xk, hk, k, k_scale, Mk, D, NARROW, PRECISION)
            dMk += dM
            dD += dD_c
        else:
            dxk = _unit_back(dk, k, k_scale)
        if not MOVE_G:
            dxk += dgate
        elif not MOVE_K:
            dxk += dgate + _dot(dgate, D, NARROW, PRECISION)
            dD += _dot(tl.trans(dgate), xk, NARROW, PRECISION)
        _store(grad_streams, dxk, t, N_K, T, d, C, D_PAD, stride_t, stride_n)
        G = dD
        if back == 0:
            G += _load_square(grad_anchor + row * d * d, d, D_PAD)
    _store_square(grad_start + row * d * d, G, d, D_PAD)
    _store_square(grad_map_k + row * d * d, dMk, d, D_PAD)
    _store_square(grad_map_v + row * d * d, dMv, d, D_PAD)
    tl.store(grad_vector_eta + row * d + column, dme, mask=column < d)
    tl.store(grad_vector_alpha + row * d + column, dma, mask=column < d)
    tl.store(grad_bias_eta + row + tl.arange(0, 1), dbe)
    tl.store(grad_bias_alpha + row + tl.arange(0, 1), dba)
