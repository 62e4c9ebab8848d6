"""``python -m sagellm_gateway``."""

import sys

from sagellm_gateway.server import main

sys.exit(main())
