"""Levels on models whose weights are codes of 8 or 4 bits: they learn in full precision, the codes stay."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from tests.llama import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn import Level, MemorySession, freeze_backbone, stack_levels
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking import read_segment
from nestlearn.models.stacking.families import is_quantized, squares_by_unit
from nestlearn.peft import ContinuumConfig

TEXT = "The red lamp is on the left, the blue lamp is on the right. " * 6
LEVELS = {"add": [Level(32, hidden=8)], "split": [Level(32, rank=4)], "copy": [Level(32, rank=4), Level(64, rank=4)]}


class Int8Weight(Tensor):
    """Codes of 8 bits and a scale per row, which know no operation but `F.linear`, as types of torchao."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Int8Weight:
        made: Any = cast(Any, Tensor)._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Int8Weight:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.codes * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise TypeError(f"a quantized weight does not know {func}")


def own_int8(model: Any) -> Any:
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            module.weight = nn.Parameter(Int8Weight((weight / scale).round().to(torch.int8), scale), False)
    return model


def torchao_int8(model: Any) -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
    return model


QUANTIZE = [own_int8, torchao_int8]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao.*", "ignore::DeprecationWarning")


def small() -> Any:
    return tiny_llama(num_hidden_layers=2, hidden_size=32, intermediate_size=64)


def inner_tensors(model: Any) -> list[Tensor]:
    """Codes and scales of all quantized weights."""
    weights = [p for p in model.model.layers.parameters() if is_quantized(p)]
    found = [getattr(p, name) for p in weights for name in p.__tensor_flatten__()[0]]
    return [x for x in found if isinstance(x, Tensor)]


def stored(model: Any) -> int:
    """Bytes of all weights."""
    found = 0
    for parameter in model.parameters():
        names = parameter.__tensor_flatten__()[0] if is_quantized(parameter) else []
        tensors = [getattr(parameter, name) for name in names] or [parameter]
        found += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
    return found


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_levels_learn_on_codes_and_the_codes_stay(quantize: Any, mode: Any) -> None:
    whole, model = stored(small()), quantize(small())
    assert stored(model) < 0.62 * whole  # the embeddings and the head, 45 % of this model, are not quantized
    codes = [x.clone() for x in inner_tensors(model)]
    before = model(torch.arange(8)[None]).logits
    stack_levels(model, LEVELS[mode], mode=mode)
    assert torch.allclose(model(torch.arange(8)[None]).logits, before, atol=1e-5)
    session = MemorySession(model, byte_tokenizer())
    report = session.read(TEXT)
    assert cast(float, report.bits_per_byte) < cast(float, report.off)
    assert all(row.change > 0 for row in session.diff())
    kept = inner_tensors(model)
    assert len(kept) == len(codes) > 20 and all(torch.equal(a, b) for a, b in zip(kept, codes, strict=True))
    state = read_segment(model, torch.arange(5, 37)[None]).state
    written = [level for levels in state.networks.values() for level in levels if level is not None]
    assert {x.dtype for level in written for x in level.weights.params.values()} == {torch.float32}


def test_levels_learn_what_they_learn_on_the_rounded_weights() -> None:
    """The codes, multiplied by their scales, in a plain model: the same changes of every level."""
    quantized, plain = own_int8(small()), small()
    with torch.no_grad():
        for a, b in zip(plain.model.layers.modules(), quantized.model.layers.modules(), strict=True):
            if type(a) is nn.Linear:
                a.weight.copy_(b.weight.codes * b.weight.scale)
    ids = torch.arange(5, 37)[None]
    found = []
    for model in (quantized, plain):
        torch.manual_seed(0)  # of the parts A of the levels
        read = read_segment(stack_levels(model, LEVELS["split"], mode="split"), ids)
        found.append(
            [w for levels in read.state.networks.values() for w in cast(Any, levels[0]).weights.params.values()]
        )
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    for a, b in zip(plain.model.layers, quantized.model.layers, strict=True):
        for name, down in (("up_proj", False), ("down_proj", True)):
            maps = [getattr(x.mlp, name) for x in (a, b)]
            one, two = (squares_by_unit(x, tuple(x.weight.shape), down, torch.device("cpu")) for x in maps)
            assert torch.allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_a_level_that_would_have_to_write_codes_is_refused(quantize: Any) -> None:
    for mode in ("split", "copy"):
        model = stack_levels(quantize(small()), LEVELS[mode], mode=mode)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"mlp\.gate_proj is quantized, and no step can change its codes"):
            freeze_backbone(model)
    beside = freeze_backbone(stack_levels(quantize(small()), LEVELS["add"], mode="add"))
    assert beside and all(".levels." in name and p.requires_grad for name, p in beside.items())


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("mode", ["add", "split"])
def test_an_adapter_trains_on_codes_and_is_not_merged(quantize: Any, mode: Any) -> None:
    levels = [Level(8, hidden=8, rank=None if mode == "add" else 4)]
    model = get_peft_model(quantize(small()), ContinuumConfig(levels=levels, mode=mode)).train()
    ids = torch.tensor([list(TEXT.encode()[:60])])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(
        ValueError, match="without a plain matrix of weights" if mode == "split" else "cannot be merged"
    ):
        model.merge_adapter()
