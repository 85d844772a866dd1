"""Continuous thought on parity and mazes: accuracy by tick, beside an LSTM that ticks and Hope at equal parameters.

    python benchmarks/thought.py --task parity
    python benchmarks/thought.py --task parity --bits 16 --steps 3000 --rows thought
    python benchmarks/thought.py --task mazes --report runs/thought.html

Parity: bits drawn at random, and after every one whether the sum up to it is odd. Mazes: 7 x 7 cells and the moves
along the one path. `thought` is the Continuous Thought Machine over embeddings of the tokens with learned positions.
`lstm` has its ticks, encoder, attention and loss, but one LSTM cell in place of synapses, neurons and synchronization.
`hope` reads the tokens once, in order. Each model has the parameters of `thought` within a few percent. Inputs
of the test are left out of training. A finished run is not repeated; the weights in --keep are those of --report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import RESULTS, Record, Records, parse, parser, table, update
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.report.thought import MazeThought, TickCurve, write_thought_report
from nestlearn.evals.tasks import Maze, ModularSum, Task
from nestlearn.nn import ContinuousThoughtConfig, certainty_of, ticks_loss
from nestlearn.nn.thought.neurons import InputAttention

ROWS = ("thought", "lstm", "hope")
WIDTH, HEADS, WARMUP = 32, 4, 50
SIZES: dict[str, dict[str, int]] = {
    "parity": {"neurons": 64, "memory_length": 8, "query_pairs": 32, "output_pairs": 64},
    "mazes": {"neurons": 64, "memory_length": 8, "query_pairs": 64, "output_pairs": 64},
}


def task_of(options: Any) -> Task:
    """The task of the command line."""
    if options.task == "mazes":
        return Maze(rooms=options.rooms, moves=options.moves, eval_examples=options.tests)
    bits = options.bits
    return ModularSum(modulus=2, shortest=bits, longest=bits, eval_lengths=(bits,), eval_examples=options.tests)


def question(task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens that a thinker looks at, and its targets: without the places that ask."""
    if isinstance(task, Maze):
        return batch.inputs[:, : task.cells], batch.targets[:, task.cells :]
    return batch.inputs, batch.targets


class Encoder(nn.Module):
    """Embeddings and learned positions."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.randn(tokens, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions


class Thinker(nn.Module):
    """The Continuous Thought Machine."""

    def __init__(self, vocabulary: int, tokens: int, answers: int, classes: int, ticks: int, sizes: Any) -> None:
        super().__init__()
        self.encoder = Encoder(vocabulary, tokens)
        config = ContinuousThoughtConfig(
            classes=classes, answers=answers, ticks=ticks, attention_width=WIDTH, num_heads=HEADS, **sizes
        )
        self.machine = config.build(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every tick, ``[b, k, n, c]``."""
        return self.machine(self.encoder(ids))[0].outputs


class TickingLSTM(nn.Module):
    """An LSTM cell that attends to the input once a tick, with the query from its own hidden state."""

    def __init__(self, vocabulary: int, tokens: int, answers: int, classes: int, ticks: int, hidden: int) -> None:
        super().__init__()
        self.encoder = Encoder(vocabulary, tokens)
        self.attention = InputAttention(WIDTH, hidden, WIDTH, HEADS)
        self.cell = nn.LSTMCell(WIDTH, hidden)
        self.head = nn.Linear(hidden, answers * classes)
        self.start = nn.Parameter(torch.randn(2, hidden))
        self.shape, self.ticks = (answers, classes), ticks

    def forward(self, ids: Tensor) -> Tensor:
        seen = self.attention.encode(self.encoder(ids), None)
        h, c = self.start.unsqueeze(1).expand(-1, len(ids), -1)
        states = []
        for _ in range(self.ticks):
            h, c = self.cell(self.attention(h, seen)[0], (h, c))
            states.append(h)
        return self.head(torch.stack(states, 1)).unflatten(-1, self.shape)


