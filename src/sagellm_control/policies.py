"""Stands for `sagellm_control_plane.policies`."""

from sagellm.migrate.forward import forward

forward(__name__)
