"""``sage-llm serve --workers 2``: two gateways, one supervisor, one engine."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

BODY = {"model": "mock", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": 1}


def chat(url: str, max_tokens: int = 8) -> str:
    reply = httpx2.post(f"{url}/chat/completions", json={**BODY, "max_tokens": max_tokens}, timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def pids(output: list[str], what: str) -> list[int]:
    (line,) = [line for line in output if line.startswith(what)]
    return [int(number) for number in re.findall(r"\d+", line.split("pid", 1)[1].split("(")[0])]


def state(pid: int) -> str:
    """The process's state letter; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except FileNotFoundError:
        return ""


def wait_until(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def served(start_server, tmp_path):
    server = start_server("--mock", "--workers", "2", env={"XDG_STATE_HOME": str(tmp_path)})
    wait_until(lambda: any(line.startswith("stop") for line in server.output))
    yield server
    server.stop()


def test_a_worker_is_killed(served):
    """After kill -9 of a gateway the other one serves on with the same engine, and a new one takes its place."""
    said, (engine,), workers = chat(served.base_url), pids(served.output, "engine"), pids(served.output, "workers")
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: any("starting another" in line for line in served.output))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: chat(served.base_url), range(8))) == [said] * 8
    assert state(engine)
    assert served.stop() == 0
    assert not any(state(pid) for pid in (engine, *workers))


def test_stream_goes_on_after_its_worker_died(served):
    """A client whose gateway was killed in mid-stream sends its request again with the last id, and has the whole answer."""
    body = {**BODY, "max_tokens": 400, "temperature": 1.0, "stream": True, "seed": None, "ignore_eos": True}
    workers, got, last_id = pids(served.output, "workers"), "", ""

    def take(headers: dict[str, str], until: int) -> bool:
        nonlocal got, last_id
        with httpx2.stream(
            "POST", f"{served.base_url}/chat/completions", json=body, headers=headers, timeout=30
        ) as reply:
            for row in reply.iter_lines():
                if row.startswith("id: "):
                    last_id = row[4:]
                elif row == "data: [DONE]":
                    return True
                elif row.startswith("data: "):
                    chunk = json.loads(row[6:])
                    got += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                    if len(got) > until:
                        for pid in workers:
                            os.kill(pid, signal.SIGKILL)
                        until = 10**9
        return False

    with contextlib.suppress(httpx2.HTTPError):
        assert not take({"X-Stream-Resume": "true"}, 20)
    killed_at = len(got)
    assert 20 < killed_at < 400
    wait_until(lambda: sum("starting another" in line for line in served.output) == 2)
    first_id = last_id
    wait_until(lambda: answers(served.base_url))
    assert take({"Last-Event-ID": last_id}, 10**9)
    resumed, got = got, ""
    assert take({"Last-Event-ID": first_id.partition(".")[0] + ".0"}, 10**9)
    assert resumed == got  # the whole answer in one piece, from the same id


