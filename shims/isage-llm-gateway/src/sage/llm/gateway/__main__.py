"""The old console script `sage-llm-gateway` and ``python -m sage.llm.gateway``."""

import sys

from sagellm.migrate.forward import warn_deprecated
from sagellm.migrate.old_environment import translate_gateway_environment


def main() -> int:
    """Start the gateway as before, and say how it is started now."""
    warn_deprecated("sage-llm-gateway", "`sage-llm gateway`")
    translate_gateway_environment()
    from sagellm.cli.main import main as cli

    return cli(["gateway", *sys.argv[1:]]) or 0


if __name__ == "__main__":
    sys.exit(main())
