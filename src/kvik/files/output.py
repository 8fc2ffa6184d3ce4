"""Files that kvik writes for a user: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvik.errors import InvalidInput


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of `path` in the end; after an error there is none.

    Raises `InvalidInput` for every `OSError` meanwhile.
    """
    # A link goes on leading to its file; what is not a file, such as /dev/null, is written and never replaced.
    target = Path(os.path.realpath(path))
    is_special = target.exists() and not target.is_file()
    partial = target if is_special else target.with_name(f".kvik-{os.getpid()}.partial")
    try:
        yield partial
        if not is_special:
            partial.replace(target)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written: {error.strerror}", hint="free some space, or name a file in another folder"
        ) from None
    finally:
        if not is_special:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
