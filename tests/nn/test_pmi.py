"""Working memory, long-term memory and their mixer against loops over slots, heads and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.nn import PMI, LongTermMemory, PMIConfig, TwoSourceRead, WorkingMemory
from nestlearn.nn.cross_attention import CrossAttention
from nestlearn.nn.state import tensors_of

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
D, HEADS = 6, 3
SIZES: dict[str, Any] = {"slots": 3, "topk": 2, "segments": 4, "chunk_size": 5}


def make(**options: Any) -> PMI:
    """A float64 layer whose gates, norms and slots matter."""
    torch.manual_seed(0)
    layer = PMIConfig(**(SIZES | options)).build(D, HEADS).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.7)
    return layer


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- loops of the formulas


def attend(part: CrossAttention, question: Tensor, answers: list[Tensor], k: int | None = None) -> Tensor:
    """One question: per head the weights of the k best answers, all others exactly 0."""
    width, found = D // HEADS, []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        q = part.query.weight[own] @ question
        keys = [part.key_value.weight[:D][own] @ x for x in answers]
        values = [part.key_value.weight[D:][own] @ x for x in answers]
        scores = [(q @ key) / math.sqrt(width) for key in keys]
        order = sorted(range(len(answers)), key=lambda i, scores=scores: -scores[i].item())[:k]
        total = sum(scores[i].exp() for i in order)
        found.append(sum(scores[i].exp() / total * values[i] for i in order))
    return torch.cat(found)


def written(memory: WorkingMemory, slots: list[Tensor], chunk: list[Tensor], k: int) -> list[Tensor]:
    new = []
    for slot in slots:
        answer = attend(memory.take_in, slot, chunk, k)
        logits = memory.gates.weight @ torch.cat([answer, slot.tanh()]) + memory.gates.bias
        let_in, keep = logits[:D], logits[D:]
        new.append(torch.sigmoid(keep + 1) * slot + torch.sigmoid(let_in) * answer.tanh())
    return new


def merged(memory: LongTermMemory, held: list[list[Tensor]], working: list[Tensor]) -> list[list[Tensor]]:
    count = len(working)
    matches = [sum(s @ w for s, w in zip(seg, working, strict=True)) / math.sqrt(count * D) for seg in held]
    address = torch.stack([torch.as_tensor(m) for m in matches]).softmax(0)
    new = []
    for c, segment in enumerate(held):
        row = []
        for slot, w in zip(segment, working, strict=True):
            x = slot + (address[c] * w if memory.merge == "outer" else slot * torch.stack(working).sum(0))
            x = (x - x.mean()) / (x.var(unbiased=False) + memory.norm.eps).sqrt()
            row.append(x * memory.norm.weight + memory.norm.bias)
        new.append(row)
    return new


def loop(layer: PMI, text: Tensor, config: PMIConfig) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """One row, one token after another."""
    working = list(layer.working.initial.slots)
    held: list[list[Tensor]] = []
    if layer.long_term is not None and layer.long_term.initial is not None:
        held = [list(segment) for segment in layer.long_term.initial.slots]
    inputs, chunk, reads, outputs = [], [], [], []
    for t in range(len(text)):
        h = text[t]
        if layer.conv is not None:
            h = sum(
                (layer.conv.weight[-1 - j] * text[t - j] for j in range(config.conv_size) if t >= j), torch.zeros(D)
            )
        inputs.append(h)
        chunk.append(h)
        reads.append(attend(layer.working.recall, h, working))
        u = reads[-1]
        if layer.long_term is not None and layer.infer is not None:
            known = attend(layer.long_term.recall, h, [slot for segment in held for slot in segment])
            u = config.share * u + (1 - config.share) * attend(layer.infer.relate, known, reads)
        u = u / (u.square().mean() + config.norm_eps).sqrt() * layer.norm.weight
        outputs.append(layer.out.weight @ u)
        if len(chunk) == config.chunk_size:
            working = written(layer.working, working, chunk, config.topk)
            if layer.long_term is not None:
                held = merged(layer.long_term, held, working)
            chunk, reads = [], []
    return torch.stack(outputs), working, held


@pytest.mark.parametrize(
    "options",
    [{}, {"merge": "sum", "conv_size": 0, "share": 0.2, "chunk_size": 4}, {"long_term": "none", "topk": 3}],
    ids=str,
)
def test_equals_the_token_loop_with_all_outer_gradients(options: dict[str, Any]) -> None:
    layer, config, x = make(**options), PMIConfig(**(SIZES | options)), tokens(2, 12).requires_grad_()
    parts, sizes = [], [4, 1, 5, 2]
    state = None
    for piece in x.split(sizes, 1):
        y, state = layer(piece, state)
        parts.append(y)
    y, inputs = torch.cat(parts, 1), (x, *layer.parameters())
    assert state is not None
    expected, slots, segments = zip(*(loop(layer, row, config) for row in x), strict=True)
    torch.testing.assert_close(y, torch.stack(expected), **CLOSE)
    torch.testing.assert_close(state.params["working"], torch.stack([torch.stack(row) for row in slots]), **CLOSE)
    ends = state.params["working"].square().sum()
    if "long_term" not in state.params:
        assert not any(segments)
    else:
        found = torch.stack([torch.stack([torch.stack(segment) for segment in row]) for row in segments])
        torch.testing.assert_close(state.params["long_term"], found, **CLOSE)
        ends = ends + (state.params["long_term"] * tokens(4, 3, 5)).sum()
    weights = tokens(2, 12, seed=3)
    ours = torch.autograd.grad((y * weights).sum() + ends, inputs)
    total = (torch.stack(expected) * weights).sum() + torch.stack([torch.stack(row) for row in slots]).square().sum()
    if any(segments):
        found = torch.stack([torch.stack([torch.stack(segment) for segment in row]) for row in segments])
        total = total + (found * tokens(4, 3, 5)).sum()
    for gradient, wanted in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)
        assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ each memory


def test_a_slot_takes_in_its_best_tokens_only() -> None:
    torch.manual_seed(0)
    memory = WorkingMemory(4, slots=2, num_heads=1, topk=2).double()
    with torch.no_grad():
        memory.take_in.query.weight.copy_(torch.eye(4))
        memory.take_in.key_value.weight.copy_(torch.cat([torch.eye(4), torch.eye(4)]))
    state = torch.tensor([[[8.0, 0, 0, 0], [0, 8, 0, 0]]]).double()
    x = torch.tensor([[[3.0, 0, 0, 1], [0, 3, 0, 2], [2, 0, 0, 3], [0, 2, 0, 4], [1, 1, 0, 5]]]).double()
    new = memory.write(state, x)
    # Slot 0 asks for the first channel: tokens 0 and 2 win, whatever the others hold. Slot 1: tokens 1 and 3.
    other = x.clone()
    other[:, 4] = other[:, 4] * 0.5
    assert torch.equal(memory.write(state, other), new)
    other = x.clone()
    other[:, 1, 3] = 9.0
    changed = memory.write(state, other)
    assert torch.equal(changed[:, 0], new[:, 0]) and not torch.equal(changed[:, 1], new[:, 1])


def test_left_out_tokens_are_as_if_absent_and_a_row_without_tokens_keeps_its_slots() -> None:
    torch.manual_seed(0)
    memory, x = WorkingMemory(D, 3, HEADS, 2).double(), tokens(3, 7)
    state = memory.write(memory.start(3, torch.float64), tokens(3, 4, seed=2))
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] + [False] * 6, [False] * 7])
    new = memory.write(state, x.masked_fill(~mask.unsqueeze(-1), 1e3), mask)
    torch.testing.assert_close(new[:1], memory.write(state[:1], x[:1, :4]), **CLOSE)
    torch.testing.assert_close(new[1:2], memory.write(state[1:2], x[1:2, :1]), **CLOSE)
    assert torch.equal(new[2], state[2])


def test_the_outer_merge_adds_a_tensor_of_rank_one() -> None:
    """Unfolded segments by slots, an outer product has rank 1; the sum of the published code has more."""
    torch.manual_seed(0)
    state, working = torch.randn(2, 4, 3, D).double(), torch.randn(2, 3, D).double()
    for merge, rank in (("outer", 1), ("sum", 4)):
        memory = LongTermMemory(D, 3, 4, HEADS, merge=merge).double()  # pyright: ignore[reportArgumentType]
        memory.norm = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        change = memory.write(state, working) - state
        assert torch.linalg.matrix_rank(change.flatten(2), atol=1e-9).tolist() == [rank, rank]
    address = LongTermMemory(D, 3, 4, HEADS).double().address(state, working)
    torch.testing.assert_close(address.sum(1), torch.ones(2).double())


def test_a_random_start_is_one_draw_for_all_rows_and_another_each_time() -> None:
    memory = LongTermMemory(D, 3, 4, HEADS, initial="random")
    torch.manual_seed(0)
    first, second = memory.start(3), memory.start(3)
    assert torch.equal(first[0], first[2]) and not torch.equal(first, second)
    layer, x = make(long_term="random"), tokens(2, 12)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert "long_term.initial.slots" not in dict(layer.named_parameters())


def test_both_memories_write() -> None:
    """A fact of the first chunk changes answers three chunks later; without writes it does not."""
    layer, x = make(conv_size=0), tokens(1, 20)
    other = x.clone()
    other[:, 2] += 1
    late = slice(15, 20)
    assert (layer(x)[0] - layer(other)[0])[:, late].abs().max() > 1e-4
    assert torch.equal(layer(x, writes=False)[0][:, late], layer(other, writes=False)[0][:, late])
    _, before = layer(x[:, :4])
    _, after = layer(x[:, :5])
    assert torch.equal(before.params["working"], layer.working.start(1, torch.float64))
    assert not torch.allclose(after.params["working"], before.params["working"])
    assert not torch.allclose(after.params["long_term"], before.params["long_term"])


# ------------------------------------------------------------------------------------------------------ persistence


@pytest.mark.parametrize("persistent", [False, True])
def test_long_term_memory_outlasts_a_reset_only_if_it_is_persistent(persistent: bool) -> None:
    layer, x = make(persistent=persistent), tokens(2, 16)
    reset = torch.zeros(2, 16, dtype=torch.bool)
    reset[0, 11] = True
    y, state = layer(x, reset=reset)
    fresh, _ = layer(x[:1, 11:])
    assert torch.allclose(y[:1, 11:], fresh, **CLOSE) is not persistent
    torch.testing.assert_close(y[1:], layer(x[1:])[0], **CLOSE)
    if persistent:
        _, before = layer(x[:1, :11])
        kept = before._replace(params=before.params | {"working": layer.working.start(1, torch.float64)})
        kept = kept._replace(position=torch.zeros(1).long())
        kept = kept._replace(conv=None if kept.conv is None else torch.zeros_like(kept.conv))
        torch.testing.assert_close(y[:1, 11:], layer(x[:1, 11:], kept)[0], **CLOSE)
        assert not torch.equal(state.params["long_term"][0], before.params["long_term"][0])


def test_a_destroyed_long_term_memory_starts_anew_even_if_it_is_persistent() -> None:
    layer, x = make(persistent=True), tokens(1, 12)
    poisoned, reset = x.clone(), torch.zeros(1, 12, dtype=torch.bool)
    poisoned[:, 1] = float("nan")
    reset[:, 7] = True
    y, _ = layer(poisoned, reset=reset)
    assert y[:, 1:7].isnan().all()
    torch.testing.assert_close(y[:, 7:], layer(x[:, 7:])[0], **CLOSE)


def test_a_model_keeps_persistent_memory_over_documents_of_a_stream_and_saves_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    mixer = {"type": "pmi", "persistent": True} | SIZES
    sizes: dict[str, Any] = {"hidden_size": D, "num_attention_heads": HEADS, "num_hidden_layers": 1, "vocab_size": 20}
    model = HopeForCausalLM(HopeConfig(mixer=mixer, reset_token_id=1, initializer_range=0.5, **sizes)).double().eval()
    ids = torch.randint(2, 20, (1, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 13] = 1
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :13], use_cache=True)
        first.past_key_values.save(tmp_path / "cache.safetensors")
        cache = HopeCache.load(tmp_path / "cache.safetensors", model)
        second = model(ids[:, 13:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, **CLOSE)
        assert not torch.allclose(model(ids[:, 13:]).logits, second)
        # `reset` of a cache begins a document: the working memory is new, the long-term memory stays.
        cache = first.past_key_values
        cache.reset([0])
        torch.testing.assert_close(model(ids[:, 13:], past_key_values=cache).logits, second, **CLOSE)


def test_the_state_is_of_constant_size_and_wide() -> None:
    layer = make().to(torch.bfloat16)
    _, state = layer(torch.randn(2, 7, D).bfloat16())
    assert state.params["working"].dtype == torch.float32 and state.params["long_term"].dtype == torch.float32
    sizes = [tuple(x.shape) for x in tensors_of(state)]
    _, state = layer(torch.randn(2, 30, D).bfloat16(), state)
    assert [tuple(x.shape) for x in tensors_of(state)] == sizes


def test_flops_are_those_of_the_products_of_one_chunk() -> None:
    layer = make(conv_size=0)
    d, s, n, m = D, 5, 3, 12
    take_in = 2 * d * d * (n + 2 * s) + 6 * n * s * d
    recall = [2 * d * d * (s + 2 * size) + 4 * s * size * d for size in (n, m, s)]
    total = take_in + 2 * n * (2 * d) * (2 * d) + sum(recall) + 4 * m * d
    assert layer.flops_per_token(1000) == total // s + 2 * d * d
    assert layer.flops_per_token(2) > layer.flops_per_token(1000)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 4}, "topk=4 is larger than slots=3.*more slots"),
        ({"slots": 9, "topk": 6}, "topk=6 is larger than chunk_size=5.*longer chunks"),
        ({"slots": 0}, "slots"),
        ({"share": 1.5}, "share"),
        ({"merge": "product"}, "merge"),
        ({"long_term": "forever"}, "long_term"),
        ({"long_term": "none", "persistent": True}, "needs a long-term memory"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMIConfig(**(SIZES | options))


def test_widths_that_do_not_divide_are_refused() -> None:
    for build in (
        lambda: PMIConfig().build(9, 2),
        lambda: WorkingMemory(9, num_heads=2),
        lambda: LongTermMemory(9, num_heads=2),
        lambda: TwoSourceRead(9, num_heads=2),
    ):
        with pytest.raises(ValueError, match="choose a number of heads that divides"):
            build()
    with pytest.raises(ValueError, match="topk=5 is larger than slots=4"):
        WorkingMemory(8, slots=4)
    with pytest.raises(ValueError, match="segments=0"):
        LongTermMemory(8, segments=0)
    with pytest.raises(ValueError, match="Did you mean 'outer'"):
        LongTermMemory(8, merge="outr")  # pyright: ignore[reportArgumentType]


def test_inputs_that_do_not_fit_each_other_are_refused() -> None:
    working, long_term, both = WorkingMemory(D, 3, HEADS, 2), LongTermMemory(D, 3, 4, HEADS), TwoSourceRead(D, HEADS)
    x, state = torch.randn(2, 7, D), working.start(2)
    with pytest.raises(ValueError, match="numbers of rows differ: state 3, tokens 2"):
        working.write(working.start(3), x)
    with pytest.raises(ValueError, match=r"mask has the shape \(2, 6\).*pad rows of unequal length"):
        working.write(state, x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tokens must have the shape \[rows, vectors >= 1, 6\], got \(2, 7, 5\)"):
        working.write(state, torch.randn(2, 7, 5))
    with pytest.raises(TypeError, match="not ids"):
        working.write(state, torch.zeros(2, 7, D, dtype=torch.long))
    with pytest.raises(ValueError, match="same slots and width"):
        long_term.write(long_term.start(2), torch.randn(2, 4, D))
    with pytest.raises(ValueError, match="same slots and width"):
        long_term.write(long_term.start(3), state)
    with pytest.raises(ValueError, match="reads of unequal length"):
        both(torch.randn(2, 7, D), torch.randn(2, 6, D))
