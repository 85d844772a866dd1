"""Matrix memories on the kernel of `nestlearn.memory.kernels.self_modifying`, where it takes them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import Delta, Descent, DotProduct, State
from nestlearn.memory.algorithms import GRADIENT_LIMIT
from nestlearn.memory.engine import current_engine

from .layer import SelfModifyingState, SelfModifyingTitans

if TYPE_CHECKING:
    from .matrix import SelfModifyingMatrix

CHUNKS = (16, 32, 64, 128)
"""Lengths of chunks that the kernel takes."""

WIDEST_HEAD = 128
"""Widest head whose matrices fit on chip."""

SOLVE = 16
"""Tokens of a triangular block that is solved row by row."""


def kernel_refusal(layer: SelfModifyingTitans) -> str | None:
    """Why the kernel does not know a layer; None if it does."""
    memory = layer.memory
    known = {
        "objective": (memory.objective, DotProduct()),
        "retention": (memory.retention, Delta()),
        "algorithm": (memory.algorithm, Descent()),
        "step_size": (memory.step_size, "proximal"),
        "retain_to": (memory.retain_to, "initial"),
        "read": (memory.read, "token"),
        "learned retention": (layer.retention, True),
    }
    if "q" in layer.adaptive:
        return "adaptive names q, and the kernel's queries do not adapt"
    if ("eta" in layer.adaptive) != ("alpha" in layer.adaptive):
        return f"adaptive is {layer.adaptive!r}, and in the kernel eta and alpha adapt together"
    for name, (have, wanted) in known.items():
        if have != wanted:
            return f"{name} is {have!r}, and the kernel knows {wanted!r}"
    if memory.chunk_size not in CHUNKS:
        return f"chunk_size is {memory.chunk_size}, and the kernel knows {', '.join(map(str, CHUNKS))}"
    if layer.d_head > WIDEST_HEAD:
        return f"a head has width {layer.d_head}, and the kernel holds {WIDEST_HEAD}"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_here(x: Tensor) -> bool:
    """Whether Triton compiles for the device of a tensor."""
    return x.is_cuda and _has_triton()


def takes(
    layer: SelfModifyingTitans,
    streams: Tensor,
    state: SelfModifyingState | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> bool:
    """Whether the kernel takes this call: on a device, whole texts from the start of a chunk on."""
    if current_engine() != "auto" or mask is not None or reset is not None or streams.dtype == torch.float64:
        return False
    aligned = state is None or state.memory.aligned
    return aligned and runs_here(streams) and kernel_refusal(layer) is None


def read(
    layer: SelfModifyingMatrix, streams: Float[Tensor, "b t n h d"], state: SelfModifyingState | None
) -> tuple[Float[Tensor, "b t hd"], SelfModifyingState, None]:
    """`SelfModifyingMatrix._read` by the kernel."""
    batch, count, _, heads, width = streams.shape
    q, k, v = (layer.streams_order.index(name) for name in ("q", "k", "v"))
    moves = tuple(name in layer.adaptive for name in ("k", "v", "eta"))
    settings = KernelSettings(
        (q, k, v), layer.memory.chunk_size, layer.max_step, GRADIENT_LIMIT, moves=moves, own=layer.self_values
    )
    maps = Maps.of(layer)
    if state is None:
        eye = torch.eye(width, device=streams.device)
        start = layer.memory.begin({"W": eye.expand(batch, heads, width, width)})
    else:
        start = state.memory
    y, end, anchor = walk(streams, start.params["W"], maps, settings)
    place = count % layer.memory.chunk_size
    position = torch.full_like(start.position, place)
    after = State({"W": end}, None, {"W": anchor if place else end}, position, None, place == 0)
    y = torch.einsum("bthd,hed->bthe", y, layer.maps["memory"].to(y.dtype)).flatten(2)
    return y, SelfModifyingState(None, after, None), None


class Maps(NamedTuple):
    """Parameters of the heads: maps of keys and values, vectors and biases of the gates.

    A stream that does not adapt has no map. The kernel does not read the one in its place, whose gradient is 0.
    """

    k: Float[Tensor, "h d d"]
    v: Float[Tensor, "h d d"]
    eta: Float[Tensor, "h d"]
    alpha: Float[Tensor, "h d"]
    eta_bias: Float[Tensor, "h"]
    alpha_bias: Float[Tensor, "h"]

    @classmethod
    def of(cls, layer: SelfModifyingTitans) -> Maps:
        """Those of a layer of matrices."""
        matrices: Any = layer
        k, v = (matrices.maps[name if name in layer.adaptive else "memory"] for name in ("k", "v"))
        return cls(k, v, layer.eta_vector, layer.alpha_vector, layer.eta_bias, layer.alpha_bias)


class KernelSettings(NamedTuple):
    """What is no tensor.

    Args:
        order: the places of q, k and v among the streams.
        chunk_size: 16, 32, 64 or 128.
        max_step: scale of eta.
        gradient_limit: largest norm of the gradient that passes from chunk to chunk.
        precision: of products of float32: ``ieee``, ``tf32x3`` or ``tf32``.
        moves: whether keys, values and gates adapt.
        own: whether the memory writes its own targets, not the values.
    """

    order: tuple[int, int, int]
    chunk_size: int
    max_step: float
    gradient_limit: float
    precision: str = "tf32"
    moves: tuple[bool, ...] = (True, True, True)
    own: bool = True

    def constants(self, streams: Tensor) -> dict[str, Any]:
        """The compile-time arguments of both kernels."""
        d, names = streams.shape[-1], ("N_Q", "N_K", "N_V", "MOVE_K", "MOVE_V", "MOVE_G")
        return dict(zip(names, (*self.order, *self.moves), strict=True)) | {
            "OWN": self.own,
            "C": self.chunk_size,
            "D_PAD": max(16, 1 << (d - 1).bit_length()),
            "SOLVE": SOLVE,
            "NARROW": streams.dtype == torch.bfloat16,
            "PRECISION": self.precision,
            "num_warps": 4 if max(d, self.chunk_size) <= 64 else 8,
            "num_stages": 1,
        }


class Walk(torch.autograd.Function):
    """`walk`, with D in place of H."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, start: Tensor, settings: KernelSettings, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        from nestlearn.memory.kernels.self_modifying import forward_kernel

        kernel: Any = forward_kernel
        b, t, _, h, d = streams.shape
        streams, start, maps = streams.contiguous(), start.contiguous(), tuple(x.contiguous() for x in maps)
        y = torch.empty(b, t, h, d, dtype=streams.dtype, device=streams.device)
        states = start.new_empty(b, h, -(-t // settings.chunk_size), d, d)
        end = torch.empty_like(start)
        strides = (streams.stride(0), streams.stride(1), streams.stride(2), streams.stride(3))
        kernel[(b * h,)](
            streams, y, states, end, start, *maps, t, h, d, settings.max_step, *strides, **settings.constants(streams)
        )
        ctx.save_for_backward(streams, states, *maps)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return y, end, states[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_end: Tensor | None, grad_anchor: Tensor | None):  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this kernel has no second derivative, but create_graph=True asks for one. "
                "Run the forward pass under nestlearn.memory.use_engine('chunked')."
            )
        from nestlearn.memory.kernels.self_modifying import backward_kernel

        kernel: Any = backward_kernel
        streams, states, *maps = ctx.saved_tensors
        settings = ctx.settings
        b, t, _, h, d = streams.shape
        zeros = states.new_zeros(b, h, d, d)
        grad_y = streams.new_zeros(b, t, h, d) if grad_y is None else grad_y.contiguous()
        grad_end = zeros if grad_end is None else grad_end.contiguous()
        grad_anchor = zeros if grad_anchor is None else grad_anchor.contiguous()
        grad_streams, grad_start = torch.empty_like(streams), torch.empty_like(zeros)
        grad_maps = [states.new_empty(b, *x.shape) for x in maps]
        strides = (streams.stride(0), streams.stride(1), streams.stride(2), streams.stride(3))
        kernel[(b * h,)](
            streams,
            grad_y,
            states,
            grad_end,
            grad_anchor,
            *maps,
            grad_streams,
            grad_start,
            *grad_maps,
            t,
            h,
            d,
            settings.max_step,
            settings.gradient_limit,
            *strides,
            **settings.constants(streams),
        )
        return grad_streams, grad_start, None, *(g.sum(0).to(x.dtype) for g, x in zip(grad_maps, maps, strict=True))


def walk(
    streams: Float[Tensor, "b t n h d"],
    start: Float[Tensor, "b h d d"],
    maps: Maps,
    settings: KernelSettings,
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h d d"], Float[Tensor, "b h d d"]]:
    """Read t tokens from the start of a chunk on, and write them: the equations above.

    Args:
        streams: ``x^q``, ``x^k`` and ``x^v`` of every token and head, in the order of the settings.
        start: H before the first token, float32.
        maps: parameters of the heads.
        settings: sizes and bounds.

    Returns:
        ``H_t q_t`` in the dtype of the streams; H after the last token; H at the start of the last chunk.
    """
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    y, end, anchor = Walk.apply(streams, start - eye, settings, *maps)  # type: ignore[misc]
    return y, end + eye, anchor + eye
