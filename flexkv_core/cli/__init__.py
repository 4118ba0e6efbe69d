"""The ``flexkv`` command. Commands lie in :mod:`flexkv_core.cli.app`; this module loads nothing until one is called."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``flexkv`` command."""
    from flexkv_core.cli.app import app

    app()
