"""Deprecated path; see docs/migration.md of isagellm."""

import pkgutil

from sagellm.migrate.forward import forward

# Other distributions may hold parts of this package elsewhere on the path.
__path__ = pkgutil.extend_path(__path__, __name__)

forward(__name__)
