"""``python -m scbmlp``, the same as the command ``scbmlp``."""

import sys

from scbmlp.report import main

sys.exit(main())
