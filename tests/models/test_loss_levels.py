"""HopeForCausalLM with levels that its own next-token loss teaches while it reads."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tests.mixers import KINDS, SMALL, slow_unless
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nestlearn import HopeCache, HopeForCausalLM, flops
from nestlearn.memory import newton_schulz
from nestlearn.models.modeling import HopeModel
from nestlearn.nn.cms.loss import LossLevel

VOCABULARY = 50
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
DELTA = {"period": 3, "expansion": 1, "rule": "delta", "lr": 0.5, "retain": 0.8}
SYSTEMS = {
    "sequential": {"cms": [{"period": 3, "expansion": 1, "lr": 0.3, "clip": 2.0}, {"expansion": 1}]},
    "three": {"cms": [DELTA, {"period": 6, "hidden": 9, "rule": "momentum", "lr": 0.5}, {"expansion": 1}]},
    "nested": {
        "cms": [{"period": 2, "expansion": 1, "lr": 0.3}, {"period": 4, "expansion": 1, "lr": 0.3}],
        "cms_variant": "nested",
        "cms_transfer": 0.7,
    },
    "independent": {
        "cms": [
            {"period": 3, "rank": 2, "lr": 0.5},
            {"period": 6, "expansion": 1, "rule": "orthogonalized", "lr": 0.3},
        ],
        "cms_variant": "independent",
        "ffn_activation": "gelu",
    },
}


@pytest.fixture
def make(build):
    """make(system, mixer, **fields): a model that learns visibly from a few tokens."""

    def made(system: str = "three", mixer: str = "attention", **fields) -> HopeForCausalLM:
        fields = {"num_hidden_layers": 2, "conv_size": 0, "cms_signal": "loss", "cms_meta": "second"} | fields
        model = build(mixer, **SYSTEMS[system] | fields)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LossLevel):
                    module.gate.weight.normal_(0, 0.3)
                    for name, weight in module.initial.items():
                        if name.endswith("_B"):
                            weight.normal_(0, 0.3)
        return model

    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------------- the oracle


class Learner:
    """One row of one level: dense weights, token by token."""

    def __init__(self, level: LossLevel) -> None:
        self.level, self.seen = level, 0
        self.start = dict(level.initial.items())
        self.weights, self.anchor = dict(self.start), dict(self.start)
        self.momentum = {n: torch.zeros_like(w) for n, w in self.start.items()}
        self.pending = torch.zeros(())
        kept = (
            torch.sigmoid(level.keep.logit)
            if level.keep.logit is not None
            else torch.tensor(level.level.retain, dtype=torch.float64)
        )
        self.retain = kept ** (1 / level.period)

    def read(self, x: Tensor) -> Tensor:
        """Tokens ``[t, d]``, each with weights of its own, so that its gradient is its own."""
        self.inputs, self.x = {}, x
        self.own = {n: w.expand(len(x), *w.shape).clone() for n, w in self.anchor.items()}
        self.own = {n: w if w.requires_grad else w.requires_grad_() for n, w in self.own.items()}

        def apply(name: str, u: Tensor) -> Tensor:
            self.inputs[name] = u
            return torch.einsum("toi,ti->to", self.own[name], u)

        def linear(name: str, u: Tensor) -> Tensor:
            if self.level.fixed is None:
                return apply(name, u)
            return u @ self.level.fixed[name].T + apply(f"{name}_B", apply(f"{name}_A", u))

        if self.level.network.activation == "gelu":
            return linear("down", F.gelu(linear("up", x)))
        return linear("down", F.silu(linear("gate", x)) * linear("up", x))

    def learn(self, gradients: dict[str, Tensor], constant: bool) -> None:
        settings, period = self.level.level, self.level.period
        inputs = {n: u.detach() if constant else u for n, u in self.inputs.items()}
        x = self.x.detach() if constant else self.x
        beta, size = settings.momentum ** (1 / period), 1.0
        if settings.clip is not None:
            norm = torch.stack([g.sum(0).square().sum() for g in gradients.values()]).sum().sqrt()
            size = torch.clamp(settings.clip / norm, max=1)
        for t, token in enumerate(x):
            self.seen += 1
            eta = settings.lr * 2 * torch.sigmoid(self.level.gate.weight[0] @ token + self.level.gate.bias[0])
            last = self.seen % period == 0
            if settings.rule == "orthogonalized":
                self.pending = self.retain * self.pending + eta / period
            for name, w in self.weights.items():
                g, z = size * gradients[name][t], inputs[name][t]
                distance = w - self.start[name]
                kept = self.start[name] + self.retain * distance
                if settings.rule == "delta":
                    step = eta / (1 + eta * (z @ z))
                    kept = kept - step * torch.outer(distance @ z, z) - step * g
                elif settings.rule == "momentum":
                    self.momentum[name] = beta * self.momentum[name] - eta * (1 - beta) * g
                    kept = kept + self.momentum[name]
                elif settings.rule == "orthogonalized":
                    self.momentum[name] = beta * self.momentum[name] - g
                    kept = kept + self.pending * newton_schulz(self.momentum[name], 5) if last else kept
                else:
                    kept = kept - eta * g
                self.weights[name] = kept
            if last:
                self.anchor, self.pending = dict(self.weights), torch.zeros(())
            if self.level.outer and self.seen % self.level.outer == 0:
                rho = self.level.transfer
                self.start = {n: w + rho * (self.weights[n] - w) for n, w in self.start.items()}
                self.weights, self.anchor = dict(self.start), dict(self.start)
                self.momentum = {n: torch.zeros_like(w) for n, w in self.start.items()}


def system_output(cms, learners: list[Learner | None], x: Tensor) -> Tensor:
    """The levels of one layer for tokens ``[t, d]``."""
    total = torch.zeros_like(x)
    for i, learner in enumerate(learners):
        here = cms.norms[i](x if cms.aggregation is not None else x + total)
        y = cms.networks[i](here[None])[0][0] if learner is None else learner.read(here)
        if cms.aggregation is not None:
            y = (
                y.view(len(x), cms.aggregation.weight.shape[1], -1) * cms.aggregation.weight[i][None, :, None]
            ).flatten(1)
        total = total + y
    return total


def loop(model: HopeForCausalLM, row: Tensor, constant: bool = False) -> Tensor:
    """Logits of one row, segment by segment with dense per-token gradients by autograd."""
    blocks, states = list(model.model.layers), [None] * len(model.model.layers)
    learners = [[Learner(n) if isinstance(n, LossLevel) else None for n in b.cms.networks] for b in blocks]
    size, outputs = model.model.segment_length, []
    for segment in row.split(size):
        x = model.model.embed_tokens(segment)
        for i, block in enumerate(blocks):
            y, states[i] = block.mixer(block.mixer_norm(x)[None], states[i])
            x = x + y[0]
            x = x + system_output(block.cms, learners[i], block.cms_norm(x))
        logits = model.lm_head(model.model.norm(x))
        outputs.append(logits)
        if len(segment) < size:
            break
        loss = F.cross_entropy(logits[:-1], segment[1:], reduction="sum")
        each = [learner for layer in learners for learner in layer if learner is not None]
        own = [(k, n, w) for k, learner in enumerate(each) for n, w in learner.own.items()]
        found = torch.autograd.grad(loss, [w for *_, w in own], create_graph=True)
        gradients: list[dict[str, Tensor]] = [{} for _ in each]
        for (k, n, _), gradient in zip(own, found, strict=True):
            gradients[k][n] = gradient.detach() if constant else gradient
        for learner, gradient in zip(each, gradients, strict=True):
            learner.learn(gradient, constant)
    return torch.cat(outputs)


@pytest.mark.parametrize("meta", ["first", "second"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_equals_the_token_loop_with_all_outer_gradients(make, ids, system, meta):
    model = make(system, cms_meta=meta)
    probe = torch.randn(2, 14, VOCABULARY, dtype=torch.float64)
    wanted = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.stack([loop(model, row, meta == "first") for row in ids[:2]])
        theirs = torch.autograd.grad((expected * probe).sum(), list(wanted.values()), allow_unused=True)
    logits = model(ids[:2]).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    ours = torch.autograd.grad((logits * probe).sum(), list(wanted.values()), allow_unused=True)
    for name, got, want in zip(wanted, ours, theirs, strict=True):
        assert got is not None and want is not None and want.abs().sum() > 0, name
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mixer", ["attention", "self_modifying", "titans", "titans_mag"])
def test_second_order_gradients_are_those_of_finite_differences(make, ids, mixer):
    """Through attention, and through the memories' own fused gradients, differentiated twice."""
    model = make("three", mixer, conv_size=2, num_hidden_layers=1)
    probe = torch.randn(2, 14, VOCABULARY, dtype=torch.float64)
    (model(ids[:2]).logits * probe).sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith(
            ("initial.map_up", "gate.weight", "keep.logit", "embed_tokens.weight", "mixer_norm.weight")
        ):
            continue
        assert parameter.grad is not None
        direction, losses = torch.randn_like(parameter), []
        slope = (parameter.grad * direction).sum()
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append((model(ids[:2], use_cache=False).logits * probe).sum())
                parameter.sub_(direction, alpha=step)
        torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-5, rtol=1e-5, atol=1e-6, msg=name)
        assert slope != 0


