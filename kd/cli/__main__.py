"""``python -m kd.cli``, for where the ``kd`` script is not on the path."""

import sys

from kd.cli.main import main

sys.exit(main())
