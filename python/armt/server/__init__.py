"""The HTTP server; needs ``pip install "armt[server]"``."""

from armt.server.app import create_app
from armt.server.settings import Settings

__all__ = ["Settings", "create_app"]
