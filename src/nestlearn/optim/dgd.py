"""Delta gradient descent: each step also erases the old answers of a linear map to its inputs (NL Eq. 56-57)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.optim.checks import kept, not_negative, one_of, positive, refuse_copy, whole_number
from nestlearn.optim.input_inverse import orthogonal_step, refresh
from nestlearn.optim.linear_layers import Form, LinearLayer, linear_layers, observe
from nestlearn.optim.matrices import Matrices, Stack, stack_count, together
from nestlearn.optim.matrix_optimizer import MatrixOptimizer, zeros
from nestlearn.optim.minimizers import batch_step, sample_step
from nestlearn.optim.sharding import local, own_part, pooled
from nestlearn.optim.wrapper import not_compiled

Precondition = Literal["implicit", "inverse"]

PERIOD_SUMS = ("rows", "moment", "writes")
"""States of a weight whose group steps once in a period; writes in the sample form only (`LinearLayer`)."""


class DGD(MatrixOptimizer):
    """Delta gradient descent for linear maps (NL Eq. 56-57, Appendix C); AdamW trains all other parameters.

    Let x be the input of a map and e the gradient of the loss by its output. Each step is the exact minimizer of

        ½ E‖W x + e - (1 - λ) Wₜ x‖²  +  ‖W - Wₜ‖² / 2η

    With λ = 1 (`erase`; the paper's rule) the new answer to x is -e. The old answer is erased even at a minimum, and
    training ends where G = -λ W R and not where G = 0. With λ = 0 nothing is erased: the step is the implicit gradient
    step on a squared error of the answers, and no η or size of inputs makes it overshoot. With G = E[e xᵀ], the
    gradient of a mean loss, and R = E[x xᵀ] the steps are

        batch    W ← (λ W - η G) (I + η R)⁻¹ + (1 - λ) W
        sample   W ← E[W (I - λ η' x xᵀ) - η' e xᵀ],  η' = η / (1 + η‖x‖²)

    ``"batch"`` minimizes over the whole batch. ``"sample"`` is the mean of the minimizers for single rows: it needs no
    solve, and learns more slowly where inputs differ. For one row they are equal. R and the sums of the sample form are
    collected during the backward pass; no sample is kept. Accumulated gradients count as one large batch.

    A row is one input vector, such as a token's. R is the mean over all rows of the batch, as G is for a mean loss.
    Rows with a gradient of exactly 0 count: a ReLU behind the map gives such gradients to rows that the loss averages
    over. For batches with padding, which the loss leaves out, set `skip_rows_without_gradient`: padding then changes
    nothing. R is exact if every other row has a gradient; otherwise it is too large by the ratio of the two numbers of
    rows.

    ``precondition="inverse"`` is another rule on the same R, for training networks: it divides the gradient by R before
    the momentum and the Newton-Schulz iteration NS of Muon, and erases nothing. With δ = `damping` times the mean
    eigenvalue of R, every `refresh` steps ``P = (R + δ I)⁻¹``, from the inputs of that step alone, and at every step

        M ← β M + (1 - β) G P        W ← W - η 0.2 √max(in, out) NS(β M + (1 - β) G P)

    Steps are of AdamW's size, so η is AdamW's rate, and AdamW trains the biases. Inputs are read on one step in
    `refresh`. State: 4 bytes per parameter for M and d² numbers per map for P.

    The rule trains weights of `nn.Linear` (and transformers' Conv1D) in groups of rule ``"auto"`` or ``"matrix"``.
    Their biases are weights for an input of 1: they are updated with the weight, by the settings of its group except
    weight decay; AdamW trains the bias of a frozen weight. Groups with other parameters are divided, and AdamW trains
    these.

    Cost per map and step, with d inputs and N rows: N d² multiplications for R, a Cholesky factorization (d³ / 3) and
    two triangular solves; for the sample form N d (d + out). Until `zero_grad` the sums take d² numbers per process, in
    the sample form d (d + out). They are state only where a group steps once in several steps (`MultiTimescale`).

    Gradient clipping changes G, not the sums of the sample form. η' has the lr at the time of backward. Every backward
    pass through a layer counts, also for other gradients (`torch.autograd.grad`); new sums start after a step or
    `zero_grad`. FSDP2 may divide weights along their outputs only, its default.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`, `nestlearn.optim.param_groups`).
        model: the model of these parameters; with FSDP2 after `fully_shard`.
        lr: η of the matrices, of the size of plain gradient steps.
        adamw_lr: of groups with rule ``"adamw"`` without an lr, and of parameters in other groups that are no maps.
        form: ``"batch"`` or ``"sample"``.
        erase: λ, in [0, 1].
        precondition: ``"implicit"``, the minimizers above, or ``"inverse"``, for which `form` must be ``"batch"`` and
            `erase` has no effect.
        refresh: steps between two P; this and the next two are for ``precondition="inverse"`` only.
        momentum: β.
        damping: of the mean eigenvalue of R.
        skip_rows_without_gradient: leave rows out of R whose gradient is exactly 0. For batches with padding.
        weight_decay: decoupled: ``W ← (1 - lr · weight_decay) W`` before the step.
        process_group: the processes over which DistributedDataParallel averages gradients; the default group where
            torch.distributed is initialized. Processes that train models of their own must each give a group of one.
        adamw: settings of AdamW (`MatrixOptimizer`).

    Raises:
        ValueError: a setting out of range, no linear layer, or one that shares parameters with other modules or
            computes its weight. In `step`: a layer that has a gradient but had no input.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = DGD(layer.parameters(), layer, lr=1e6, erase=0.0)  # no step is too large
        >>> x, y = torch.eye(4), torch.arange(8.0).view(4, 2)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     loss = (layer(x) - y).square().sum(1).mean() / 2
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 1e-6
        True
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        adamw_lr: float | Tensor = 1e-3,
        form: Form = "batch",
        erase: float = 1.0,
        precondition: Precondition = "implicit",
        refresh: int = 64,
        momentum: float = 0.95,
        damping: float = 0.01,
        skip_rows_without_gradient: bool = False,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        self._layers, self._refused = linear_layers(model)
        self._adamw_lr, self._process_group = adamw_lr, process_group
        self._skip_rows = skip_rows_without_gradient
        self._handles: list[Any] = []
        defaults = {
            "lr": lr, "form": form, "erase": erase, "precondition": precondition, "refresh": refresh,
            "momentum": momentum, "damping": damping, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, adamw)
        if not self._handles:
            kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
            raise ValueError(
                f'No nn.Linear of the model has a weight in a group of rule "auto" or "matrix" (modules: {kinds}). '
                "Give the model that the parameters are of, after fully_shard; for a model without, use "
                "torch.optim.AdamW."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two if it has both linear layers and other parameters.

        Raises:
            ValueError: a setting out of range, or a linear layer that cannot be trained.
        """
        first = len(self.param_groups)
        try:
            for group in self._divided(param_group):
                super().add_param_group(group)
        except ValueError:
            del self.param_groups[first:]
            raise
        for place, group in enumerate(self.param_groups[first:], first):
            for weight in group["params"] if group["rule"] == "matrix" else ():
                layer = self._layers[weight]
                layer.group = place
                self._handles.append(observe(layer.module, partial(self._receive, layer)))
        places = {p: place for place, group in enumerate(self.param_groups) for p in group["params"]}
        for layer in self._layers.values():
            bias: Tensor | None = getattr(layer.module, "bias", None)
            joined = layer.group is not None and self.param_groups[layer.group]["precondition"] == "implicit"
            layer.own_bias = bias if bias in places and joined else None
            layer.bias_group = None if layer.own_bias is None else places[layer.own_bias]

    def _divided(self, group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A group of what the rule trains, and one of the rest for AdamW."""
        if group.get("rule", "auto") not in ("auto", "matrix") or isinstance(group["params"], set):
            yield {"lr": self._adamw_lr, **group}
            return
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        linear, rest = [], []
        for entry in given:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if group.get("rule") == "matrix" and parameter.ndim < 2:
                yield {**group, "params": given}  # refused for it
                return
            if parameter in self._refused:
                raise ValueError(
                    f"DGD cannot train a weight of shape {tuple(parameter.shape)}: {self._refused[parameter]}. Give it "
                    'a group with rule="adamw"; nestlearn.optim.param_groups(model) does so for embeddings and heads.'
                )
            (linear if parameter in self._layers else rest).append(entry)
        if linear:
            yield {**group, "params": linear, "rule": "matrix"}
        if rest or not linear:
            yield {**group, "params": rest, "rule": "adamw", "lr": self._adamw_lr}

    def _receive(self, layer: LinearLayer, x: Tensor, gradient: Tensor) -> None:
        """Adds the rows of one backward pass to a layer's sums."""
        group = self.param_groups[layer.group or 0]
        if group["precondition"] == "inverse" and not self._is_due(group, layer.weight):
            return
        layer.add(x, gradient, group["lr"] if group["form"] == "sample" else None, self._skip_rows)

    def check_group(self, group: Mapping[str, Any]) -> None:
        one_of("form", group["form"], Form)
        not_negative("erase", group["erase"], "the part of the old answers that a step erases")
        if group["erase"] > 1:
            raise ValueError(f"erase is {group['erase']}; it must be at most 1, which erases the whole old answer.")
        one_of("precondition", group["precondition"], Precondition)
        whole_number("refresh", group["refresh"], "steps between two inverses of the second moment")
        kept("momentum", group["momentum"], "the part of the average gradient kept at a step")
        positive("damping", group["damping"], "directions without inputs are divided by it")
        if group["precondition"] == "inverse" and group["form"] != "batch":
            raise ValueError(
                f'precondition is "inverse" and form is {group["form"]!r}: one inverse serves a whole batch. Use '
                'form="batch", or precondition="implicit".'
            )

    def _is_due(self, group: Mapping[str, Any], weight: Tensor) -> bool:
        """Whether the next step of a weight makes a new inverse."""
        return int(self.state.get(weight, {}).get("step", 0)) % group["refresh"] == 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients and the sums collected with them."""
        for layer in self._layers.values():
            layer.forget()
        super().zero_grad(set_to_none)

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        Args:
            closure: computes the loss and its gradients again; called once, before the update.

        Raises:
            ValueError: a sparse gradient, a layer that has a gradient but had no input, or one whose bias has another
                period.
        """
        loss = super().step(closure)
        for layer in self._layers.values():
            layer.used |= layer.weight.grad is not None  # also after a skipped step
        return loss

    @torch.no_grad()
    def hold_back(self, parameters: Iterable[Tensor]) -> None:
        """Keeps the sums of these weights for the step at the end of their period (`MultiTimescale`).

        They become state, summed over the processes. So they are saved, and equal on all processes.

        Raises:
            ValueError: a sparse gradient, or a bias that has another period than its weight.
        """
        for group in self.param_groups:
            self._check_gradients(group)
        for weight in parameters:
            layer = self._layers.get(weight)
            if layer is not None and layer.group is not None:
                group = self.param_groups[layer.group]
                self._check_periods(group, layer)
                if not self.state[weight]:
                    self.state[weight] = {"step": torch.tensor(0.0), **self.new_state(group, weight)}
                kept = self._of_period(group, layer) or layer.no_sums(group["form"])
                seen = [x[0] for x in self._sums(group, [layer])]
                self._keep(layer, torch._foreach_add(kept, seen))
                layer.forget()

    def _keep(self, layer: LinearLayer, sums: Iterable[Tensor]) -> None:
        """Replaces the sums of a period in the state."""
        state = self.state[layer.weight]
        for name in PERIOD_SUMS:  # those of the sample form have one more
            state.pop(name, None)
        state |= zip(PERIOD_SUMS, sums, strict=False)

    def _of_period(self, group: Mapping[str, Any], layer: LinearLayer) -> list[Tensor]:
        """The sums that were held back in a period; none where a layer steps each time.

        Raises:
            ValueError: they are of the other form, or of another bias.
        """
        state = self.state[layer.weight]
        kept = [state[name] for name in PERIOD_SUMS if name in state]
        if kept and [x.shape for x in kept] != layer.shapes(group["form"]):
            if float(kept[0]) > 0:
                raise layer.other_form(group["form"])
            return layer.no_sums(group["form"])
        return kept

    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        if like not in self._layers:
            return {}
        state: dict[str, Tensor] = {}
        if group["precondition"] == "inverse":
            _, moment = self._layers[like].no_sums("batch")
            state |= {"momentum_buffer": zeros(like), "inverse": moment.fill_diagonal_(1.0)}
        if group.get("update_period", 1) == 1:
            return state
        # Also before anything is held back: a distributed checkpoint is loaded into the entries of a new optimizer.
        return state | dict(zip(PERIOD_SUMS, self._layers[like].no_sums(group["form"]), strict=False))

    def _step_rest(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        weights = ((layer.bias, layer.weight) for layer in self._layers.values())
        with_weights = {bias for bias, weight in weights if weight.requires_grad or weight.grad is not None}
        super()._step_rest(group, [parameter for parameter in parameters if parameter not in with_weights])

    def _check_shapes(self, group: Mapping[str, Any], parameter: Tensor, saved: Mapping[str, Any]) -> None:
        # A bias has AdamW's state only where its layer's weight was frozen.
        if "exp_avg" in saved or all(parameter is not layer.own_bias for layer in self._layers.values()):
            empty = "rows" in saved and not bool(saved["rows"])  # the same as no sums (`_of_period`)
            given = {name: x for name, x in saved.items() if not (empty and name in PERIOD_SUMS)}
            super()._check_shapes(group, parameter, given)

    def _optional_shapes(self, parameter: Tensor, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        # A state has them only if the group had a period when the weight was last held back, in its form at that time.
        layer = self._layers.get(parameter)
        shapes = [] if layer is None or layer.group is None else layer.shapes("sample")
        return {name: tuple(shape) for name, shape in zip(PERIOD_SUMS, shapes, strict=False)}

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        if group["precondition"] == "inverse":
            self._update_inverse(group, matrices)
            return
        alike: dict[tuple[bool, bool], list[_Map]] = {}
        for parameter, weight, gradient in zip(matrices.parameters, matrices.weights, matrices.gradients, strict=True):
            layer = self._observed(group, parameter, gradient)
            if layer.transposed:
                weight, gradient = weight.mT, gradient.mT
            alike.setdefault((layer.transposed, layer.bias is None), []).append((layer, weight, gradient))
        if group["weight_decay"] > 0:
            torch._foreach_mul_(matrices.weights, 1 - group["lr"] * group["weight_decay"])
        for maps in alike.values():
            # Second moments are much larger than the weights of a map with few outputs and many inputs.
            weight = maps[0][1]
            count = stack_count(weight.shape[-1] * max(weight.shape[-2:]), weight.device)
            for first in range(0, len(maps), count):
                self._update_alike(group, maps[first : first + count])

    def _update_inverse(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        """One step behind the inverse second moment, which is made anew where it is due."""
        due = (matrices.step - 1) % group["refresh"] == 0
        given = zip(matrices.parameters, matrices.gradients, strict=True)
        layers = [self._observed(group, parameter, gradient, due) for parameter, gradient in given]
        if any(layer.bias is not None for layer in layers):
            raise ValueError(
                'precondition became "inverse" after the optimizer was made, which left the biases to the other rule; '
                "give it when the DGD is made."
            )
        if due:
            rows, moments = self._with_period(group, layers, self._sums(group, layers))
            refresh(matrices.state("inverse"), rows, moments, group["damping"])
        orthogonal_step(group, matrices, [layer.transposed for layer in layers])

    def _update_alike(self, group: Mapping[str, Any], maps: list[_Map]) -> None:
        """One step of maps of one shape, all with a bias or all without."""
        layers = [layer for layer, _, _ in maps]
        weights, _ = together([_joined(w, layer.bias) for layer, w, _ in maps])
        rows, moments, *writes = self._with_period(group, layers, self._sums(group, layers))
        rows = rows.clamp(min=1)[:, None, None]
        if writes:
            written = torch.cat([_own_writes(layer, write) for layer, write in zip(layers, writes[0], strict=True)])
            changed = sample_step(weights, moments / rows, written, group["erase"])
        else:
            gradients, _ = together([_joined(g, self._bias_gradient(layer.bias)) for layer, _, g in maps])
            own = weights if len(maps) == 1 and layers[0].bias is None else None  # the weight's own memory then
            changed = batch_step(weights, gradients, moments, group["lr"], group["erase"], rows, out=own)
            if own is not None:
                return
        for (layer, weight, _), new in zip(maps, changed, strict=True):
            weight.copy_(new[:, : weight.shape[-1]])
            if layer.bias is not None:
                local(layer.bias).copy_(new[:, -1])
                # torch.distributed.checkpoint wants some state of every trained parameter.
                self.state[layer.bias]["step"] = self.state[layer.weight]["step"].clone()

    def _with_period(self, group: Mapping[str, Any], layers: list[LinearLayer], sums: list[Tensor]) -> list[Tensor]:
        """These sums plus those held back in the period that ends now, which are set to 0."""
        kept = [self._of_period(group, layer) for layer in layers]
        if not any(kept):
            return sums
        for layer in layers:
            self._keep(layer, layer.no_sums(group["form"]) if group.get("update_period", 1) > 1 else ())
        each = zip(*(k or layer.no_sums(group["form"]) for k, layer in zip(kept, layers, strict=True)), strict=True)
        return [torch.stack(earlier) + seen for earlier, seen in zip(each, sums, strict=True)]

    def _bias_gradient(self, bias: Tensor | None) -> Tensor | None:
        """The gradient of a bias; zeros where it has none."""
        return None if bias is None else torch.zeros_like(bias) if bias.grad is None else self._gradient(bias)

    def _sums(self, group: Mapping[str, Any], layers: list[LinearLayer]) -> list[Tensor]:
        """The sums of layers of one shape over all processes, stacked over the layers.

        On one process the sums of a single layer are the layer's own tensors: do not change them.
        """
        like = layers[0].weight
        each = zip(*([x[None] for x in layer.sums(group["form"])] for layer in layers), strict=True)
        (rows, _), (moments, _), *writes = (pooled(together(sums)[0], like, self._process_group) for sums in each)
        if not writes:
            return [rows, moments]
        # The loss is the mean of those of the processes. Its gradients are scaled where a GradScaler works.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        total, processes = writes[0]
        return [rows, moments, total / (processes if scale is None else processes * scale)]

    def _observed(self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, used: bool = True) -> LinearLayer:
        """The layer of a weight, if its sums can be used, or if this step does not use them."""
        if weight not in self._layers:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} was put into the optimizer in the place of another one, as "
                "Accelerate does when it shards a model. Make the DGD after fully_shard, from the new parameters."
            )
        layer = self._layers[weight]
        self._check_periods(group, layer)
        seen = layer.rows is not None or any(bool(x) for x in self._of_period(group, layer)[:1])
        if used and not seen and float(group["lr"]) > 0 and bool(gradient.any()):
            raise ValueError(
                f"{layer.name} ({tuple(layer.weight.shape)}) has a gradient, but no backward pass went through the "
                "module. Its weight is used without calling it, as nn.MultiheadAttention does with out_proj, or the "
                'model was compiled before the optimizer was made. Give such a weight a group with rule="adamw"; make '
                "the optimizer before the first compiled call."
            )
        unscaled = getattr(self, "found_inf", None) is not None and getattr(self, "grad_scale", None) is None
        if group["form"] == "sample" and unscaled:
            raise ValueError(
                'GradScaler.unscale_ was called before the step, which does not reach the sums of form="sample". Leave '
                'it out, so that the step unscales them, or use form="batch", whose gradient can be clipped too.'
            )
        return layer

    def _check_periods(self, group: Mapping[str, Any], layer: LinearLayer) -> None:
        if layer.bias is None or layer.bias_group is None:
            return
        periods = [g.get("update_period", 1) for g in (group, self.param_groups[layer.bias_group])]
        if periods[0] != periods[1]:
            raise ValueError(
                f"The weight of {layer.name} ({tuple(layer.weight.shape)}) steps every {periods[0]} steps, its bias "
                f"every {periods[1]}; DGD updates both at once, by the gradients of one period. Give their groups the "
                "same update_period, or freeze the bias."
            )

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: hooks of the model would not watch a copy's layers.

        Raises:
            TypeError: always.
        """
        refuse_copy(self)


_Map = tuple[LinearLayer, Stack, Stack]
"""A linear map, its weight and gradient as [1, out, in]."""


def _own_writes(layer: LinearLayer, writes: Float[Tensor, "out d"]) -> Stack:
    """This process's rows of the writes of a layer's samples."""
    width = writes.shape[1] - (layer.bias is not None)
    weight = writes[:, :width].T if layer.transposed else writes[:, :width]
    part = own_part(weight.contiguous(), layer.weight)
    columns = [part.T if layer.transposed else part]
    if layer.bias is not None:
        columns.append(own_part(writes[:, width].contiguous(), layer.bias)[:, None])
    return torch.cat(columns, -1)[None]


def _joined(matrix: Stack, column: Tensor | None) -> Stack:
    """``[W b]``; the same memory without a bias."""
    return matrix if column is None else torch.cat([matrix, local(column).to(matrix)[None, :, None]], -1)
