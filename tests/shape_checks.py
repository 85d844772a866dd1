"""Runs the package with every annotated shape and type checked; `test_shapes.py` starts it in a process of its own.

The checks are put in while modules are imported, so they need a fresh interpreter. They are not on in the other tests:
they would answer a wrong argument before the package's own error does, and break compiled graphs.
"""

import torch
import transformers
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, install_import_hook

# An int may stand where a float is annotated, as type checkers hold.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

PACKAGES = ["nestlearn.memory", "nestlearn.nn", "nestlearn.models", "nestlearn.data"]


def check_memories() -> None:
    """Every memory of the catalog in both engines, with masks and resets."""
    memory = nestlearn.memory  # pyright: ignore[reportAttributeAccessIssue] - imported by nestlearn.data

    others = [
        memory.AssociativeMemory(memory.MLP(2), memory.ValueShiftRobust(0.1), memory.ElasticNet()),
        memory.AssociativeMemory(memory.MLP(2), memory.L2(), algorithm=memory.OrthogonalizedMomentum(), chunk_size=4),
    ]
    for variant in [*memory.catalog.values(), *others]:
        with_momentum = variant.has_momentum
        for engine in ("reference", "chunked"):
            q, k, v = torch.randn(3, 2, 3, 7, 4)
            lr, retain, momentum = torch.rand(3, 2, 3, 7)
            gates = memory.Gates(lr, retain, momentum if with_momentum else None)
            if memory.objectives.needs_threshold(variant.objective):
                gates = gates._replace(threshold=lr)
            mask, reset = torch.rand(2, 2, 3, 7) < 0.8
            state = variant.init_state((2, 3), 4, 4)
            memory.scan(variant, state, q, k, v, gates, initial=state.params, mask=mask, reset=~reset, engine=engine)


def check_models() -> None:
    """One layer of each kind of mixer: loss, gradient and generation."""
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    mixers = ({"type": "titans_mac", "segment_length": 8}, {"type": "tnt", "local_windows": [16]})
    for mixer in ("self_modifying", "memory", *mixers, "titans_mag", "titans_mal", "attention"):
        config = nestlearn.HopeConfig.from_preset("hope-tiny", **small, mixer=mixer)
        model = nestlearn.HopeForCausalLM(config)
        ids = torch.randint(0, 200, (2, 20))
        model(ids, labels=ids).loss.backward()
        model.generate(ids[:, :3], max_new_tokens=3, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]


def check_thought() -> None:
    """A machine that goes on after a tick, its loss, and halting."""
    from nestlearn import nn

    machine = nn.ContinuousThoughtConfig(classes=3, answers=2, neurons=16, ticks=4).build(8)
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.8
    thoughts, state = machine(x, None, mask)
    nn.ticks_loss(machine(x, state, ticks=1)[0].outputs, torch.zeros(2, 2, dtype=torch.long)).backward()
    machine.answer(x, mask, threshold=float(thoughts.certainty.detach().mean()))


def check_stacking() -> None:
    """A pretrained model with levels of every mode: a segment read, learned from and forgotten."""
    from nestlearn.models import stacking

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    for mode in ("add", "split", "copy"):
        levels = [nestlearn.Level(4, rank=2), nestlearn.Level(8)]
        model = nestlearn.stack_levels(transformers.LlamaForCausalLM(config).eval(), levels, mode=mode)
        ids = torch.randint(0, 61, (2, 4))
        read = stacking.read_segment(model, ids)
        read = stacking.read_segment(model, ids, read.state, read.keys)
        model(ids, level_state=read.state.index_rows([1, 0]).forget([0]))


def check_data() -> None:
    """Tokenizers and packing."""
    data = nestlearn.data
    corpus = data.LocalCorpus("example", "train", (data.Document("to be or not to be " * 20, "a"),))
    for tokenizer in (data.byte_tokenizer(), data.train_bpe(corpus, 262)):
        data.bytes_per_token(tokenizer)
        data.pack(corpus, tokenizer, 8)[0]


def check_that_checks_are_on() -> None:
    """A wrong argument is noticed, and its function named."""
    try:
        nestlearn.data.pack(3, None, 8)  # type: ignore[arg-type]
    except TypeCheckError as error:
        assert "nestlearn.data.packing.pack" in str(error)
    else:
        raise AssertionError("a number was taken for a corpus")


if __name__ == "__main__":
    with install_import_hook(PACKAGES, "__main__.checked"):
        import nestlearn.data

    check_that_checks_are_on()
    check_memories()
    check_models()
    check_thought()
    check_stacking()
    check_data()
