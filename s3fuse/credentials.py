"""Where the server and the keys come from; the first place that has them wins (README, "Server and keys").

Keys never appear in arguments, logs or error texts. What comes from a file is read again when the file changes, so
rotated keys are used by the next request.
"""

from __future__ import annotations

import configparser
import json
import logging
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from s3fuse.config import mc_aliases, usage
from s3fuse.errors import ExitCode, UserError
from s3fuse.keytext import BadKeys, check_keys, open_to_others, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s3fuse.config import MountConfig

log = logging.getLogger(__name__)

ENDPOINTS = ("MINIO_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
KEY_PAIRS = (
    ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", ""),
    ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", ""),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
#: Variables that say that the place we run in has a role.
ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
#: What stands in the head of each request.
_HOST = re.compile("[!-~]+")
_REGION = re.compile("[A-Za-z0-9._-]+")


class Keys(Protocol):
    """What signs requests; the SDK's Credentials are such."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def session_token(self) -> str | None: ...
    def is_expired(self) -> bool: ...


class Provider(Protocol):
    """Where keys come from."""

    def retrieve(self) -> Keys:
        """The keys as they are now; may read files or ask the network."""


@dataclass(frozen=True)
class Credentials:
    """Keys that do not expire by themselves. Raises BadKeys where no request can be signed with them."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_keys(self.access_key, self.secret_key, self.session_token)

    def is_expired(self) -> bool:
        return False


class StaticProvider:
    """Keys that stay the same."""

    def __init__(self, access_key: str, secret_key: str, session_token: str | None = None) -> None:
        self._credentials = Credentials(access_key, secret_key, session_token)

    def retrieve(self) -> Credentials:
        return self._credentials


@dataclass(frozen=True)
class Server:
    """Where the bucket is, and what signs requests to it."""

    endpoint: str
    region: str
    provider: Provider


class FileProvider:
    """Keys from files that may be replaced while mounted; `load` reads them and raises UserError."""

    def __init__(self, files: list[Path], load: Callable[[], Credentials]) -> None:
        self.files = files
        self._load = load
        self._seen = self._stamp()
        self._bad: list[tuple[int, int, int]] | None = None  # the stamp of files that hold no keys
        self._credentials = load()

    def _stamp(self) -> list[tuple[int, int, int]]:
        found = []
        for path in self.files:
            try:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found

    def retrieve(self) -> Credentials:
        """The keys as the files have them now; the last good ones while a file is being replaced.

        Files that hold no keys when they are looked at again are in the log, once.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return self._credentials
        try:
            self._credentials = self._load()
            self._seen, self._bad = stamp, None
        except UserError as error:
            if self._bad == stamp:
                log.warning("%s; the keys that were there before are used", error)
                self._seen = stamp
            self._bad = stamp
        return self._credentials


def resolve(config: MountConfig) -> Server:
    """Finds endpoint, region and keys. Raises UserError that says where it looked."""
    alias = mc_aliases().get(config.alias or "", {})
    profile = _profile(config.profile or os.environ.get("AWS_PROFILE"))
    source, endpoint = next(_endpoints(config, alias, profile), ("", ""))
    if not endpoint:
        raise UserError(
            f"no server is named; give --endpoint http://HOST:PORT, set {' or '.join(ENDPOINTS)}, or use an mc alias"
            f"{_why_no_alias()}",
            ExitCode.USAGE,
        )
    endpoint = check_endpoint(source, endpoint)
    region = config.region or _variable("AWS_REGION") or _variable("AWS_DEFAULT_REGION") or profile.get("region")
    if region and not _REGION.fullmatch(region):
        raise usage("--region, AWS_REGION or the region of the AWS profile", region, "letters, digits, '.', '_', '-'")
    return Server(endpoint, region or "us-east-1", _provider(config, alias, endpoint))


def _why_no_alias() -> str:
    """Why mc's aliases are not known, "" where they are or there are none."""
    path = _mc_file()
    try:
        json.loads(read_text(path))
    except OSError:
        return ""
    except json.JSONDecodeError:
        return f" ({path} is no whole JSON)"
    except BadKeys as error:
        return f" ({path} cannot be used: {error})"
    return ""


def _endpoints(config: MountConfig, alias: dict[str, str], profile: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The servers that are named, the one to use first: what names it, and its URL."""
    places = [("--endpoint", config.endpoint), (f"url of the mc alias {config.alias}", alias.get("url"))]
    for source, text in places:
        if text:
            yield source, text
    for name in ENDPOINTS:
        if text := _variable(name):
            yield name, text
    if text := profile.get("endpoint_url"):
        yield "endpoint_url of the AWS profile", text


def check_endpoint(source: str, text: str) -> str:
    """The endpoint as SCHEME://HOST[:PORT]. Raises UserError, which never shows a password in it."""
    if "@" in text:
        raise UserError(
            f"{source} has a user or a password in it; give the keys by MINIO_ACCESS_KEY and MINIO_SECRET_KEY or "
            "--credentials-file, and the server as http://HOST:PORT",
            ExitCode.USAGE,
        )
    full = text if "://" in text else f"http://{text}"
    try:
        url = urlsplit(full)
        wrong = url.port == 0 or not url.hostname or bool(url.path.strip("/") or url.query or url.fragment)
        wrong = wrong or not _HOST.fullmatch(text)
    except ValueError:
        wrong = True
    if wrong or url.scheme not in ("http", "https"):
        raise usage(source, text, "http://HOST:PORT or https://HOST:PORT")
    return f"{url.scheme}://{url.netloc}"


def open_key_files(config: MountConfig) -> list[str]:
    """What is to be said of the files with the keys of a mount that others can read. Raises UserError."""
    source = _source(config, mc_aliases().get(config.alias or "", {}))
    return [] if source is None else list(filter(None, map(open_to_others, source[0])))


def _provider(config: MountConfig, alias: dict[str, str], endpoint: str) -> Provider:
    source = _source(config, alias)
    if source is not None:
        return FileProvider(*source)
    if role := _role(endpoint):
        return role
    raise UserError(
        "no keys were found; looked for --credentials-file, an mc alias, "
        + ", ".join(f"{access}/{secret}" for access, secret, _ in KEY_PAIRS)
        + f" (each also as …_FILE), {_aws_file()} and {', '.join(ROLES)}",
        ExitCode.USAGE,
    )


def _source(config: MountConfig, alias: dict[str, str]) -> tuple[list[Path], Callable[[], Credentials]] | None:
    """The files that the keys are in, and what reads them; None where only a role is left. Raises UserError."""
    if config.credentials_file is not None:
        return [config.credentials_file], partial(read_keys, config.credentials_file, config.profile)
    if alias:
        return [_mc_file()], partial(_alias_keys, config.alias or "")
    if config.profile is None:
        for access, secret, token in KEY_PAIRS:
            if _variable(access) and _variable(secret):
                files = [Path(os.environ[f"{n}_FILE"]) for n in (access, secret, token) if os.environ.get(f"{n}_FILE")]
                return files, partial(_variable_keys, access, secret, token)
    path = _aws_file()
    if path.exists():
        return [path], partial(read_keys, path, config.profile or os.environ.get("AWS_PROFILE"))
    if config.profile is not None:
        raise UserError(f"--profile {config.profile}: {path} does not exist", ExitCode.USAGE)
    return None


def _mc_file() -> Path:
    return Path(os.environ.get("MC_CONFIG_DIR") or Path.home() / ".mc") / "config.json"


def _aws_file() -> Path:
    return Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials")


def _role(endpoint: str) -> Provider | None:
    """What asks for the keys of the role that the place we run in has, if it has one."""
    on_aws = (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if not on_aws and not any(map(os.environ.get, ROLES)):
        # Outside AWS the address of the instances' role service leads nowhere, and asking it takes long.
        return None
    from minio.credentials.providers import IamAwsProvider  # the SDK takes 0.2 s and 7 MB

    if os.environ.get(ROLES[0]):
        # A MinIO server gives its keys for a web identity itself, at its own address.
        return IamAwsProvider(custom_endpoint=os.environ.get("AWS_ENDPOINT_URL_STS") or (None if on_aws else endpoint))
    return IamAwsProvider()


def _variable(name: str) -> str | None:
    """The variable, or the content of the file that NAME_FILE names (a Docker secret). Raises UserError."""
    if not name:
        return None
    if os.environ.get(name):
        return os.environ[name]
    path = os.environ.get(f"{name}_FILE")
    if not path:
        return None
    try:
        return read_text(Path(path))
    except OSError as error:
        raise UserError(f"{name}_FILE: {path} cannot be read: {error.strerror}", ExitCode.USAGE) from None
    except BadKeys as error:
        raise UserError(f"{name}_FILE: {path} cannot be used: {error}", ExitCode.USAGE) from None


def _variable_keys(access: str, secret: str, token: str) -> Credentials:
    try:
        return Credentials(_variable(access) or "", _variable(secret) or "", session_token=_variable(token))
    except BadKeys as error:
        names = [f"{name}_FILE" if os.environ.get(f"{name}_FILE") else name for name in (access, secret, token) if name]
        raise UserError(f"the keys of {', '.join(names)} cannot be used: {error}", ExitCode.USAGE) from None


def _alias_keys(name: str) -> Credentials:
    path = _mc_file()
    again = f"set it again with: mc alias set {name} URL KEY SECRET"
    try:
        entry = json.loads(read_text(path))["aliases"][name]
        return Credentials(entry["accessKey"], entry["secretKey"], session_token=entry.get("sessionToken"))
    except OSError as error:
        raise UserError(f"mc alias {name!r}: {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError:
        raise UserError(f"mc alias {name!r}: {path} is no whole JSON; it may be written only by half") from None
    except BadKeys as error:
        raise UserError(f"mc alias {name!r}: the keys in {path} cannot be used: {error}; {again}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"mc alias {name!r} has no keys in {path}; {again}") from None


def _profile(name: str | None) -> dict[str, str]:
    """The section of ~/.aws/config, where endpoint_url and region may be."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(os.environ.get("AWS_CONFIG_FILE") or Path.home() / ".aws" / "config")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    for section in (f"profile {name}", name) if name else ("default",):
        if section and parser.has_section(section):
            return dict(parser[section])
    return {}


def read_keys(path: Path, profile: str | None) -> Credentials:
    """Keys of a file: an AWS credentials file, one line ACCESS:SECRET (as for s3fs), or JSON. Raises UserError."""
    forms = "an AWS credentials file, one line ACCESS:SECRET, or JSON with accessKey and secretKey"
    which = f" (profile {profile})" if profile else ""
    try:
        return _parsed(read_text(path), profile)
    except OSError as error:
        raise UserError(f"credentials file {path} cannot be read: {error.strerror}", ExitCode.USAGE) from None
    except BadKeys as error:
        problem = f": {error}"
    except json.JSONDecodeError:
        problem = ": it is no whole JSON, as where it is written only by half"
    except (ValueError, KeyError, TypeError, AttributeError, configparser.Error):  # whose texts show what is there
        problem = ""
    raise UserError(f"credentials file {path}{which} holds no keys; it takes {forms}{problem}", ExitCode.USAGE)


def _parsed(text: str, profile: str | None) -> Credentials:
    """Raises what the parsers raise, and BadKeys."""
    if text.startswith("{"):
        found = json.loads(text)
        return Credentials(found["accessKey"], found["secretKey"], session_token=found.get("sessionToken"))
    if not text.startswith("[") and text.count("\n") == 0 and text.count(":") == 1:
        access, secret = text.split(":")
        return Credentials(access, secret)
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    section = parser[profile or "default"]
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        if name not in section:
            raise BadKeys(f"the section has no {name}, as where it is written only by half")
    return Credentials(
        section["aws_access_key_id"], section["aws_secret_access_key"], session_token=section.get("aws_session_token")
    )
