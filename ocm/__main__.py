"""``python -m ocm``, the same as the console script ``ocm``."""

from ocm.cli import run

if __name__ == "__main__":
    run()
