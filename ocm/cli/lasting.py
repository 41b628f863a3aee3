"""Commands that keep what is done, and go on when they are given again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ocm.checkpoints.unfinished import Parts


@contextmanager
def kept_parts(
    folder: Path, settings: Mapping[str, Any], count: Callable[[Parts], str]
) -> Iterator[Parts]:
    """Yield what the same command has finished before, and say so; after Ctrl-C say what is kept.

    The parts of other settings are removed, which is said too. Once its results are written, the
    command removes its own.

    Args:
        folder: Of this command alone.
        settings: JSON values that decide the results.
        count: Says how much is finished, "2 of 8 images".
    """
    from importlib import metadata

    from ocm.checkpoints.unfinished import parts_of

    parts, removed = parts_of(folder, {**settings, "version": metadata.version("hessdiag")})
    if removed is not None:
        typer.echo(removed)
    if parts.names():
        typer.echo(f"going on from {count(parts)}, kept in {folder}")
    try:
        yield parts
    except KeyboardInterrupt:
        if parts.names():
            said = f"kept in {folder}: {count(parts)}. The same command goes on from there"
            raise KeyboardInterrupt(said) from None
        raise
    finally:
        if not parts.names():
            parts.remove()
