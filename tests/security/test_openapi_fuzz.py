"""Requests generated from our own OpenAPI document."""

from __future__ import annotations

import os

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from sagellm_gateway.openapi import document
from sagellm_gateway.routes.table import ROUTES
from sagellm_gateway.testing import Running

EXAMPLES = int(os.environ.get("SAGELLM_FUZZ", "50"))
# These change what the others find (policy, engines, the first key): each has a server of its own.
ALONE = (
    "/v1/management/engines",
    "/v1/management/keys",
    "/v1/management/models",
    "/v1/management/policy",
    "/api/pull",
    "/v1/files",
)

schema = schemathesis.openapi.from_dict(document(ROUTES, "0", secured=False))


generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(case: schemathesis.Case, server: Running) -> None:
    # A generated model name is unknown, so a well-formed request may be refused: 4xx is as good as 2xx.
    case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance], timeout=20)


@schema.exclude(path_regex=f"^({'|'.join(ALONE)})").parametrize()
@generated
def test_every_generated_request_is_answered_as_documented(case: schemathesis.Case, target: Running) -> None:
    """Whatever fits (or does not fit) the document is answered with a documented status and shape, never a 5xx."""
    check(case, target)


@schema.include(path_regex=f"^({'|'.join(ALONE)})").parametrize()
@generated
def test_generated_changes_are_answered_as_documented(case: schemathesis.Case, fresh: Running) -> None:
    """The same holds for requests that change the server, each operation on one of its own."""
    check(case, fresh)
