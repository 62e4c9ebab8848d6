"""Stands for `sagellm_control_plane.manager`."""

from sagellm.migrate.forward import forward

forward(__name__)
