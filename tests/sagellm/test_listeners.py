import os
import socket

import pytest

from sagellm import doctor
from sagellm.listeners import Listener, listeners


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_listening_socket_is_known_by_user_and_process(address: str) -> None:
    """A port tells whose process listens there, over IPv4 and IPv6; a port that nobody listens on tells nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as one:
        one.bind((address, 0))
        port = one.getsockname()[1]
        assert listeners(port) == []
        one.listen()
        (found,) = listeners(port)
        assert (found.uid, found.pid) == (os.getuid(), os.getpid())
        assert "python" in found.command
    assert listeners(port) == []


@pytest.mark.parametrize(
    ("command", "state"), [("/x/bin/python /x/bin/sage-llm serve", "ok"), ("/usr/bin/nginx -g x", "warn")]
)
def test_doctor_says_who_has_the_port(command: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of ours on the usual port is well; another program is named."""
    monkeypatch.setattr(doctor, "_listening", lambda _port: True)
    monkeypatch.setattr(doctor, "listeners", lambda _port: [Listener(0, 77, command)])
    found, fact, cure = doctor.CHECKS["port 8889"]()
    assert found == state
    assert "77" in fact
    assert bool(cure) == (state == "warn")
