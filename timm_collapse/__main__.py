"""`python -m timm_collapse` is the command line."""

import sys

from .cli.main import main

sys.exit(main())
