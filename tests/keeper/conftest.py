"""The fixtures of the tests on real mounts."""

from tests.fuse.conftest import buckets, gate, mounts, server

__all__ = ["buckets", "gate", "mounts", "server"]