def answers(url: str) -> bool:
    try:
        return httpx2.get(url.removesuffix("/v1") + "/ready", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def test_the_engine_is_killed(served):
    """After kill -9 of the engine both gateways are told of its successor, and running answers are finished by it."""
    expected = chat(served.base_url, 300)
    (engine,) = pids(served.output, "engine")
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(chat, served.base_url, 300) for _ in range(4)]
        time.sleep(0.5)
        os.kill(engine, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [expected] * 4
    assert chat(served.base_url, 300) == expected


def test_engines_are_the_supervisors(served):
    """A worker neither stops nor starts engines: it says so, and the engine serves on."""
    root = served.base_url.removesuffix("/v1")
    stopped = httpx2.delete(f"{root}/v1/management/engines/mock", timeout=30)
    assert stopped.status_code >= 400
    assert "belongs to the supervisor" in stopped.text
    started = httpx2.post(f"{root}/v1/management/engines", json={"model_id": "mock", "engine_id": "two"}, timeout=30)
    assert started.status_code >= 400
    assert "cannot be started here" in started.text
    assert chat(served.base_url)


def test_the_supervisor_is_killed(served):
    """When the supervisor is killed its workers and its engine end by themselves."""
    children = [*pids(served.output, "engine"), *pids(served.output, "workers")]
    os.kill(served.pid, signal.SIGKILL)
    wait_until(lambda: not any(state(pid) for pid in children))


@pytest.mark.parametrize(
    ("flags", "said"), [(["--state", "none"], "leave --state none out"), (["--auto-scale"], "decides in one process")]
)
def test_what_workers_cannot_share(capsys, flags, said):
    """What would differ from worker to worker is refused by name."""
    from sagellm.cli.main import main

    assert main(["serve", "--mock", "--port", "0", "--workers", "2", *flags]) == 1
    assert said in capsys.readouterr().err


@pytest.fixture
def by_worker():
    """Connect to each worker: which one accepts is the kernel's choice, so connections are opened until each has one."""
    with contextlib.ExitStack() as stack:

        def connect(url: str, workers: list[int], key: str = "") -> dict[int, httpx2.Client]:
            found: dict[int, httpx2.Client] = {}
            until = time.monotonic() + 30
            while found.keys() != set(workers):
                assert time.monotonic() < until, f"only {sorted(found)} of {workers} accept"
                headers = {"x-api-key": key} if key else {}
                client = stack.enter_context(httpx2.Client(base_url=url, timeout=20, headers=headers))
                processes = client.get("/v1/management/status").json()["gateway"]["processes"]
                found.setdefault(processes[0]["pid"], client)
            return found

        yield connect


def policies(clients: dict[int, httpx2.Client]) -> list[dict[str, str]]:
    return [client.get("/v1/management/policy").json() for client in clients.values()]


def metric(client: httpx2.Client, name: str) -> float:
    text = client.get("/metrics").text
    return sum(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(name))


def test_policy_and_metrics_are_of_all_workers(served, by_worker):
    """A policy that one worker is told holds in all and in one that begins later; metrics count what all served, also the dead."""
    root = served.base_url.removesuffix("/v1")
    clients = by_worker(root, pids(served.output, "workers"))
    wanted = {"scheduling_policy": "priority", "routing_strategy": "round_robin"}
    one, other = clients.values()
    assert one.put("/v1/management/policy", json=wanted).json() == wanted
    assert policies(clients) == [wanted] * 2
    assert other.put("/v1/management/policy", json={"scheduling_policy": "best"}).status_code == 400
    assert policies(clients) == [wanted] * 2
    name = 'sagellm_http_requests_total{outcome="ok",route="/v1/chat/completions"'
    for client, count in ((one, 3), (other, 2)):
        for _ in range(count):
            client.post("/v1/chat/completions", json={**BODY, "max_tokens": 2})
    assert [metric(client, name) for client in clients.values()] == [5, 5]
    dead = next(iter(clients))
    os.kill(dead, signal.SIGKILL)
    clients.pop(dead)
    wait_until(lambda: any("starting another" in line for line in served.output))
    (left,) = clients.values()
    wait_until(lambda: len(left.get("/v1/management/status").json()["gateway"]["processes"]) == 2)
    assert metric(left, name) == 5
    successor = {p["pid"] for p in left.get("/v1/management/status").json()["gateway"]["processes"]} - set(clients)
    clients |= by_worker(root, [*clients, *successor])
    assert policies(clients) == [wanted] * 2
    assert {metric(client, name) for client in clients.values()} == {5}


def test_a_drained_engine_gets_nothing_from_any_worker(served, by_worker):
    """An engine that one worker is told to drain gets no new request from the other one either."""
    clients = by_worker(served.base_url.removesuffix("/v1"), pids(served.output, "workers"))
    one, other = clients.values()
    assert one.post("/v1/management/engines/mock/drain").json()["state"] == "DRAINING"
    for client in (one, other):
        assert client.get("/v1/management/engines/mock").json()["state"] == "DRAINING"


def test_rates_hold_over_all_workers(start_server, tmp_path, by_worker):
    """What a key spends at one worker counts at the other one within a moment."""
    server = start_server("--mock", "--workers", "2", "--require-key", env={"XDG_STATE_HOME": str(tmp_path)})
    wait_until(lambda: any(line.startswith("stop") for line in server.output))
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    add = [sys.executable, "-m", "sagellm.cli.main", "keys", "add"]
    secrets = []
    for more in (["root", "--role", "admin"], ["ann", "--rpm", "20"]):
        done = subprocess.run([*add, *more], env=env, capture_output=True, text=True, check=True)
        secrets.append(re.search(r"sk-\S+", done.stdout)[0])
    root = server.base_url.removesuffix("/v1")
    wait_until(lambda: httpx2.get(f"{root}/v1/models", headers={"x-api-key": secrets[1]}).status_code == 200)
    clients = by_worker(root, pids(server.output, "workers"), secrets[0])
    one, other = clients.values()
    ann = {"x-api-key": secrets[1]}
    statuses = [
        one.post("/v1/chat/completions", json={**BODY, "max_tokens": 2}, headers=ann).status_code for _ in range(21)
    ]
    assert statuses.count(200) in (20, 21)
    wait_until(lambda: other.post("/v1/embeddings", json={}, headers=ann).status_code == 429)
    server.stop()


def test_an_engine_that_one_worker_is_told_of_serves_at_all(start_server, served, by_worker):
    """An engine by address serves at every worker, also at one that begins later; its heartbeat and its end reach all."""
    elsewhere = start_server("--mock")
    port = httpx2.URL(elsewhere.base_url).port
    root = served.base_url.removesuffix("/v1")
    clients = by_worker(root, pids(served.output, "workers"))
    engine = {
        "engine_id": "elsewhere", "model_id": "theirs", "host": "127.0.0.1", "port": port,
        "metadata": {"served_model": "mock", "lease_s": 60},
    }  # fmt: skip
    one, other = clients.values()
    registered = one.post("/v1/management/engines/register", json=engine)
    assert (registered.status_code, registered.json()["engine_id"]) == (201, "elsewhere")
    assert other.post("/v1/management/engines/register", json=engine).status_code == 400  # it is there already
    assert one.post("/v1/management/engines/register", json={**engine, "port": 0}).status_code == 400
    for client in clients.values():
        wait_until(lambda client=client: serves(client))
    assert other.post("/v1/management/engines/elsewhere/heartbeat", json={}).status_code == 200
    dead = next(iter(clients))
    os.kill(dead, signal.SIGKILL)
    del clients[dead]
    wait_until(lambda: any("starting another" in line for line in served.output))
    wait_until(lambda: len(other.get("/v1/management/status").json()["gateway"]["processes"]) == 2)
    successor = {p["pid"] for p in other.get("/v1/management/status").json()["gateway"]["processes"]} - set(clients)
    clients |= by_worker(root, [*clients, *successor])
    assert all(map(serves, clients.values()))  # at once: a worker that does not know them yet takes no request
    (new,) = (clients[pid] for pid in successor)
    assert new.delete("/v1/management/engines/elsewhere").status_code == 200
    assert [client.get("/v1/management/engines/elsewhere").status_code for client in clients.values()] == [404, 404]
    assert chat(served.base_url)


def serves(client: httpx2.Client) -> bool:
    reply = client.post("/v1/chat/completions", json={**BODY, "model": "theirs", "max_tokens": 4})
    return reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 4


def test_engines_by_address_are_known_after_the_supervisor_was_killed(start_server, tmp_path, port):
    """A server with workers that was killed and starts again on its port knows the engines that were registered there."""
    elsewhere = start_server("--mock")
    engine = {
        "engine_id": "elsewhere", "model_id": "theirs", "host": "127.0.0.1",
        "port": httpx2.URL(elsewhere.base_url).port, "metadata": {"served_model": "mock"},
    }  # fmt: skip
    flags, env = ("--mock", "--workers", "2", "--port", str(port)), {"XDG_STATE_HOME": str(tmp_path)}
    first = start_server(*flags, env=env)
    wait_until(lambda: any(line.startswith("stop") for line in first.output))
    with httpx2.Client(base_url=first.base_url.removesuffix("/v1"), timeout=20) as client:
        assert client.post("/v1/management/engines/register", json=engine).status_code == 201
    children = [*pids(first.output, "engine"), *pids(first.output, "workers")]
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not any(state(pid) for pid in children))
    second = start_server(*flags, env=env)
    wait_until(lambda: any(line.startswith("stop") for line in second.output))
    with httpx2.Client(base_url=second.base_url.removesuffix("/v1"), timeout=20) as client:
        wait_until(lambda: serves(client))
        assert client.delete("/v1/management/engines/elsewhere").status_code == 200


def test_a_gateway_without_a_model_has_workers_too(start_server, tmp_path, by_worker):
    """``sage-llm gateway --workers 2`` over a file of engines: each worker answers from them, and a killed one is replaced."""
    elsewhere = start_server("--mock")
    file = tmp_path / "engines.json"
    row = {"engine_id": "elsewhere", "model_id": "theirs", "host": "127.0.0.1", "metadata": {"served_model": "mock"}}
    row["port"] = httpx2.URL(elsewhere.base_url).port
    file.write_text(json.dumps({"engines": [row]}))
    flags = ("--workers", "2", "--engine-file", str(file))
    server = start_server(*flags, command="gateway", env={"XDG_STATE_HOME": str(tmp_path)})
    wait_until(lambda: any(line.startswith("stop") for line in server.output))
    workers = pids(server.output, "workers")
    clients = by_worker(server.base_url.removesuffix("/v1"), workers)
    assert all(map(serves, clients.values()))
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: any("starting another" in line for line in server.output))
    assert serves(clients[workers[1]])
    assert server.stop() == 0
    assert not any(state(pid) for pid in workers)
