"""``python -m kd``, for where the ``kd`` script is not on the path."""

import sys

from kd.cli import main

sys.exit(main())