def test_first_order_leaves_the_path_through_the_losses_out(make, ids):
    gradients = {}
    for meta in ("first", "second"):
        model = make("three", cms_meta=meta)
        model(ids, labels=ids).loss.backward()
        gradients[meta] = model.model.layers[0].mixer.qkv.weight.grad
    assert not torch.allclose(gradients["first"], gradients["second"], rtol=1e-3)


# ------------------------------------------------------------------------------------------------------- streams


def stream(model: HopeForCausalLM, pieces, cache: HopeCache | None = None, **options) -> tuple[Tensor, HopeCache]:
    cache = HopeCache() if cache is None else cache
    return torch.cat([model(piece, past_key_values=cache, **options).logits for piece in pieces], 1), cache


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("system", SYSTEMS)
def test_any_split_equals_one_call(make, ids, system, mode):
    model = make(system)
    whole = model(ids).logits.detach()
    for sizes in ([14], [8, 6], [1] * 14, [7, 1, 6]):
        with mode():
            logits, cache = stream(model, ids.split(sizes, 1))
        torch.testing.assert_close(logits.detach(), whole, **TOLERANCE)
        assert [s.ids.shape[1] for s in cache.segments] == (
            [14 % model.model.segment_length] if 14 % model.model.segment_length else []
        )


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("mixer", ["attention", "sliding_attention", "self_modifying"])
def test_padding_phases_and_resets_equal_separate_runs(make, ids, system, mixer):
    model = make(system, mixer, num_hidden_layers=1, conv_size=2)
    lengths, more = (14, 5, 11), ids.flip(1)[:, :8]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padded[row, 14 - length :], mask[row, 14 - length :] = ids[row, :length], 1
    reset[2, 3 + 4] = True
    with torch.no_grad():
        cache = HopeCache()
        logits = model(padded, attention_mask=mask, reset=reset, past_key_values=cache).logits
        cache.reset([1])
        later = model(more, past_key_values=cache).logits
        for row, length in enumerate(lengths):
            pieces = [ids[row : row + 1, :length]] if row < 2 else [ids[2:, :4], ids[2:, 4:11]]
            alone = torch.cat([model(piece).logits for piece in pieces], 1)
            torch.testing.assert_close(logits[row : row + 1, 14 - length :], alone, **TOLERANCE)
            before = pieces[-1] if row != 1 else ids[:1, :0]
            alone = model(torch.cat([before, more[row : row + 1]], 1)).logits[:, -8:]
            torch.testing.assert_close(later[row : row + 1], alone, **TOLERANCE)


