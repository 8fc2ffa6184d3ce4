"""A replica ends with the process that began it, however that ends."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_VARIABLE = "KVIK_FRONT_PID"
"""In a replica's environment: the process that began it."""

READY = "a replica, ready on port {}"
"""What a replica says on its standard error when it takes requests."""

LOOK_S = 0.5


def end_with_parent() -> bool:
    """Whether another process began this one as a replica: then it ends soon after that one has."""
    told = os.environ.pop(PARENT_VARIABLE, "")
    if not told.isdecimal():
        return False
    parent = int(told)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGKILL)  # nobody is there whom its answers could reach

    threading.Thread(target=watch, name="kvik-parent", daemon=True).start()
    return True
