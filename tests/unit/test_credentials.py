"""Where server and keys come from: the order, rotation, and that no text shows a secret."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from minio.credentials.providers import IamAwsProvider

from s3fuse import keytext
from s3fuse.config import MountConfig
from s3fuse.credentials import ENDPOINTS, KEY_PAIRS, open_key_files, read_keys, resolve
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
    with pytest.raises(UserError, match=f"'mine' has no keys in {home}/.mc/config.json"):
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


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o444, 0o660])
@pytest.mark.parametrize("kind", ["file", "alias", "aws", "variable"])
def test_a_file_that_others_can_read_is_told(home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: int) -> None:
    options: dict[str, object] = {}
    if kind == "file":
        path = write(home / "keys", "key:s3cret\n")
        options = {"credentials_file": path}
    elif kind == "alias":
        path = alias(home, url="http://h:1", accessKey="key", secretKey="s3cret")
        options = {"alias": "mine"}
    elif kind == "aws":
        path = write(home / ".aws/credentials", AWS_FILE)
    else:
        path = write(home / "secret", "s3cret\n")
        monkeypatch.setenv("MINIO_ACCESS_KEY", "key")
        monkeypatch.setenv("MINIO_SECRET_KEY_FILE", str(path))
    path.chmod(0o600)
    assert open_key_files(settings(**options)) == []
    path.chmod(mode)
    assert open_key_files(settings(**options)) == [
        f"others can read the keys in {path} (mode {mode:04o}); make it private: chmod 600 {path}"
    ]


def test_a_secret_of_docker_may_be_read_by_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keytext, "_SECRETS", home / "run/secrets")
    path = write(home / "run/secrets/keys", "key:s3cret\n")
    path.chmod(0o444)
    (home / "link").symlink_to(path)
    for named in (path, home / "link"):
        assert open_key_files(settings(credentials_file=named)) == []
    path.replace(home / "moved")
    assert len(open_key_files(settings(credentials_file=home / "moved"))) == 1


def test_nothing_prints_a_secret(home: Path) -> None:
    server = resolve(settings(endpoint="http://h:1", credentials_file=write(home / "keys", "key:s3cret\n")))
    assert "s3cret" not in repr(server)


# -- keys that are damaged

DAMAGE = [
    (b"\xef\xbb\xbf%s", r"begins with a byte order mark \(UTF-8\); save it as plain text without one"),
    (b"\xff\xfe%s", r"begins with a byte order mark \(UTF-16\)"),
    (b"\xfe\xff%s", r"begins with a byte order mark \(UTF-16\)"),
    (b"", "it is empty; it may be written only by half"),
    (b" \r\n\t", "it is empty"),
    (b"%s\0\0\0\0", "it is no text"),
    (b"\xe4%s", r"it is no UTF-8 text \(byte 1\)"),
    (b"%s" + b" " * (1 << 20), "it is no text"),
]
SOURCES = {
    "file": b"key:s3cret-s3cret",
    "json": b'{"accessKey": "key", "secretKey": "s3cret-s3cret"}',
    "aws": b"[default]\naws_access_key_id = key\naws_secret_access_key = s3cret-s3cret\n",
    "variable": b"s3cret-s3cret\n",
    "alias": b'{"aliases": {"mine": {"url": "http://h:1", "accessKey": "key", "secretKey": "s3cret-s3cret"}}}',
}


def place_of(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, object]]:
    """The file that keys of a kind are in, and the options that name it."""
    if kind == "variable":
        monkeypatch.setenv("MINIO_ACCESS_KEY", "key")
        monkeypatch.setenv("MINIO_SECRET_KEY_FILE", str(home / "secret"))
        return home / "secret", {}
    if kind == "alias":
        return home / ".mc/config.json", {"alias": "mine"}
    if kind == "aws":
        return home / ".aws/credentials", {}
    return home / "keys", {"credentials_file": home / "keys"}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(("damage", "text"), DAMAGE)
def test_a_damaged_file_is_named_with_what_is_wrong(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, damage: bytes, text: str
) -> None:
    """At the start it is an error; while mounted the keys from before are used, and the log says so once."""
    path, options = place_of(kind, home, monkeypatch)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(SOURCES[kind])
    provider = resolve(settings(endpoint="http://h:1", **options)).provider
    path.write_bytes(damage.replace(b"%s", SOURCES[kind]))
    for _ in range(4):
        assert provider.retrieve().secret_key == "s3cret-s3cret"
    (message,) = caplog.messages
    assert "the keys that were there before are used" in message
    told = [message]
    if kind != "alias":  # an alias that is not found is a bucket's name
        with pytest.raises(UserError, match=text) as raised:
            keys(**options)
        told.append(str(raised.value))
    for one in told:
        assert str(path) in one
        assert re.search(text, one)
        assert "s3cret" not in one
    path.write_bytes(SOURCES[kind].replace(b"s3cret-s3cret", b"another"))
    assert provider.retrieve().secret_key == "another"


def test_aliases_that_cannot_be_read_are_told_where_no_server_is_named(home: Path) -> None:
    path = write(home / ".mc/config.json", "\ufeff{}")
    with pytest.raises(UserError, match=rf"or use an mc alias \({path} cannot be used: it begins with a byte order"):
        resolve(settings())
    path.write_text('{"aliases": {')
    with pytest.raises(UserError, match=rf"or use an mc alias \({path} is no whole JSON\)"):
        resolve(settings())


@pytest.mark.parametrize(
    ("access", "secret", "token", "text"),
    [
        ("kéy", "s3cret", None, "character 2 of the access key is not ASCII"),
        ("key", "s3crét", None, "character 5 of the secret key is not ASCII"),
        ("key", "s3cret", "tok\u200ben", "character 4 of the session token is not ASCII"),
        ("", "s3cret", None, "the access key is empty"),
        ("key", "", None, "the secret key is empty"),
        ("a key", "s3cret", None, "the access key has a blank"),
        ("key", "s3cret\n", None, "the secret key has a blank, a line end"),
        ("key", "s3cret", "tok\r\nX-Evil: 1", "the session token has a blank, a line end"),
        ("key", "s3cret", "tok\x7fen", "the session token has a blank"),
    ],
)
def test_keys_that_no_request_can_be_signed_with(
    home: Path, monkeypatch: pytest.MonkeyPatch, access: str, secret: str, token: str | None, text: str
) -> None:
    entry = {"accessKey": access, "secretKey": secret} | ({} if token is None else {"sessionToken": token})
    told = []
    path = write(home / "keys", json.dumps(entry))
    alias(home, url="http://h:1", **entry)
    for options in ({"credentials_file": path}, {"alias": "mine"}):
        with pytest.raises(UserError, match=text) as raised:
            keys(**options)
        told.append(str(raised.value))
    assert str(path) in told[0]
    assert f"{home}/.mc/config.json" in told[1]
    if access and secret:
        for name, value in zip(KEY_PAIRS[2], (access, secret, token), strict=True):
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=text) as raised:
            keys()
        told.append(str(raised.value))
        assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN" in told[2]
    for one in told:
        assert "s3cr" not in one
        assert "tok\u200b" not in one


@pytest.mark.parametrize(
    ("cut", "name"), [("aws_secret", "aws_secret_access_key"), ("aws_access", "aws_access_key_id")]
)
def test_half_an_aws_file(home: Path, cut: str, name: str) -> None:
    lines = [line for line in SOURCES["aws"].decode().splitlines() if not line.startswith(cut)]
    path = write(home / ".aws/credentials", "\n".join(lines))
    with pytest.raises(UserError, match=f"{path} holds no keys; .*the section has no {name}, as where it is written"):
        keys()


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode), st.sampled_from(sorted(SOURCES)))
def test_any_file_gives_keys_that_fit_a_head_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str
) -> None:
    path = tmp_path_factory.mktemp("keys") / "file"
    for content in (data, SOURCES[kind] + data, SOURCES[kind].replace(b"key", data), SOURCES[kind][: len(data)]):
        path.write_bytes(content)
        refusal, found = "", None
        try:
            found = read_keys(path, None)
        except UserError as error:
            refusal = str(error)
        if found is None:
            assert str(path) in refusal
            assert "s3cret-s3cret" not in refusal
        else:
            for text in filter(None, (found.access_key, found.secret_key, found.session_token)):
                assert text.isascii()
                assert text.isprintable()


@pytest.mark.parametrize("text", ["http://mïnio:9000", "http://h\x7f:1", "http://h 1", "http://h\u200b"])
def test_a_server_that_no_head_can_name(text: str) -> None:
    with pytest.raises(UserError, match=r"--endpoint: .* is not allowed; it takes http://HOST:PORT"):
        resolve(settings(endpoint=text))


@pytest.mark.parametrize("text", ["eü-1", "a/b", "eu 1", "eu\r\nX: y"])
def test_a_region_that_no_head_can_name(text: str) -> None:
    with pytest.raises(UserError, match=r"--region, .* is not allowed; it takes letters"):
        resolve(settings(endpoint="http://h:1", region=text))


def test_a_config_of_aws_that_is_no_text_shows_nothing_of_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", "a")
    monkeypatch.setenv("MINIO_SECRET_KEY", "s")
    write(home / ".aws/config", "")
    (home / ".aws/config").write_bytes(b"[default]\naws_secret_access_key = s3cret\xff\n")
    assert resolve(settings(endpoint="http://h:1")).region == "us-east-1"