REAL = {
    "left": [*range(4, 14)],
    "right": [*range(10)],
    "both": [*range(2, 12)],
    "middle": [*range(4), *range(8, 14)],
    "unequal": [[*range(5, 14)], [*range(2, 4), *range(8, 11)]],
}


@pytest.mark.parametrize(
    ("mixer", "where"),
    [
        slow_unless(mixer == "attention" or (mixer in KINDS and where == "unequal"), mixer, where)
        for mixer in SMALL
        for where in REAL
    ],
)
def test_columns_in_which_every_row_is_padding(make, ids, mixer, where):
    """Logits, and what a cache has learned, are those of the text alone."""
    model, more = make("three", mixer, num_hidden_layers=1), ids.flip(1)[:2, :5]
    columns = REAL[where] if where == "unequal" else [REAL[where]] * 2
    mask = torch.zeros(2, 14, dtype=torch.long)
    for row, real in enumerate(columns):
        mask[row, real] = 1
    with torch.no_grad():
        padded = ids[:2] * mask
        cache = HopeCache()
        logits = model(padded, attention_mask=mask, past_key_values=cache).logits
        later = model(more, past_key_values=cache).logits
        for row, real in enumerate(columns):
            alone = model(torch.cat([ids[row, real], more[row]])[None]).logits[0]
            torch.testing.assert_close(logits[row, real], alone[:-5], **TOLERANCE)
            torch.testing.assert_close(later[row], alone[-5:], **TOLERANCE)


