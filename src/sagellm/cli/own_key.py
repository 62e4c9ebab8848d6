"""The key by which a user's own commands operate the user's own server.

Once a server has keys it demands one of everybody, and the commands of the person who started it should not have to be told. Whoever
may write the server's state file may make keys there, so this gives nothing that was not theirs: a key of the role admin is made on first
need, and kept beside the state in a file that nobody else can read. It is sent to a loopback address only, and only where the process
that listens there is this user's: another user's program on that port does not get to see it.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

from sagellm import settings
from sagellm.listeners import listeners

__all__ = ["own_key", "own_name"]

# A running server looks at its keys again after a second.
_UNTIL_SEEN_S = 1.2


def own_name() -> str:
    """Return what the key of this user's commands is called."""
    return f"commands of {getpass.getuser()}"


def own_key(url: str) -> str | None:
    """Return the key for the server at `url`; None where it is not this user's own, or no key was ever made."""
    configured = settings.resolve()["state"].value
    state = Path(configured).expanduser() if configured else settings.state_path()
    if not _is_own(url) or not state.is_file() or not os.access(state, os.W_OK):
        return None
    from sagellm_gateway.store.database import Database
    from sagellm_gateway.store.keys import KeyStore, digest

    file = state.with_suffix(".key")
    secret = file.read_text(encoding="ascii").strip() if file.is_file() else ""
    database = Database(str(state))
    try:
        keys = KeyStore(database)
        good = {key.hash for key in keys.all() if key.revoked is None}
        if not good or digest(secret) in good:
            return secret or None
        _, secret = keys.add(own_name(), "admin")
    finally:
        database.close()
    _keep(file, secret)
    time.sleep(_UNTIL_SEEN_S)
    return secret


def _keep(file: Path, secret: str) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as out:  # noqa: PTH123 - with its mode
        out.write(secret + "\n")


def _is_own(url: str) -> bool:
    """Return whether `url` is on this machine and everything that listens there belongs to this user."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        if not ipaddress.ip_address(host).is_loopback:
            return False
    except ValueError:
        return False
    owners = {listener.uid for listener in listeners(parts.port or 80)}
    return owners == {os.getuid()}
