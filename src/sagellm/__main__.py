"""``python -m sagellm`` is ``sage-llm``."""

from __future__ import annotations

import sys

from sagellm.cli.main import main

sys.exit(main())
