"""`nestlearn generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from nestlearn.cli.common import MaxNewTokens, Seed, Temperature, TopP, Verbose, plain_console, tune

HELP = """Continue a text.

[bold]Example[/bold]

  nestlearn generate runs/docs "The for statement" --max-new-tokens 100 --temperature 0.7
"""


def run(
    model: Annotated[str, typer.Argument(help="Folder with a saved model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    verbose: Verbose = False,
) -> None:
    """Print the prompt and its continuation."""
    from nestlearn.data import document_ids
    from nestlearn.models import generate_texts
    from nestlearn.train import load_model, load_tokenizer

    tune(verbose)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    (text,) = generate_texts(
        loaded,
        tokenizer,
        [document_ids(tokenizer, prompt)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    plain_console().print(prompt + text)
