"""From a configuration to the client of an engine in this process, whatever kind of model it is."""

from __future__ import annotations

from sagellm_core.config import EngineConfig
from sagellm_protocol.ports import EngineClient

__all__ = ["local_client"]


def local_client(config: EngineConfig) -> EngineClient:
    """Load the model and return its client, which owns the engine: a decoder's, or an encoder's.

    Raises:
        ResourceExhaustedError: it does not fit; the message has what is needed and what is free.
        ModelFileError: the model cannot be read.
        UnavailableError: the backend cannot run here.
        UnsupportedError: the backend lacks something that the model or the options need.
    """
    from sagellm_core.loader.encoder import is_encoder

    if not config.is_mock and is_encoder(config.model):
        from sagellm_core.encoder import build_encoder

        return build_encoder(config)
    from sagellm_core.build import build_engine
    from sagellm_core.local import LocalEngine

    return LocalEngine(build_engine(config))
