"""`nestlearn publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlearn.cli.common import Progress, Verbose, hide_progress_bars, plain_console, tune

HELP = """Write a trained or stacked model as a folder that transformers loads without nestlearn, with a card.

The example of the card compares the logits of a text and generates. It is run before the folder appears.
With --repo the folder is also uploaded to the Hugging Face Hub; without it nothing leaves this machine.

[bold]Examples[/bold]

  nestlearn publish runs/mine --out published/mine

  nestlearn publish runs/mine --out published/mine --repo me/mine
"""


def run(
    model: Annotated[Path, typer.Argument(help="Folder that train or stack has written.")],
    out: Annotated[Path, typer.Option(help="New folder for the published model.")],
    repo: Annotated[str | None, typer.Option(help="Upload to this name on the Hub, as a private model.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the folder, and upload it if a name is given."""
    tune(verbose)
    hide_progress_bars()
    from nestlearn.train.publishing import publish

    with Progress() as progress:
        progress(f"writing {out}, and checking it in a process without nestlearn")
        said = publish(model, out)
    plain_console().print(f"Wrote {out}. Its example ran without nestlearn: logits equal, and it generated:\n{said}")
    if repo is None:
        plain_console().print("Nothing was uploaded; --repo NAME does it.")
    else:
        plain_console().print(f"Uploaded to {_upload(out, repo)}")


def _upload(folder: Path, repo: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"{folder} is complete, but the upload to {repo} failed: {error}. Check the network and the name, log in "
            f"with `hf auth login`, then run `hf upload {repo} {folder}`."
        ) from error
