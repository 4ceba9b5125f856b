"""python -m luthier is the command luthier."""

import sys

from .cli import main

sys.exit(main())
