"""A small pretrained model for the reading benchmarks: a Llama that knows the form of facts, questions and lessons.

    python benchmarks/reading_base.py --out runs/reading-base

It is trained on documents of three kinds, and the benchmarks ask for none of them: facts about a fixed set of people,
as statements and as questions with answers (so that it can answer from its weights); facts about people that appear in
one document only (so that it can answer from its context); and lessons in invented languages, a new one each time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import islice

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import parse, parser, update
from nestlearn.data import LocalCorpus, train_bpe
from nestlearn.data.documents import Document
from nestlearn.data.invented_facts import invent_facts
from nestlearn.data.invented_languages import InventedLanguage
from nestlearn.evals.translation import lesson_lines

WORLD_SEED, FIRST_SEED = 1_000_000, 1_000_000
"""Seeds from here on are for training; the benchmarks use smaller ones."""
WORLD_PEOPLE = 200
BATCH, LENGTH = 8, 512


def known_world(people: int) -> list[list[str]]:
    """The lines about each person: statements, and questions with their answers."""
    lines: dict[str, list[str]] = {}
    for fact in invent_facts(people, WORLD_SEED):
        said = [fact.statement(0), fact.statement(1), f"{fact.question} {fact.value}"]
        lines.setdefault(fact.name, []).extend(said)
    return list(lines.values())


def document(generator: random.Random, world: list[list[str]]) -> str:
    """One training document."""
    kind = generator.random()
    if kind < 0.5:
        lines = [line for person in generator.sample(world, 6) for line in generator.sample(person, 6)]
        generator.shuffle(lines)
        return "\n".join(lines) + "\n"
    seed = FIRST_SEED + generator.randrange(10**9)
    if kind < 0.7:
        facts = invent_facts(4, seed)
        told = [fact.statement(generator.randrange(2)) for fact in facts]
        asked = [f"{fact.question} {fact.value}" for fact in facts]
        generator.shuffle(told)
        generator.shuffle(asked)
        return "\n".join(told + asked) + "\n"
    language = InventedLanguage.invent(seed)
    words = generator.sample(language.dictionary(), 8)
    return lesson_lines(words) + lesson_lines(list(islice(language.pairs(seed), 16)))


def main(words: Sequence[str] | None = None) -> None:
    """Train the model and save it."""
    made = parser(__doc__, "runs/reading-base")
    made.add_argument("--steps", type=int, default=2500)
    options = parse(made, words)
    torch.manual_seed(0)
    generator, world = random.Random(0), known_world(WORLD_PEOPLE)
    documents = [Document(document(generator, world), str(i)) for i in range(400)]
    tokenizer = train_bpe(LocalCorpus("reading", "train", tuple(documents)), 512)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return max(min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / options.steps)), 1 / 20)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream, wanted = [], BATCH * (LENGTH + 1)
    for step in range(options.steps):
        while len(stream) < wanted:
            text = document(generator, world)
            stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids, stream = torch.tensor(stream[:wanted]).view(BATCH, -1), stream[wanted:]
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        update(model, loss, optimizer, schedule)
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss.item():.3f} nats", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
