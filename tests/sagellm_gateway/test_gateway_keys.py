from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.keyring import Bucket
from sagellm_gateway.server import create_app, serve
from sagellm_gateway.store.database import Database
from sagellm_gateway.store.keys import KeyStore
from sagellm_gateway.testing import running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    """A second opening of the server's state file, as the command line has it."""
    database = Database(str(tmp_path / "state.db"))
    yield KeyStore(database)
    database.close()


@pytest.fixture
def guarded_url(manager: Any, keys: KeyStore, tmp_path: Path) -> Iterator[str]:
    config = GatewayConfig(state_path=str(tmp_path / "state.db"), require_key=True)
    with running(create_app(manager, config)) as server:
        yield server.url


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def get(url: str, **kwargs: Any) -> httpx2.Response:
    return httpx2.get(url, trust_env=False, **kwargs)


def post(url: str, **kwargs: Any) -> httpx2.Response:
    return httpx2.post(url, trust_env=False, **kwargs)


def until(what: Any) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_deny_by_default_and_probes_open(guarded_url: str) -> None:
    """Without a key every route but the probes is 401, also those that do not exist, in the shape of their dialect."""
    for path in ("/v1/models", "/metrics", "/nowhere", "/api/tags", "/v1/messages", "/openapi.json"):
        answer = get(guarded_url + path)
        assert answer.status_code == 401, path
    assert post(f"{guarded_url}/v1/messages", json={}).json()["error"]["type"] == "authentication_error"
    assert isinstance(post(f"{guarded_url}/api/chat", json={}).json()["error"], str)
    for path in ("/live", "/health", "/ready"):
        assert get(guarded_url + path).status_code == 200


def test_roles_cover_what_they_say(guarded_url: str, keys: KeyStore) -> None:
    """A user calls models, a metrics key reads metrics, an admin does both; both headers work."""
    user, metrics, admin = (keys.add(role, role)[1] for role in ("user", "metrics", "admin"))
    until(lambda: get(f"{guarded_url}/metrics", headers=bearer(admin)).status_code == 200)
    assert post(f"{guarded_url}/v1/chat/completions", json=CHAT, headers=bearer(user)).status_code == 200
    assert post(f"{guarded_url}/v1/chat/completions", json=CHAT, headers={"x-api-key": user}).status_code == 200
    assert get(f"{guarded_url}/metrics", headers=bearer(user)).status_code == 403
    assert get(f"{guarded_url}/metrics", headers=bearer(metrics)).status_code == 200
    assert get(f"{guarded_url}/v1/models", headers=bearer(metrics)).status_code == 403
    assert get(f"{guarded_url}/metrics", headers=bearer(admin)).status_code == 200
    assert post(f"{guarded_url}/api/copy", json={}, headers=bearer(user)).status_code == 403


def test_revoked_key_ends_within_seconds(guarded_url: str, keys: KeyStore) -> None:
    """A key that another process revokes stops working without a restart."""
    key, secret = keys.add("a")
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(secret)).status_code == 200)
    assert keys.revoke(key.id)
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(secret)).status_code == 401)


def test_secrets_are_never_stored(keys: KeyStore, tmp_path: Path) -> None:
    """The file holds the hash of a key, not the key."""
    _, secret = keys.add("a")
    keys.database.close()
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_given_secret_is_let_in_once(guarded_url: str, keys: KeyStore) -> None:
    """ensure() takes a secret from outside, any number of times."""
    secret = "a-secret-from-a-mounted-file"
    assert keys.ensure(secret, "file") == keys.ensure(secret, "file")
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(secret)).status_code == 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic d3Jvbmc="},
        {"authorization": "Bearer " + "a" * 600},
        {"x-api-key": ""},
        {"authorization": "Bearer"},
    ],
)
def test_bad_keys_are_401(guarded_url: str, headers: dict[str, str]) -> None:
    """Unknown, overlong, empty or otherwise schemed credentials are 401."""
    assert get(f"{guarded_url}/v1/models", headers=headers).status_code == 401


def test_two_keys_are_a_400(guarded_url: str) -> None:
    """A request with two different credentials is refused: a proxy may have looked at the other one."""
    headers = [("authorization", "Bearer a"), ("authorization", "Bearer b")]
    assert get(f"{guarded_url}/v1/models", headers=headers).status_code == 400


