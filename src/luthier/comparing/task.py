"""The way into a job's process, ``python -m luthier.comparing.task --one JSON``: light, so that it ends with its parent from its first moment on."""

from __future__ import annotations

import sys

from .apart import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    from .work import main  # torch takes seconds

    sys.exit(main(sys.argv[1:]))