def test_future_tokens_and_other_rows_change_no_bit(make, ids):
    model = make("three").float()
    with torch.no_grad():
        before = model(ids).logits
        changed = ids.clone()
        changed[:, 9:] = 5
        assert torch.equal(model(changed).logits[:, :9], before[:, :9])
        changed = ids.clone()
        changed[1] = 7
        assert torch.equal(model(changed).logits[::2], before[::2])
        assert not torch.equal(model(changed).logits[1], before[1])


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_equals_evaluation(make, ids, system):
    model = make(system)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(model.train()(ids).logits, expected, **TOLERANCE)
    model.activation_checkpointing_enable()
    logits = model(ids, labels=ids)
    torch.testing.assert_close(logits.logits, expected, **TOLERANCE)
    logits.loss.backward()
    checkpointed = model.model.embed_tokens.weight.grad.clone()
    model.activation_checkpointing_disable()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(checkpointed, model.model.embed_tokens.weight.grad, **TOLERANCE)


def test_packed_documents_equal_separate_ones(make, ids):
    model = make("three").train()
    row = ids.flatten()[None, :25].clone()
    reset = torch.zeros_like(row, dtype=torch.bool)
    reset[0, [4, 11, 12]] = True
    expected = torch.cat([model(part).logits for part in row.tensor_split([4, 11, 12], 1)], 1)
    torch.testing.assert_close(model(row, reset=reset).logits, expected, **TOLERANCE)
    # The same with a cache, which keeps the row in one piece.
    torch.testing.assert_close(model(row, reset=reset, use_cache=True).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("signal", ["loss", "local"])
def test_a_level_can_outlive_its_document(make, ids, signal):
    levels = [{"period": 2, "expansion": 1, "lr": 0.3}, {"period": 4, "expansion": 1, "lr": 0.3, "reset": False}]
    model = make("three", cms=levels, cms_signal=signal)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[:, 6] = True
    with torch.no_grad():
        cut = model(ids, reset=reset).logits
        fresh = torch.cat([model(part).logits for part in (ids[:, :6], ids[:, 6:])], 1)
        cache = HopeCache()
        model(ids[:, :6], past_key_values=cache)
        kept = cache.layers[0].cms.levels[1].anchor["up"].clone()
        model(ids[:, 6:7], past_key_values=cache, reset=reset[:, 6:7])
    torch.testing.assert_close(cut[:, :6], fresh[:, :6], **TOLERANCE)
    assert not torch.allclose(cut[:, 6:], fresh[:, 6:], atol=1e-4)
    fast, slow = cache.layers[0].cms.levels
    assert torch.equal(slow.anchor["up"], kept)
    assert torch.equal(fast.anchor["up"][0], model.model.layers[0].cms.networks[0].initial["up"])


# ---------------------------------------------------------------------------------------------- caches and writing


def test_a_cache_in_the_middle_of_a_segment(make, ids, tmp_path):
    model = make("three")
    with torch.no_grad():
        whole = model(ids).logits
        _, cache = stream(model, [ids[:, :8]])
        cache.save(tmp_path / "cache")
        loaded = HopeCache.load(tmp_path / "cache", model)
        fork = cache.fork()
        for other in (loaded, fork, cache.detach(), cache.to("cpu")):
            logits, _ = stream(model, ids[:, 8:].split(1, 1), other)
            torch.testing.assert_close(logits, whole[:, 8:], **TOLERANCE)
        assert cache.segments[0].ids.shape == (3, 2)
        order = torch.tensor([2, 0, 0, 1])
        cache.reorder_cache(order)
        logits, _ = stream(model, ids[order, 8:].split(3, 1), cache)
        torch.testing.assert_close(logits, whole[order, 8:], **TOLERANCE)


def test_generation_goes_on_learning(make, ids):
    """Greedy and beam search from left-padded prompts equal one forward over what was generated."""
    model = make("three", "sliding_attention")
    prompt, mask = ids[:2, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    prompt[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(prompt, attention_mask=mask, **options)
    for row, skip in ((0, 0), (1, 3)):
        with torch.no_grad():
            logits = model(text[row : row + 1, skip:]).logits
        assert torch.equal(logits[0, 6 - skip : -1].argmax(-1), text[row, 7:])
    beams = model.generate(ids[:2, :7], num_beams=3, return_dict_in_generate=True, output_scores=True, **options)
    with torch.no_grad():
        likelihood = torch.log_softmax(model(beams.sequences).logits, -1)[:, 6:-1]
    picked = likelihood.gather(2, beams.sequences[:, 7:, None]).squeeze(2).sum(1)
    torch.testing.assert_close(picked / 6, beams.sequences_scores.double(), rtol=1e-4, atol=1e-4)


def test_writes_off_reads_the_initial_levels(make, ids):
    model = make("three")
    with torch.no_grad():
        off = model(ids, writes=False).logits
        for module in model.modules():
            if isinstance(module, LossLevel):
                module.gate.bias.fill_(-1e4)
                module.gate.weight.zero_()
        torch.testing.assert_close(model(ids).logits, off, **TOLERANCE)


def test_steps_of_tokens_read_with_writes_off_are_zero(make, ids):
    """What was learned before is kept as after any tokens; the period goes on."""
    model = make("three")
    with torch.no_grad():
        whole, cache = stream(model, [ids[:, :6]])
        before = cache.layers[0].cms.levels[0]
        model(ids[:, 6:9], past_key_values=cache, writes=False)
        after = cache.layers[0].cms.levels[0]
    start = model.model.layers[0].cms.networks[0].initial["up"]
    torch.testing.assert_close(after.params["up"] - start, 0.8 * (before.params["up"] - start), **TOLERANCE)
    assert whole.shape[1] == 6 and after.position.tolist() == before.position.tolist() == [0, 0, 0]
    # In the middle of a segment the other tokens still teach.
    with torch.no_grad():
        _, cache = stream(model, [ids[:, :1]])
        model(ids[:, 1:2], past_key_values=cache, writes=False)
        model(ids[:, 2:3], past_key_values=cache)
    assert not torch.equal(cache.layers[0].cms.levels[0].anchor["up"][0], start)


def test_reading_lowers_the_loss_of_what_is_read_again(make):
    """A cycle of seven tokens in segments of eight, by an untrained model: the losses teach it."""
    model = make(
        "three", cms=[{"period": 8, "expansion": 2, "lr": 0.05, "clip": 20.0, "retain": 1.0}, {"expansion": 1}]
    )
    ids = torch.arange(3, 10).repeat(14)[None]
    with torch.no_grad():
        for writes, better in ((True, True), (False, False)):
            logits = model(ids, writes=writes).logits
            losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
            assert (losses[-14:].mean() < 0.6 * losses[:14].mean()) == better


def test_hidden_states_of_all_layers(make, ids):
    model = make("three")
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits, **TOLERANCE)
        assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))


