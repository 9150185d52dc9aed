"""The control plane: what the minio SDK does for us, in a thread."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from s3fuse.errors import Refused, Unavailable
from s3fuse.store.s3client import error_kind

if TYPE_CHECKING:
    from s3fuse.credentials import Provider


def make_bucket(
    endpoint: str, bucket: str, credentials: Provider, region: str, ca_file: str | None, deadline_s: float
) -> None:
    """Makes the bucket unless it is there and ours; blocks for up to `deadline_s`. Raises StoreErrors."""
    url = urlsplit(endpoint)
    tls = ssl.create_default_context(cafile=ca_file) if url.scheme == "https" else None
    pool = urllib3.PoolManager(timeout=deadline_s, retries=False, ssl_context=tls)
    keys = credentials.retrieve()
    client = Minio(
        endpoint=url.netloc,
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        session_token=keys.session_token,
        secure=tls is not None,
        region=region,
        http_client=pool,
    )
    try:
        client.make_bucket(bucket_name=bucket, location=region)
    except S3Error as exc:
        if exc.code != "BucketAlreadyOwnedByYou":
            status = exc.response.status
            raise error_kind(status, exc.code or "")(f"create bucket {endpoint}/{bucket}: {exc.message}") from exc
    except (MinioException, urllib3.exceptions.HTTPError) as exc:
        raise Unavailable(f"create bucket {endpoint}/{bucket}: {exc}") from exc
    except ValueError as exc:
        raise Refused(f"create bucket {endpoint}/{bucket}: {exc}") from exc
    finally:
        pool.clear()
