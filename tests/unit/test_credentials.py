"""Where server and keys come from: the order, rotation, and that no text shows a secret."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from minio.credentials.providers import IamAwsProvider

from s3fuse.config import MountConfig
from s3fuse.credentials import ENDPOINTS, KEY_PAIRS, read_keys, resolve
from s3fuse.errors import ExitCode, UserError

AWS_FILE = """
[default]
aws_access_key_id = default-key
aws_secret_access_key = default-secret
[other]
aws_access_key_id = other-key
aws_secret_access_key = other-secret
aws_session_token = other-token
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and no variable that means anything to us."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MINIO_", "MC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def settings(**options: object) -> MountConfig:
    return MountConfig(mountpoint=Path("/mnt"), bucket="bucket", **options)  # type: ignore[arg-type]


def keys(**options: object) -> tuple[str, str, str | None]:
    found = resolve(settings(**{"endpoint": "http://h:1", **options})).provider.retrieve()
    return found.access_key, found.secret_key, found.session_token


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def replace(path: Path, text: str) -> None:
    """As secrets are rotated: a new file takes the name."""
    write(path.with_name("new"), text).replace(path)


def alias(home: Path, **entry: str) -> Path:
    return write(home / ".mc/config.json", json.dumps({"aliases": {"mine": entry}}))


# -- the server


def test_the_order_of_servers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY", "s")
    write(home / ".aws/config", "[default]\nendpoint_url = http://profile:1\n")
    assert resolve(settings()).endpoint == "http://profile:1"
    for name in reversed(ENDPOINTS):
        monkeypatch.setenv(name, f"http://{name}:1")
        assert resolve(settings()).endpoint == f"http://{name}:1"
    alias(home, url="http://alias:1", accessKey="a", secretKey="s")
    assert resolve(settings(alias="mine")).endpoint == "http://alias:1"
    assert resolve(settings(alias="mine", endpoint="http://flag:1")).endpoint == "http://flag:1"


@pytest.mark.parametrize("variable", ENDPOINTS)
def test_a_server_is_also_in_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY", "s")
    monkeypatch.setenv(f"{variable}_FILE", str(write(home / "endpoint", "https://secret:1\n")))
    assert resolve(settings()).endpoint == "https://secret:1"


@pytest.mark.parametrize(("given", "used"), [("host:9000", "http://host:9000"), ("https://h/", "https://h")])
def test_forms_of_a_server(monkeypatch: pytest.MonkeyPatch, given: str, used: str) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY", "s")
    assert resolve(settings(endpoint=given)).endpoint == used


def test_no_server_says_how_to_name_one() -> None:
    with pytest.raises(UserError, match=r"--endpoint.*MINIO_ENDPOINT") as raised:
        resolve(settings())
    assert raised.value.exit_code == ExitCode.USAGE


def test_a_server_that_speaks_no_http() -> None:
    with pytest.raises(UserError, match=r"--endpoint: 'ftp://h' is not allowed"):
        resolve(settings(endpoint="ftp://h"))


@pytest.mark.parametrize(
    "text",
    ["http://h:x", "http://h:0", "http://h:70000", "http://", "http://h/bucket", "http://h?x", "http://[h", "h#x"],
)
def test_what_is_no_server(home: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", text)
    with pytest.raises(UserError) as raised:
        resolve(settings())
    assert f"AWS_ENDPOINT_URL: {text!r} is not allowed; it takes http://HOST:PORT" in str(raised.value)
    alias(home, url=text)
    with pytest.raises(UserError, match="url of the mc alias mine: "):
        resolve(settings(alias="mine"))


@pytest.mark.parametrize("text", ["http://key:s3cret@h:1", "key:s3/cret@h", "http://h:1/?token=s3cret@"])
def test_a_password_in_a_server_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UserError, match="--endpoint has a user or a password in it") as raised:
        resolve(settings(endpoint=text))
    assert "s3" not in str(raised.value).replace("s3fuse", "")
    assert raised.value.exit_code == ExitCode.USAGE


def test_the_order_of_regions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def region(**options: str) -> str:
        return resolve(settings(endpoint="http://h:1", **options)).region

    write(home / ".aws/credentials", AWS_FILE)
    assert region() == "us-east-1"
    write(home / ".aws/config", "[default]\nregion = eu-1\n[profile other]\nregion = eu-2\n")
    assert region() == "eu-1"
    assert region(profile="other") == "eu-2"
    for number, name in enumerate(("AWS_DEFAULT_REGION", "AWS_REGION")):
        monkeypatch.setenv(name, f"env-{number}")
        assert region() == f"env-{number}"
    assert region(region="flag") == "flag"


# -- keys


def test_the_order_of_keys(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere")
    assert isinstance(resolve(settings(endpoint="http://h:1")).provider, IamAwsProvider)
    write(home / ".aws/credentials", AWS_FILE)
    assert keys() == ("default-key", "default-secret", None)
    for access, secret, _ in reversed(KEY_PAIRS):
        monkeypatch.setenv(access, f"{access}-a")
        assert keys()[0] != f"{access}-a", "one half of a pair is none"
        monkeypatch.setenv(secret, f"{secret}-s")
        assert keys() == (f"{access}-a", f"{secret}-s", None)
    assert keys(profile="other") == ("other-key", "other-secret", "other-token")
    alias(home, url="http://h:1", accessKey="alias-a", secretKey="alias-s", sessionToken="alias-t")
    assert keys(alias="mine") == ("alias-a", "alias-s", "alias-t")
    assert keys(alias="mine", credentials_file=write(home / "keys", "file-a:file-s\n")) == ("file-a", "file-s", None)


def test_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(endpoint: str) -> str | None:
        provider = resolve(settings(endpoint=endpoint)).provider
        assert isinstance(provider, IamAwsProvider)
        return provider._custom_endpoint

    aws = "https://s3.eu-west-1.amazonaws.com"
    assert asked(aws) is None, "an instance's role"
    with pytest.raises(UserError, match="AWS_WEB_IDENTITY_TOKEN_FILE"):
        resolve(settings(endpoint="http://h:1"))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/keys")
    assert asked("http://h:1") is None
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere")
    assert asked("http://h:1") == "http://h:1", "MinIO has its own token service"
    assert asked(aws) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://sts:1")
    assert asked("http://h:1") == asked(aws) == "http://sts:1"


def test_a_session_token_comes_with_aws_keys_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, name)
    assert keys() == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    for name in ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"):
        monkeypatch.setenv(name, name)
    assert keys() == ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", None)


