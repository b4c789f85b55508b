"""The command line, ``armt``: one file a command."""

from __future__ import annotations

import sys


def main() -> None:
    """What the command ``armt`` runs: exit code 0 if all went well, 130 after Ctrl-C."""
    from armt.cli.app import run

    sys.exit(run(sys.argv[1:]))
