"""The way into a job's process, ``python -m luthier.comparing.task --one JSON``: light, so that it ends with its parent from its first moment on."""

from __future__ import annotations

import gc
import sys

from ..heap import loading
from .apart import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    with loading():
        from .work import main  # torch takes seconds
    gc.freeze()  # nothing of it is looked through again

    sys.exit(main(sys.argv[1:]))
