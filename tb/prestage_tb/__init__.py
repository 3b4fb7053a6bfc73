"""Test bench support: simulator runner, stream drivers and the compiled in-process simulation."""
