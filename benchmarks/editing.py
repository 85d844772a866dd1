"""Facts that a pretrained model knows are replaced by others: by closed forms, by fine-tuning, by practice.

    make pretrained
    pip install countryinfo
    python benchmarks/editing.py --data ../shared/data                       # all cells; each is a record
    python benchmarks/editing.py --data ../shared/data --edits 1 2 --out /tmp/editing.jsonl

Facts are capitals, continents and languages of countries, one for each country, with the answer of another country as
target. SmolLM2 knows a fact if the first token of its answer is likelier than those of all other answers of the kind.

- ``efficacy``: the target is likelier than the true answer, in nats per token; ``greedy``: the model says the target;
- ``paraphrase``: as efficacy, after two other wordings; ``derived``: after a statement that follows from the fact;
- ``neighbours``: facts about other countries that are known as before (all are, without edits);
- ``score``: harmonic mean of efficacy, paraphrase and neighbours;
- ``fluency``: entropy of bigrams and trigrams of continuations in bits, as in ROME (arXiv 2202.05262);
- ``damage``: rise of nats per token of unrelated text, the mean of Wikipedia, code and a play.

Arms: ``intattn`` (balance measured, or ``alpha``), ``memit``, ``alphaedit``, ``rome``; ``finetune``: AdamW on all MLPs;
``lora``: rank 16; ``practice``: a session practises the sentences. Their rates are chosen by ``score`` on other facts.
The search of hidden states is the same for the closed forms that end at one layer. It runs once.
"""

from __future__ import annotations

import argparse as source_of_code
import inspect
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common import RESULTS, Record, Records, parse, parser, table
from nestlearn import Fact, MemorySession, pretrained, stack_levels
from nestlearn.cli.stack import LEVELS, parse_levels
from nestlearn.continual import LoRA, protect
from nestlearn.continual.editing import edit as editing
from nestlearn.data.control_tokens import LiteralText

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "hu": "Hungarian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sr": "Serbian", "sv": "Swedish", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
CONTINENTS = ("Africa", "Asia", "Europe")
RATES = {"finetune": (1e-5, 3e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3), "practice": (1.0, 3.0)}
STEPS = 25
CLOSED = ("intattn", "memit", "alphaedit", "rome")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURES = ("efficacy", "greedy", "paraphrase", "derived", "neighbours", "score", "fluency", "damage")


class Wordings(NamedTuple):
    """Beginnings of sentences about a country: the edited one, two others, and one that follows from the fact."""

    prompt: str
    others: tuple[str, str]
    derived: str


RELATIONS = {
    "capital": Wordings(
        "The capital of {} is",
        ("The capital city of the country {} is", "{}'s government has its seat in the city of"),
        "The parliament of {} meets in",
    ),
    "continent": Wordings(
        "{} is a country on the continent of",
        ("On a map of the world, {} is found in", "{} belongs to the continent of"),
        "The countries around {} are all in",
    ),
    "language": Wordings(
        "The main language of {} is",
        ("The official language of {} is", "In {}, most people speak"),
        "Most newspapers in {} are written in",
    ),
}


class Known(NamedTuple):
    """A fact about a country, and the target that replaces it (empty for neighbours)."""

    country: str
    relation: str
    answer: str
    target: str = ""

    @property
    def fact(self) -> Fact:
        return Fact(RELATIONS[self.relation].prompt.format(self.country), self.target, self.country)


# -- what the model says ------------------------------------------------------------------------------------------


