"""A small pretrained model for the reading benchmarks: a Llama that knows the form of facts, questions and lessons.

    python benchmarks/reading_base.py --out runs/reading-base

It is trained on documents of three kinds, none of which the benchmarks ask for: what is known of a fixed world of
people, as statements and as questions with answers (so that it can answer from its weights); facts about people met in
one document only (so that it can answer from its context); and lessons in invented languages, a new one each time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn.allocator import tune_allocator
from nestlearn.data import LocalCorpus, train_bpe
from nestlearn.data.documents import Document
from nestlearn.data.invented_facts import invent_facts
from nestlearn.data.invented_languages import InventedLanguage
from nestlearn.evals.translation import lesson_lines

WORLD_SEED, FIRST_SEED = 1_000_000, 1_000_000
"""Seeds from here on are for training; the benchmarks use smaller ones."""
WORLD_PEOPLE = 200


def known_world(people: int) -> list[list[str]]:
    """For every person of the world, the lines that can be said: statements, and questions with their answers."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reading-base"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    generator, world = random.Random(0), known_world(WORLD_PEOPLE)
    documents = [Document(document(generator, world), str(i)) for i in range(400)]
    tokenizer = train_bpe(LocalCorpus("reading", "train", tuple(documents)), 512)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=3 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=4, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    started, stream = time.perf_counter(), []
    for step in range(options.steps):
        share = step / options.steps
        rate = options.learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, options.learning_rate / 20)
        wanted = options.batch_size * (options.length + 1)
        while len(stream) < wanted:
            text = document(generator, world)
            stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids, stream = torch.tensor(stream[:wanted]).view(options.batch_size, -1), stream[wanted:]
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step} loss {loss.item():.3f} nats {seconds:.0f} s", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
