"""Stands for `sagellm_control_plane.types`."""

from sagellm.migrate.forward import forward

forward(__name__)