@pytest.mark.parametrize("pair", KEY_PAIRS)
def test_each_key_is_also_in_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str, str]) -> None:
    for name in filter(None, pair):
        monkeypatch.setenv(f"{name}_FILE", str(write(home / name, f"{name}-value\n")))
    assert keys() == tuple(f"{name}-value" if name else None for name in pair)


def test_the_profile_variable_chooses_a_section(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(write(home / "elsewhere", AWS_FILE)))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert keys() == ("other-key", "other-secret", "other-token")


def test_no_keys_says_where_it_looked() -> None:
    with pytest.raises(UserError, match=r"no keys.*MINIO_ROOT_USER.*_FILE.*\.aws/credentials") as raised:
        keys()
    assert raised.value.exit_code == ExitCode.USAGE


def test_what_is_named_but_missing_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--profile nosuch"):
        keys(profile="nosuch")
    write(home / ".aws/credentials", AWS_FILE)
    with pytest.raises(UserError, match="profile nosuch"):
        keys(profile="nosuch")
    with pytest.raises(UserError, match=f"{home}/nofile cannot be read: No such file"):
        keys(credentials_file=home / "nofile")
    alias(home, url="http://h:1")
    with pytest.raises(UserError, match="'mine' has no keys"):
        keys(alias="mine")
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY_FILE", "/nowhere/secret")
    with pytest.raises(UserError, match="MINIO_SECRET_KEY_FILE: /nowhere/secret cannot be read"):
        keys()


# -- files


@pytest.mark.parametrize(
    ("text", "profile", "found"),
    [
        (AWS_FILE, None, ("default-key", "default-secret", None)),
        (AWS_FILE, "other", ("other-key", "other-secret", "other-token")),
        ("key:secret\n", None, ("key", "secret", None)),
        ('{"accessKey": "k", "secretKey": "s", "sessionToken": "t"}', None, ("k", "s", "t")),
    ],
)
def test_forms_of_a_file(tmp_path: Path, text: str, profile: str | None, found: tuple[str, str, str | None]) -> None:
    read = read_keys(write(tmp_path / "keys", text), profile)
    assert (read.access_key, read.secret_key, read.session_token) == found


@pytest.mark.parametrize("text", ["", "s3cret", "s3cret:", "a:b:s3cret", '{"secretKey": "s3cret"}', "[x]\ns3cret", "{"])
def test_a_file_without_keys_is_named_and_not_shown(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "keys", text)
    with pytest.raises(UserError, match="holds no keys; it takes") as raised:
        read_keys(path, None)
    assert str(path) in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_replaced_file_is_read_again(home: Path) -> None:
    path = write(home / "keys", "one:1111\n")
    provider = resolve(settings(endpoint="http://h:1", credentials_file=path)).provider
    assert provider.retrieve().access_key == "one"
    replace(path, "two:2222\n")
    assert provider.retrieve().access_key == "two"


@pytest.mark.parametrize("meanwhile", ["", "half", None])
def test_the_last_good_keys_are_used_while_a_file_is_replaced(home: Path, meanwhile: str | None) -> None:
    path = write(home / "keys", "one:1111\n")
    provider = resolve(settings(endpoint="http://h:1", credentials_file=path)).provider
    if meanwhile is None:
        path.unlink()
    else:
        path.write_text(meanwhile)
    assert provider.retrieve().access_key == "one"
    replace(path, "two:2222\n")
    assert provider.retrieve().access_key == "two"


@pytest.mark.parametrize("meanwhile", ["", None])
def test_docker_secrets_rotate_too(home: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str | None) -> None:
    path = write(home / "secret", "one\n")
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY_FILE", str(path))
    provider = resolve(settings(endpoint="http://h:1")).provider
    if meanwhile is None:
        path.unlink()
    else:
        path.write_text(meanwhile)
    assert provider.retrieve().secret_key == "one"
    replace(path, "two\n")
    assert provider.retrieve().secret_key == "two"


def test_an_alias_that_changes_is_read_again(home: Path) -> None:
    alias(home, url="http://h:1", accessKey="one", secretKey="s")
    provider = resolve(settings(alias="mine")).provider
    alias(home, url="http://h:1", accessKey="three", secretKey="s")
    assert provider.retrieve().access_key == "three"


def test_a_file_that_everybody_can_read_is_told(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(home / "keys", "key:s3cret\n")
    path.chmod(0o600)
    keys(credentials_file=path)
    assert caplog.messages == []
    path.chmod(0o604)
    keys(credentials_file=path)
    assert [str(path) in message and "s3cret" not in message for message in caplog.messages] == [True]


def test_nothing_prints_a_secret(home: Path) -> None:
    server = resolve(settings(endpoint="http://h:1", credentials_file=write(home / "keys", "key:s3cret\n")))
    assert "s3cret" not in repr(server)
