"""One process of several: trains every run that it is given. Started by torchrun; see `test_distributed.py`."""

import json
import os
import sys
from dataclasses import replace

from accelerate.state import AcceleratorState
from rich.console import Console

from nestlearn.train import TrainConfig, saved_config, train


def main() -> None:
    """Train the runs of the JSON file named on the command line: ``[{"resume": false, ...fields}, ...]``."""
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    for fields in runs:
        # What the engine keeps for the whole process, made for one run each.
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]
        resume = fields.pop("resume", False)
        config = replace(saved_config(fields["out"]), **fields) if resume else TrainConfig(**fields)
        train(config, resume=resume, console=Console(quiet=True))


if __name__ == "__main__":
    main()
