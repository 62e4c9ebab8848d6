"""SAGE_GATEWAY_* variables."""

import pytest

from sagellm.migrate.old_environment import translate_gateway_environment


def test_old_variables_set_the_new_ones_unless_they_are_set():
    """A known variable is carried over with a warning; what is set under its new name wins."""
    environ = {"SAGE_GATEWAY_PORT": "9000", "SAGE_GATEWAY_HOST": "127.0.0.2", "SAGELLM_HOST": "127.0.0.3"}
    with pytest.warns(DeprecationWarning, match="SAGE_GATEWAY_(PORT|HOST)"):
        assert translate_gateway_environment(environ) == []
    assert environ["SAGELLM_PORT"] == "9000"
    assert environ["SAGELLM_HOST"] == "127.0.0.3"


def test_a_variable_without_successor_is_named():
    """It is not dropped in silence."""
    with pytest.warns(DeprecationWarning, match="SAGE_GATEWAY_MAGIC .* has no successor"):
        assert translate_gateway_environment({"SAGE_GATEWAY_MAGIC": "1"}) == ["SAGE_GATEWAY_MAGIC"]