def test_a_level_that_names_no_step_takes_one_that_suits_its_signal(make):
    for signal, lr, expected in (("loss", {}, 0.01), ("local", {}, 1.0), ("loss", {"lr": 1.0}, 1.0)):
        levels = [{"period": 4, "expansion": 1} | lr, {"period": 8, "expansion": 1} | lr]
        model = make("three", cms=levels, cms_signal=signal, cms_variant="sequential")
        assert [level.level.lr for level in model.model.layers[0].cms.networks] == [expected] * 2


def test_what_cannot_be_taught_is_refused(make, ids):
    model = make("three")
    with pytest.raises(ValueError, match="hold no targets"):
        model(inputs_embeds=torch.zeros(1, 4, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="an output layer"):
        HopeModel(model.config)(ids)
    with pytest.raises(ValueError, match="must be a multiple"):
        make("three", cms=[{"period": 4}, {"period": 6}])
    for field in ("cms_variant", "cms_signal", "cms_meta", "cms_transfer_by"):
        with pytest.raises(ValueError, match=f"{field}='other' must be"):
            make("three", **{field: "other"})
    cache = HopeCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="cms_signal"):
            make("three", cms_signal="local", ffn_activation="gelu", cms=[{"expansion": 1}])(ids, past_key_values=cache)