def test_request_rate_is_429_with_headers(guarded_url: str, keys: KeyStore) -> None:
    """The third request of two a minute is 429 with Retry-After, and the headers count down."""
    _, secret = keys.add("a", requests_per_minute=2)
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(secret)).status_code == 200)
    url = f"{guarded_url}/v1/chat/completions"
    left = [post(url, json=CHAT, headers=bearer(secret)).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
    assert left == ["1", "0"]
    refused = post(url, json=CHAT, headers=bearer(secret))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 20
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_token_rate_and_daily_budget(guarded_url: str, keys: KeyStore) -> None:
    """Used tokens count against the minute's rate and the day's budget."""
    _, rated = keys.add("a", tokens_per_minute=5)
    _, budget = keys.add("b", tokens_per_day=5)
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(budget)).status_code == 200)
    url = f"{guarded_url}/v1/chat/completions"
    for secret, code in ((rated, "rate_limit_exceeded"), (budget, "insufficient_quota")):
        assert post(url, json=CHAT, headers=bearer(secret)).status_code == 200
        refused = post(url, json=CHAT, headers=bearer(secret))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, code)


def test_usage_is_recorded_per_key(guarded_url: str, keys: KeyStore) -> None:
    """What a key used can be asked of the store, by day and model."""
    key, secret = keys.add("a")
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(secret)).status_code == 200)
    post(f"{guarded_url}/v1/chat/completions", json=CHAT, headers=bearer(secret))
    until(lambda: asyncio.run(keys.usage(key.id)))
    row = asyncio.run(keys.usage(key.id))[0]
    assert (row.model, row.requests, row.prompt_tokens, row.completion_tokens) == ("tiny", 1, 7, 3)


def test_one_key_never_reads_anothers_response(guarded_url: str, keys: KeyStore) -> None:
    """A stored response is invisible to every other key, also as previous_response_id."""
    one, two = keys.add("one")[1], keys.add("two")[1]
    until(lambda: get(f"{guarded_url}/v1/models", headers=bearer(two)).status_code == 200)
    body = {"model": "tiny", "input": "Hi"}
    made = post(f"{guarded_url}/v1/responses", json=body, headers=bearer(one)).json()["id"]
    assert get(f"{guarded_url}/v1/responses/{made}", headers=bearer(one)).status_code == 200
    assert get(f"{guarded_url}/v1/responses/{made}", headers=bearer(two)).status_code == 404
    chained = {**body, "previous_response_id": made}
    assert post(f"{guarded_url}/v1/responses", json=chained, headers=bearer(two)).status_code == 404


def test_open_address_without_a_key_refuses_to_start(manager: Any) -> None:
    """Listening on all addresses without a key exits with the cure."""
    config = GatewayConfig(host="0.0.0.0", port=0)
    app = create_app(manager, config)
    with pytest.raises(SystemExit, match="sage-llm keys add"):
        serve(app, config)
    app.state.gateway.database.close()


def test_first_key_over_http_must_be_an_admins(manager: Any) -> None:
    """Nobody can lock the management routes by making a user's key first; after an admin's key all is closed."""
    with running(create_app(manager)) as server:
        url = f"{server.url}/v1/management/keys"
        refused = post(url, json={"name": "a"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "role")
        made = post(url, json={"name": "root", "role": "admin"})
        assert made.status_code == 201
        assert get(f"{server.url}/v1/models").status_code == 401
        admin = bearer(made.json()["key"])
        assert post(url, json={"name": "a"}, headers=admin).status_code == 201
        listed = get(url, headers=admin).json()["keys"]
        assert [k["name"] for k in listed] == ["root", "a"]
        assert "hash" not in listed[0]
        assert httpx2.delete(f"{url}/a", headers=admin, trust_env=False).status_code == 200
        assert httpx2.delete(f"{url}/nobody", headers=admin, trust_env=False).status_code == 404
        assert get(f"{server.url}/v1/management/usage", headers=admin).status_code == 200


def test_bucket_refills_evenly() -> None:
    """A bucket of 60 a minute gives one a second and saves up at most 60."""
    bucket = Bucket(60, 0.0)
    bucket.level = 0.0
    assert bucket.wait_for(1) == 1.0
    bucket.refill(1.0)
    assert bucket.wait_for(1) == 0.0
    bucket.refill(1000.0)
    assert bucket.level == 60.0


def test_metrics_have_bounded_labels(http: httpx2.Client) -> None:
    """Random model names and paths add no label; tokens and latencies are counted."""
    for i in range(50):
        http.post("/v1/chat/completions", json={**CHAT, "model": f"random-{i}"})
        http.get(f"/random/{i}")
    http.post("/v1/chat/completions", json=CHAT)
    text = http.get("/metrics").text
    assert "random" not in text
    assert 'sagellm_tokens_total{kind="completion",model="tiny"}' in text
    assert 'route="/v1/chat/completions",status="404"' in text
