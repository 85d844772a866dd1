"""`python -m nestlearn`, the form that torchrun and machines without the script on PATH need."""

from nestlearn.cli import main

main()
