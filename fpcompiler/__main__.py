"""Run the command line: ``fpcompiler`` or ``python -m fpcompiler``."""

from __future__ import annotations

import sys

from fpcompiler.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
