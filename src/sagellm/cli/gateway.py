"""``sage-llm gateway``: the server without a model.

Engines are started or registered over ``/v1/management``, listed in a file, or found on local ports.
"""

from __future__ import annotations

from sagellm.cli import server_flags as shared
from sagellm.cli.common import single


def gateway(
    host: shared.Host = None,
    port: shared.Port = None,
    grace: shared.Grace = None,
    workers: shared.Workers = None,
    policy: shared.Policy = None,
    routing: shared.Routing = None,
    engine_file: shared.EngineFile = None,
    discover: shared.Discover = None,
    state: shared.State = None,
    api_key_file: shared.ApiKeyFile = None,
    require_key: shared.RequireKey = None,
    allowed_hosts: shared.AllowedHosts = None,
    cors: shared.Cors = None,
    access_log: shared.AccessLog = None,
) -> None:
    """Serve the gateway and the control plane without a model."""
    given = dict(locals())
    from sagellm.cli.serve import start

    start(given, no_models=True)


app = single(gateway)
