"""Fixtures for all tests; async tests run under trio without a marker."""

from __future__ import annotations

from pytest_trio.enable_trio_mode import (  # type: ignore[import-untyped]
    pytest_collection_modifyitems,
    pytest_fixture_setup,
)

from tests.servers import bucket_name, minio_server, seaweedfs_server

__all__ = [
    "bucket_name",
    "minio_server",
    "pytest_collection_modifyitems",
    "pytest_fixture_setup",
    "seaweedfs_server",
]
