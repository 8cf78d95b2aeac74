"""Writes a whole file or none of it."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step; after a crash, Ctrl-C or on a full disk the old one is left.

    Raises:
        OSError: the disk is full or the folder is read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