def test_levels_whose_period_never_ends_write_nothing(make, ids):
    """In a sequence that nobody goes on from, a level costs its read until the last of its periods that end."""
    cost = {}
    for slow in (6, 12, 15):
        model = make("three", cms=[{"period": 3, "expansion": 1}, {"period": slow, "expansion": 2}], cms_meta="first")
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False)
        cost[slow] = counter.get_total_flops()
        model(ids, use_cache=True)
    level = model.model.layers[0].cms.networks[1]
    # A token of three rows: its factors, and the gate of its step.
    written = 2 * 3 * (sum(w.numel() for w in level.initial.values()) + level.gate.weight.numel())
    # 14 tokens hold two periods of 6, one of 12, none of 15; both layers write.
    assert cost[6] == cost[12] == cost[15] + 2 * 12 * written


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_half_precision_keeps_fast_weights_in_float32(make, ids, mode):
    model = make("three").float().train()
    model = model.bfloat16() if mode == "bfloat16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        model(ids, labels=ids).loss.backward()
        with torch.inference_mode():
            cache = model.eval()(ids, use_cache=True).past_key_values
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {w.dtype for w in cache.layers[0].cms.levels[0].params.values()} == {torch.float32}


def test_flops_contain_the_backward_pass_of_segments(make):
    """Counted against a forward pass; the rest is what attention computes beyond its causal half."""
    model = make("sequential", num_hidden_layers=3)
    tokens = torch.randint(3, VOCABULARY, (1, 61))
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    counted = counter.get_total_flops() / 61
    assert abs(flops(model.config, 61) / counted - 1) < 0.25
    assert flops(model.config, 61) > 1.8 * flops(model.config, 3)
