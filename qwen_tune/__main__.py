"""`python -m qwen_tune`."""

from qwen_tune.cli import main

main()
