"""``python -m armt.cli``."""

from armt.cli import main

main()
