"""``python -m flexkv_core.cli``: the ``flexkv`` command where it is not installed."""

from __future__ import annotations

from flexkv_core.cli import main

if __name__ == "__main__":
    main()
