"""Named memories of the literature, each a point on the same axes."""

from __future__ import annotations

from .algorithms import Momentum
from .architectures import MLP, Matrix
from .associative import AssociativeMemory
from .objectives import L2, Huber, Lp
from .retention import KL, Delta, Lq, Oja

catalog: dict[str, AssociativeMemory] = {
    # S_t = S_{t-1} + v k^T (Katharopoulos et al. 2020; NL Eq. 16); gates lr = retain = 1
    "linear_attention": AssociativeMemory(Matrix()),
    # S_t = gamma S_{t-1} + v k^T (arXiv 2307.08621); retain a constant per head
    "retnet": AssociativeMemory(Matrix()),
    # S_t = S_{t-1}(I - eta k k^T) + eta v k^T (arXiv 2406.06484); retain = 1
    "deltanet": AssociativeMemory(Matrix(), retention=Delta()),
    # S_t = alpha_t S_{t-1}(I - eta k k^T) + eta v k^T (arXiv 2412.06464)
    "gated_deltanet": AssociativeMemory(Matrix(), retention=Delta(gated=True)),
    # S_t = (alpha_t I - eta v v^T) S_{t-1} + eta v k^T (Oja's rule, OjaNet; NL Eq. 66-67)
    "oja": AssociativeMemory(Matrix(), retention=Oja()),
    # W_t = W_{t-1} - eta (W_anchor k - v) k^T (arXiv 2407.04620)
    "ttt_linear": AssociativeMemory(Matrix(), objective=L2()),
    "ttt_mlp": AssociativeMemory(MLP(4), objective=L2()),
    # generalized gradient descent: W_t = argmin_W 1/2 ||W k - u||^2 + 1/(2 eta) ||W - alpha_t W_{t-1}||^2 with the
    # surprise u = -dL(M(k), v) / dM(k), L = Huber's norm (NL Eq. 58-60; docs/decisions.md)
    "ggd": AssociativeMemory(Matrix(), L2(), step_size="proximal", values=Huber("norm", threshold=1.0)),
    # deep memory, L2, decay, momentum (arXiv 2501.00663, Eq. 9-14)
    "titans": AssociativeMemory(MLP(4), objective=L2(), algorithm=Momentum()),
    # deep linear attention: deep memory with the dot-product objective (Atlas, arXiv 2505.23735)
    "dla": AssociativeMemory(MLP(4)),
    # W_t = alpha_t W_{t-1} - sum over the last c tokens of eta_i grad 1/2 ||M(k_i) - v_i||^2 (Omega rule: NL Eq. 68;
    # Atlas, arXiv 2505.23735)
    "omega": AssociativeMemory(MLP(4), objective=L2(), window=4),
    # the memory of self-modifying Titans (NL Eq. 88-93); docs/decisions.md says why dot product is the default
    "hope": AssociativeMemory(MLP(4), retention=Delta(), step_size="proximal", retain_to="initial"),
    # A_t = alpha_t A_{t-1} - eta_t grad ||M(k) - v||_3^3,  W = A / ||A||_4^2 (Miras section 5)
    "moneta": AssociativeMemory(MLP(4), objective=Lp(3), retention=Lq(4)),
    # the L2 gradient for residuals up to delta_t, delta_t times that of L1 beyond (Miras section 5)
    "yaad": AssociativeMemory(MLP(4), objective=Huber("switch")),
    # W_t = softmax(alpha_t log W_{t-1} - eta_t grad 1/2 ||M(k) - v||^2) per output row (Miras section 5)
    "memora": AssociativeMemory(MLP(4), objective=L2(), retention=KL()),
}
"""The memories of the literature by name. `dataclasses.replace` gives a variant of one."""
