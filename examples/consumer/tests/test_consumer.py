"""Tests as they were written against the old packages."""

import importlib
from unittest import mock

from sage.llm.control_plane import ControlPlaneManager


def test_the_app_can_be_made():
    """The factory is found by name and gives a new app on each call."""
    server = importlib.import_module("sage.llm.gateway.server")
    assert server.create_app() is not server.create_app()


def test_the_manager_can_be_patched():
    """A patch on the import path reaches the class."""
    with mock.patch("sage.llm.control_plane.manager.ControlPlaneManager.list_engines", return_value=["one"]):
        assert ControlPlaneManager().list_engines() == ["one"]
