"""Fixtures of the runtime's tests that predictions need too."""

from __future__ import annotations

from tests.runtime.conftest import _no_launcher, make_state

__all__ = ["_no_launcher", "make_state"]