@dataclass
class Asker:
    """Asks a model, whatever has been learned in it."""

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        start = self.tokenizer.bos_token_id
        self.literal, self.start = LiteralText(self.tokenizer), [] if start is None else [int(start)]

    def ids(self, text: str) -> list[int]:
        return self.literal.ids(text)

    @torch.no_grad()
    def logs(self, rows: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """``-ln p`` per token of each answer after its prompt, and whether it is what the model says."""
        found = []
        for at in range(0, len(rows), 50):
            pairs = [([*self.start, *self.ids(a)], self.ids(f" {b}")) for a, b in rows[at : at + 50]]
            logits = self.model(input_ids=_filled([a + b for a, b in pairs]), use_cache=False).logits
            for row, (asked, answer) in zip(logits, pairs, strict=True):
                own, wanted = row[len(asked) - 1 : len(asked) + len(answer) - 1].float(), torch.tensor(answer)
                found.append((F.cross_entropy(own, wanted).item(), bool((own.argmax(-1) == wanted).all())))
        return found

    @torch.no_grad()
    def knows(self, facts: Sequence[Known], answers: dict[str, list[str]]) -> list[bool]:
        """Whether the first token of the answer is the likeliest of those of all answers of the kind."""
        firsts = {kind: torch.tensor(sorted({self.first(a) for a in many})) for kind, many in answers.items()}
        found = []
        for at in range(0, len(facts), 50):
            part = facts[at : at + 50]
            asked = [[*self.start, *self.ids(RELATIONS[f.relation].prompt.format(f.country))] for f in part]
            logits = self.model(input_ids=_filled(asked), use_cache=False).logits
            for row, fact, ids in zip(logits, part, asked, strict=True):
                among = firsts[fact.relation]
                found.append(int(among[row[len(ids) - 1, among].argmax()]) == self.first(fact.answer))
        return found

    def first(self, answer: str) -> int:
        return self.ids(f" {answer}")[0]

    @torch.no_grad()
    def entropy(self, prompts: Sequence[str], tokens: int = 40) -> float:
        """Entropy of bigrams (weight 1/3) and trigrams (2/3) of greedy continuations, in bits."""
        total = 0.0
        for prompt in prompts:
            ids = torch.tensor([[*self.start, *self.ids(prompt)]])
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                pad_token_id=self.tokenizer.eos_token_id,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            total += (_entropy(made, 2) * 2 + _entropy(made, 3) * 4) / 6
        return total / len(prompts)

    @torch.no_grad()
    def nats(self, texts: dict[str, Tensor]) -> dict[str, float]:
        """Nats per token of unrelated text."""
        return {name: self.model(ids[None], labels=ids[None]).loss.item() for name, ids in texts.items()}


def _filled(rows: Sequence[list[int]]) -> Tensor:
    """Rows filled up at the right, where no earlier token sees it."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _entropy(tokens: Sequence[int], size: int) -> float:
    counts = Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values()) if total else 0.0


# -- facts --------------------------------------------------------------------------------------------------------


def all_facts() -> list[Known]:
    """Capitals, continents and first languages of countries, by the package ``countryinfo``."""
    from countryinfo import all_countries  # pyright: ignore[reportMissingImports]

    found = []
    for country in (one.info() for one in all_countries()):
        name = country["name"]
        if country.get("population", 0) < 1e6:
            continue
        place = country.get("region", "")
        spoken = country.get("languages") or [""]
        values = {
            "capital": country.get("capital", ""),
            "continent": place if place in CONTINENTS else "",
            "language": LANGUAGES.get(spoken[0], ""),
        }
        found += [Known(name, kind, value) for kind, value in values.items() if value and value not in name]
    return found


def chosen_facts(asker: Asker, edits: int, tuning: int, near: int, seed: int) -> Record:
    """Facts to edit, facts to choose rates on, and neighbours: about different countries, all known by the model."""
    everything = all_facts()
    answers = {kind: sorted({f.answer for f in everything if f.relation == kind}) for kind in RELATIONS}
    good = [f for f, known in zip(everything, asker.knows(everything, answers), strict=True) if known]
    counts = Counter(f.relation for f in good)
    draw = random.Random(seed)
    countries = draw.sample(sorted({f.country for f in good}), len({f.country for f in good}))
    taken = [draw.choice([f for f in good if f.country == name]) for name in countries]
    # A target differs from the true answer from its first token on.
    known_answers = {kind: sorted({f.answer for f in good if f.relation == kind}) for kind in RELATIONS}
    replaced = [
        f._replace(
            target=draw.choice([a for a in known_answers[f.relation] if asker.first(a) != asker.first(f.answer)])
        )
        for f in taken[: edits + tuning]
    ]
    if len(replaced) < edits + tuning:
        raise ValueError(f"the model knows facts about {len(taken)} countries, fewer than {edits} + {tuning}.")
    left = set(countries[edits + tuning :])
    others = [f for f in good if f.country in left]
    neighbours = draw.sample(others, min(near, len(others)))
    return {
        "edited": replaced[:edits],
        "tuning": replaced[edits:],
        "neighbours": neighbours,
        "answers": answers,
        "known": dict(counts),
    }


# -- measures -----------------------------------------------------------------------------------------------------


def examine(
    asker: Asker, facts: Sequence[Known], drawn: Record, texts: dict[str, Tensor], base: Record | None
) -> Record:
    """All measures of the model as it is now."""

    def beats(wording: Callable[[Wordings], str]) -> tuple[float, float]:
        prompts = [wording(RELATIONS[f.relation]).format(f.country) for f in facts]
        new = asker.logs([(p, f.target) for p, f in zip(prompts, facts, strict=True)])
        old = asker.logs([(p, f.answer) for p, f in zip(prompts, facts, strict=True)])
        wins = [a < b for (a, _), (b, _) in zip(new, old, strict=True)]
        return sum(wins) / len(wins), sum(says for _, says in new) / len(new)

    efficacy, greedy = beats(lambda w: w.prompt)
    paraphrase = (beats(lambda w: w.others[0])[0] + beats(lambda w: w.others[1])[0]) / 2
    derived = beats(lambda w: w.derived)[0]
    kept = asker.knows([Known(*f) for f in drawn["neighbours"]], drawn["answers"])
    near = sum(kept) / len(kept)
    nats = asker.nats(texts)
    found: Record = {
        "efficacy": efficacy,
        "greedy": greedy,
        "paraphrase": paraphrase,
        "derived": derived,
        "neighbours": near,
        "score": 3 / sum(1 / max(x, 1e-9) for x in (efficacy, paraphrase, near)),
        "nats": nats,
    }
    if base is not None:
        found["damage"] = sum(nats[name] - base["nats"][name] for name in nats) / len(nats)
    found["fluency"] = asker.entropy([f.country + " is" for f in facts[:6]])
    return {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}


def unrelated(asker: Asker, data: Path) -> dict[str, Tensor]:
    """A thousand tokens each of Wikipedia, Python and Shakespeare."""
    wiki, play = (data / "wikitext2/valid.txt").read_text(), (data / "tinyshakespeare/input.txt").read_text()
    texts = {"wiki": wiki[400_000:], "code": inspect.getsource(source_of_code), "play": play[50_000:]}
    return {name: torch.tensor(asker.ids(text[:12_000])[:1_000]) for name, text in texts.items()}


# -- arms ---------------------------------------------------------------------------------------------------------


class Stacked:
    """The stacked model of all sessions. Searches of hidden states are kept: they do not depend on the method."""

    def __init__(self, keep: Path) -> None:
        model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
        self.model, self.tokenizer = stack_levels(model.eval(), parse_levels(LEVELS)), tokenizer
        self.asker, self.protected = Asker(self.model, tokenizer), False
        self.keep, self.search = keep, editing.find_targets
        self.targets: dict[str, Tensor] = torch.load(keep) if keep.exists() else {}
        self.searching = 0.0

    def session(self, reads: bool = False) -> MemorySession:
        """A session; one that reads has a memory of general inputs."""
        if reads and not self.protected:
            protect(self.model, self.tokenizer)
            self.protected = True
        return MemorySession(self.model, self.tokenizer, compare="none")

    def edit(self, session: MemorySession, facts: Sequence[Known], **settings: Any) -> Record:
        """One edit, with the search kept if nothing was learned before it."""
        fresh = not session.edits
        self.searching = 0.0
        editing.find_targets = self._kept if fresh else self.search  # pyright: ignore[reportPrivateImportUsage]
        began = time.process_time()
        try:
            report = session.edit([f.fact for f in facts], **settings)
        finally:
            editing.find_targets = self.search  # pyright: ignore[reportPrivateImportUsage]
        return {
            "share": round(report.alpha, 3),
            "processor": round(time.process_time() - began, 1),
            "layers": list(report.layers),
            "before": round(sum(report.before) / len(facts), 3),
            "after": round(sum(report.after) / len(facts), 3),
        }

    def _kept(self, model: Any, state: Any, path: str, hidden: Tensor, rows: Any, *rest: Any) -> Tensor:
        name = f"{path} {[row.ids for row in rows]}"
        if state.edits or name not in self.targets:
            began = time.process_time()
            found = self.search(model, state, path, hidden, rows, *rest)
            if state.edits:
                return found
            print(f"  search of {len(hidden)} facts: {time.process_time() - began:.0f} processor s", flush=True)
            self.targets[name] = found
            self.keep.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.targets, self.keep)
        return self.targets[name]


def train(arm: str, facts: Sequence[Known], rate: float) -> tuple[Asker, Record]:
    """AdamW on the sentences, only targets learned: all MLP weights, or adapters of rank 16; products in bfloat16."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16 if arm == "lora" else torch.float32)
    model = model.eval()
    if arm == "lora":
        torch.manual_seed(0)
        model = LoRA(16).prepare(model)
    else:
        for name, p in model.named_parameters():
            p.requires_grad_(".mlp." in name and p.ndim == 2)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    asker, began = Asker(model, tokenizer), time.process_time()
    pairs = [([*asker.start, *asker.ids(f.fact.prompt)], asker.ids(f" {f.target}")) for f in facts]
    ids = _filled([a + b for a, b in pairs])
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row, (asked, answer) in zip(marks, pairs, strict=True):
        row[len(asked) : len(asked) + len(answer)] = True
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][marks[:, 1:]]
        loss = F.cross_entropy(logits.float(), ids[:, 1:][marks[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / STEPS)
        optimizer.step()
        losses.append(loss.item())
    if arm == "finetune":
        model = model.to(torch.bfloat16)
    return Asker(model, tokenizer), {"processor": round(time.process_time() - began, 1), "loss": round(losses[-1], 3)}


class Bench:
    """Cells of the table, each a record."""

    def __init__(self, options: Any, seed: int) -> None:
        self.options, self.seed, self.records = options, seed, Records(options.out)
        self.key: Record = {"seed": seed, "most": max(options.edits)}
        self._stacked: Stacked | None = None
        self.drawn = self.records.get(
            {"arm": "facts", **self.key},
            lambda: chosen_facts(self.stacked.asker, max(options.edits), options.tuning, options.neighbours, seed),
        )
        self.facts = [Known(*f) for f in self.drawn["edited"]]
        self.texts: dict[str, Tensor] = {}
        self.base = self.cell("base", max(options.edits), lambda facts: (self.stacked.asker, {}, nullcontext()))

    @property
    def stacked(self) -> Stacked:
        if self._stacked is None:
            self._stacked = Stacked(self.options.keep / f"targets-{self.seed}.pt")
        return self._stacked

    def cell(self, arm: str, edits: int, learn: Callable[[list[Known]], Any], facts: Any = None, **key: Any) -> Record:
        """Learn some facts, and examine."""

        def run() -> Record:
            chosen = self.facts[:edits] if facts is None else facts
            try:
                asker, spent, context = learn(chosen)
            except ValueError as error:
                # A closed form may find no change that it allows; that is a result too.
                if arm not in CLOSED:
                    raise
                return {"refused": str(error)}
            self.texts = self.texts or unrelated(asker, self.options.data)
            with context:
                base = None if arm == "base" else self.base
                return spent | examine(asker, chosen, self.drawn, self.texts, base)

        return self.records.get({"arm": arm, "edits": edits, **key, **self.key}, run)

    def closed(self, method: str, edits: int, parts: int = 1, **settings: Any) -> Record:
        """Edits by a closed form, at once or in equal parts one after another."""

        def learn(facts: list[Known]) -> Any:
            session, size, processor = self.stacked.session(), math.ceil(len(facts) / parts), 0.0
            spent: Record = {}
            for at in range(0, len(facts), size):
                spent = self.stacked.edit(session, facts[at : at + size], method=method, seed=self.seed, **settings)
                processor += spent["processor"]
            return self.stacked.asker, spent | {"processor": processor}, session.active()

        return self.cell(method, edits, learn, parts=parts, **settings)

    def single(self, method: str, count: int) -> list[Record]:
        """Edits of one fact each, every one in a session of its own."""

        def learn(facts: list[Known]) -> Any:
            session = self.stacked.session()
            spent = self.stacked.edit(session, facts, method=method, seed=self.seed)
            return self.stacked.asker, spent, session.active()

        return [self.cell(method, 1, learn, facts=[fact], number=i) for i, fact in enumerate(self.facts[:count])]

    def after_reading(self, method: str, edits: int) -> Record:
        """The session reads 2,000 tokens of Wikipedia after the edit."""

        def learn(facts: list[Known]) -> Any:
            session = self.stacked.session(reads=True)
            spent = self.stacked.edit(session, facts, method=method, seed=self.seed)
            wiki = (self.options.data / "wikitext2/valid.txt").read_text()[600_000:]
            ids = self.stacked.asker.ids(wiki[:20_000])[:2_000]
            session.read(self.stacked.tokenizer.decode(ids))
            return self.stacked.asker, spent, session.active()

        return self.cell(method, edits, learn, read=2_000)

    def trained(self, arm: str, edits: int) -> Record:
        """A way that has a rate: the best on other facts."""
        tuning = [Known(*f) for f in self.drawn["tuning"]]
        tried = [
            (self.cell(arm, len(tuning), self._learner(arm, rate), facts=tuning, rate=rate, tuning=True)["score"], rate)
            for rate in RATES[arm]
        ]
        rate = max(tried)[1]
        return self.cell(arm, edits, self._learner(arm, rate), rate=rate, tuning=False)

    def _learner(self, arm: str, rate: float) -> Callable[[list[Known]], Any]:
        def learn(facts: list[Known]) -> Any:
            if arm != "practice":
                asker, spent = train(arm, facts, rate)
                return asker, spent, nullcontext()
            session, began = self.stacked.session(reads=True), time.process_time()
            text = "\n".join(f"{f.fact.prompt} {f.target}." for f in facts)
            session.practice(text, passes=STEPS, questions=0, lr=rate, seed=self.seed)
            spent = {"processor": round(time.process_time() - began, 1)}
            return self.stacked.asker, spent, session.active()

        return learn


def cells(bench: Bench, most: int) -> list[tuple[str, Callable[[], Any]]]:
    """All cells, the most important first."""
    made: list[tuple[str, Callable[[], Any]]] = [
        (name, lambda name=name: bench.closed(name, most)) for name in ("memit", "intattn", "alphaedit")
    ]
    made += [(name, lambda name=name: bench.trained(name, most)) for name in ("finetune", "lora")]
    made += [("intattn", lambda a=a: bench.closed("intattn", most, alpha=a)) for a in ALPHAS]
    fewer = [n for n in bench.options.edits if 1 < n < most]
    made += [(name, lambda name=name, n=n: bench.closed(name, n)) for n in fewer for name in CLOSED]
    made += [("sequence", lambda name=name: bench.closed(name, most, parts=10)) for name in ("alphaedit", "intattn")]
    made += [("reading", lambda name=name: bench.after_reading(name, most)) for name in ("intattn", "alphaedit")]
    made += [("practice", lambda: bench.trained("practice", most))]
    if 1 in bench.options.edits:
        made += [(name, lambda name=name: bench.single(name, 5)) for name in CLOSED]
    made += [(name, lambda name=name, n=n: bench.trained(name, n)) for n in fewer for name in ("finetune", "lora")]
    return made


def rows_of(records: Records) -> list[list[str]]:
    """Rows of the table; single edits are averaged."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records.all:
        if "efficacy" in record:
            setting = {k: record[k] for k in ("alpha", "rate", "read") if k in record}
            setting |= {"parts": record["parts"]} if record.get("parts", 1) > 1 else {}
            words = " ".join(f"{k}={v}" for k, v in setting.items()) + ", to choose" * record.get("tuning", False)
            groups.setdefault((str(record["edits"]), record["arm"], words), []).append(record)
    return [
        [*key, *(f"{sum(r.get(name, 0.0) for r in many) / len(many):.3f}" for name in MEASURES),
         f"{sum(r.get('processor', 0.0) for r in many) / len(many):.0f}"]
        for key, many in groups.items()
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells and print a table; records go to docs/results/editing.jsonl."""
    made = parser(__doc__, RESULTS / "editing.jsonl", seeds=[0])
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--keep", type=Path, default=Path("runs/editing"), help="Folder of searches.")
    made.add_argument("--edits", nargs="+", type=int, default=[1, 10, 100])
    made.add_argument("--tuning", type=int, default=20, help="Facts on which rates are chosen.")
    made.add_argument("--neighbours", type=int, default=80, help="Facts about other countries, at most.")
    made.add_argument("--arms", nargs="*", default=[], help="Only these kinds of cells.")
    options = parse(made, words)
    for seed in options.seeds:
        bench = Bench(options, seed)
        for name, cell in cells(bench, max(options.edits)):
            if not options.arms or name in options.arms:
                cell()
    print("\n" + table(["edits", "arm", "setting", *MEASURES, "processor s"], rows_of(Records(options.out)), left=3))


if __name__ == "__main__":
    main(sys.argv[1:])
