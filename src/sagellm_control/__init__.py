"""The name of `sagellm_control_plane` in isagellm 0.1 - 0.5; every import warns once and gives the same objects."""

from sagellm.migrate.forward import forward

forward(__name__)
