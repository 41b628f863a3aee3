"""``python -m ocm``, the same as the console script ``ocm``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from ocm.cli.app import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; the command line needs: pip install 'hessdiag[ocm]'")
    run()


if __name__ == "__main__":
    main()