class Reader(nn.Module):
    """Hope, which reads the tokens in order and answers where it is asked: one tick."""

    def __init__(self, vocabulary: int, expansion: float) -> None:
        super().__init__()
        network = [{"period": None, "expansion": expansion}]
        self.model = HopeForCausalLM(
            HopeConfig(
                vocab_size=vocabulary, hidden_size=20, num_hidden_layers=2, num_attention_heads=1, cms=network,
                initializer_range=0.02, ffn_activation="gelu",
                mixer={"type": "self_modifying", "step_size": "normalized", "max_step": 2.0, "expansion": 2,
                       "chunk_size": 128, "projection_chunk_size": 128},
            )
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits.unsqueeze(1)


def parameters(model: nn.Module) -> int:
    """Weights."""
    return sum(p.numel() for p in model.parameters())


def nearest(make: Any, low: int, high: int, goal: int) -> nn.Module:
    """The model ``make(size)`` whose number of weights is nearest to the goal; it grows with the size."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(make(middle)) <= goal else (low, middle)
    return make(low)


def build(row: str, task: Task, options: Any, seed: int) -> nn.Module:
    """The model of a row, with the parameters of `thought`."""
    ids, targets = question(task, task.draw(1, torch.Generator().manual_seed(0)))
    shape = (task.vocab_size, ids.shape[1], targets.shape[1], task.vocab_size, options.ticks)
    sizes = SIZES[options.task] | ({"neurons": options.neurons} if options.neurons else {})
    torch.manual_seed(seed)
    thinker = Thinker(*shape, sizes)
    if row == "thought":
        return thinker
    goal = parameters(thinker)
    if row == "lstm":
        return nearest(lambda hidden: TickingLSTM(*shape, hidden), 8, 512, goal)
    return nearest(lambda eighths: Reader(task.vocab_size, eighths / 8), 4, 256, goal)


def answers_of(model: nn.Module, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[b, k, n, c]`` and targets ``[b, n]``."""
    if isinstance(model, Reader):
        asked = batch.targets[0] != IGNORE
        return model(batch.inputs)[:, :, asked], batch.targets[:, asked]
    ids, targets = question(task, batch)
    return model(ids), targets


def train(model: nn.Module, task: Task, options: Any, seed: int) -> tuple[list[dict[str, float]], float, int]:
    """The curve of right answers on the test, processor seconds, and steps."""
    test = task.examples(task.splits[-1].name)
    known = {tuple(row) for row in test.inputs.tolist()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    generator, curve, spent, step = torch.Generator().manual_seed(seed), [], 0.0, 0
    while step < options.steps and spent < options.seconds:
        began = time.process_time()
        batch = task.draw(options.batch, generator)
        new = torch.tensor([tuple(row) not in known for row in batch.inputs.tolist()])
        if not new.any():
            raise ValueError(f"the {len(known)} inputs of the test leave nothing to train on; use a smaller --tests.")
        for group in optimizer.param_groups:
            # Constant, then linear to a tenth over the last fifth.
            falling = (options.steps - step) / (0.2 * options.steps)
            group["lr"] = options.lr * min(1.0, (step + 1) / WARMUP, max(0.1, falling))
        outputs, targets = answers_of(model, task, Batch(batch.inputs[new], batch.targets[new]))
        loss = update(model, ticks_loss(outputs, targets), optimizer)
        spent, step = spent + time.process_time() - began, step + 1
        if step % 200 == 0 or step == options.steps:
            found = measure(model, task, Batch(test.inputs[:200], test.targets[:200]))
            curve.append({"step": step, "loss": round(float(loss), 4)} | {k: found[k] for k in ("right", "whole")})
            print(curve[-1], f"{spent:.0f} s", flush=True)
            if found["whole"] == 1.0:
                break
    return curve, spent, step


@torch.no_grad()
def measure(model: nn.Module, task: Task, batch: Batch) -> Record:
    """Shares of right answers and of wholly right inputs: at the most certain tick, and by tick."""
    model.eval()
    parts = [answers_of(model, task, Batch(*rows)) for rows in zip(*(x.split(100) for x in batch), strict=True)]
    model.train()
    outputs, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    right, certainty = outputs.argmax(-1) == targets.unsqueeze(1), certainty_of(outputs)
    sure = right[torch.arange(len(right)), certainty.argmax(1)]
    return {
        "right": round(sure.double().mean().item(), 4),
        "whole": round(sure.all(-1).double().mean().item(), 4),
        "by_answer": [round(x, 3) for x in sure.double().mean(0).tolist()],
        "right_by_tick": [round(x, 4) for x in right.double().mean((0, 2)).tolist()],
        "whole_by_tick": [round(x, 4) for x in right.all(-1).double().mean(0).tolist()],
        "certainty_by_tick": [round(x, 4) for x in certainty.mean(0).tolist()],
        "halting": [halted(right, certainty, threshold) for threshold in (0.5, 0.8, 0.9, 0.99)],
    }


def halted(right: Tensor, certainty: Tensor, threshold: float) -> Record:
    """Mean ticks, and right answers, where every row stops at the first tick of this certainty."""
    reached = certainty >= threshold
    last = certainty.shape[1] - 1
    stop = torch.where(reached.any(1), reached.double().argmax(1), last)
    chosen = torch.where(reached.any(1), stop, certainty.argmax(1))
    share = right[torch.arange(len(right)), chosen].double().mean().item()
    return {"threshold": threshold, "ticks": round(stop.double().mean().item() + 1, 2), "right": round(share, 4)}


def run(row: str, seed: int, task: Task, options: Any) -> Record:
    """Train one model and test it."""
    model = build(row, task, options, seed)
    curve, spent, steps = train(model, task, options, seed)
    found = measure(model, task, task.examples(task.splits[-1].name))
    if row == "thought":
        options.keep.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.keep / f"{name_of(options)}-{seed}.pt")
    return found | {
        "parameters": parameters(model), "steps_made": steps, "processor_seconds": round(spent, 1), "curve": curve
    }  # fmt: skip


def name_of(options: Any) -> str:
    """The name of a task with its size."""
    return f"parity-{options.bits}" if options.task == "parity" else f"mazes-{options.rooms}-{options.moves}"


def report(path: Path, records: Records, task: Task, options: Any) -> None:
    """A page about the machine of the last seed of this task, with the curves of all tasks that have records."""
    curves: dict[str, list[TickCurve]] = {}
    for name in dict.fromkeys(r["name"] for r in records.all):
        for row in ROWS:
            runs = [r["right_by_tick"] for r in records.where(name=name, row=row)]
            runs = [run for run in runs if len(run) == max(map(len, runs))]
            if runs:
                means = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
                curves.setdefault(name, []).append(TickCurve(row, means))
    seed = options.seeds[-1]
    (record,) = records.where(name=name_of(options), row="thought", seed=seed, ticks=options.ticks)[-1:]
    halting = next(h for h in record["halting"] if h["threshold"] == 0.9)
    tiles = [
        (f"{100 * record['right']:.1f} %", f"right answers of {name_of(options)} at the most certain tick"),
        (f"{100 * record['whole']:.1f} %", "inputs with every answer right"),
        (
            f"{halting['ticks']:.1f} of {options.ticks}",
            f"ticks at certainty 0.9, with {100 * halting['right']:.1f} % right",
        ),
        (f"{record['parameters']:,}", "parameters"),
    ]
    lead = "A Continuous Thought Machine thinks in ticks about one input. At each it has an answer and a certainty."
    mazes = []
    if isinstance(task, Maze):
        model = build("thought", task, options, seed)
        model.load_state_dict(torch.load(options.keep / f"{name_of(options)}-{seed}.pt", weights_only=True))
        test = task.examples(task.splits[-1].name)
        mazes = [maze_thought(model, task, Batch(test.inputs[i : i + 1], test.targets[i : i + 1])) for i in range(3)]
    command = f"python benchmarks/thought.py --task {options.task} --steps {options.steps} --ticks {options.ticks}"
    write_thought_report(path, "Thinking in ticks", lead, curves, mazes, tiles=tiles, commands=[command])


@torch.no_grad()
def maze_thought(model: Any, task: Task, batch: Batch) -> MazeThought:
    """What the machine thinks about one maze."""
    cells, moves = question(task, batch)
    thoughts, _ = model.machine(model.encoder(cells))
    return MazeThought(
        cells[0].tolist(), moves[0].tolist(), thoughts.outputs[0].argmax(-1).tolist(), thoughts.certainty[0].tolist(),
        thoughts.attention[0].mean(1).tolist(), thoughts.activity[0].tolist(),
    )  # fmt: skip


def tables(records: list[Record]) -> str:
    """One line per run."""
    rows = [
        [
            r["name"], r["row"], str(r["seed"]), f"{r['parameters']:,}", f"{r['steps_made']:,}",
            f"{r['processor_seconds']:.0f}", f"{100 * r['right']:.1f}", f"{100 * r['whole']:.1f}",
            f"{100 * max(r['right_by_tick']):.1f} at {r['right_by_tick'].index(max(r['right_by_tick'])) + 1}",
        ]
        for r in records
    ]  # fmt: skip
    header = ["task", "row", "seed", "parameters", "steps", "processor s", "right, %", "whole, %", "best tick, %"]
    return table(header, rows, left=2)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, print the table, and write the page."""
    made = parser(__doc__, RESULTS / "thought.jsonl", seeds=[0])
    made.add_argument("--task", choices=["parity", "mazes"], default="parity")
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    for name, value in (("steps", 3000), ("batch", 32), ("bits", 12), ("rooms", 3), ("moves", 6), ("ticks", 16)):
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--neurons", type=int, help="of thought, instead of the task's")
    made.add_argument("--tests", type=int, default=500, help="inputs of the test")
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--seconds", type=float, default=600.0, help="processor seconds of training at most")
    made.add_argument("--keep", type=Path, default=Path("runs/thought"), help="folder of the weights of thought")
    made.add_argument("--report", type=Path, help="write a page about the last machine of the task")
    options = parse(made, words)
    records, task = Records(options.out), task_of(options)
    shared = {"name": name_of(options), "steps": options.steps, "batch": options.batch, "lr": options.lr}
    shared |= {"ticks": options.ticks, "neurons": options.neurons}
    for seed in options.seeds:
        for row in options.rows:
            records.get({"row": row, "seed": seed, **shared}, lambda r=row, s=seed: run(r, s, task, options))
    print(tables(records.where(name=name_of(options))))
    if options.report is not None:
        report(options.report, records, task, options)


if __name__ == "__main__":
    main()
