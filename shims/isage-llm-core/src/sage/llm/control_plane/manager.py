"""Deprecated path; see docs/migration.md of isagellm."""

from sagellm.migrate.forward import forward

forward(__name__)
