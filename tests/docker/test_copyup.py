"""What an image has at a volume's place comes into an empty one: docker.md §8, tests 3 and 4; trials T76, T77."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.docker.images import CAPABILITY, LISTING, copy_up_tree, listing, many_files, parse_listing
from tests.docker.plugin import files
from tests.proxy import Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket
    from tests.proxy import Proxy
    from tests.servers import Server

pytestmark = pytest.mark.timeout(240)

RUN = ("run", "--rm", "--network", "none")


@pytest.fixture
def seeded(nodes: Callable[..., Node]) -> Node:
    return nodes("seeded")


@pytest.fixture
def plugin(seeded: Node, server: Server, plugins: Callable[..., Plugin]) -> Plugin:
    return plugins(seeded, server)


def seen(node: Node, volume: str, *, image: str = "lab", more: str = "") -> dict[str, str]:
    """The tree in a volume, as a container that copies nothing up shows it."""
    return parse_listing(
        node.docker(*RUN, "-v", f"{volume}:/data:nocopy{more}", image, "sh", "-ec", LISTING, "sh", "/data")
    )


def check_tree(node: Node, volume: str) -> None:
    """Everything in the volume is as in the image."""
    assert seen(node, volume) == listing(copy_up_tree(), "data")
    script = "cd /data; readlink link; readlink dangling; stat -c %t:%T null; sha256sum <large; cmp plain twin"
    said = node.docker(*RUN, "-v", f"{volume}:/data:nocopy", "lab", "sh", "-ec", script)
    large = next(entry.data for entry in copy_up_tree() if entry.path == "data/large")
    assert said.splitlines() == ["plain", "/nowhere/at all", "1:3", f"{hashlib.sha256(large).hexdigest()}  -"]
    keeper = node.container(f"look-{volume}", "-v", f"{volume}:/data:nocopy")
    place = next(entry.mountpoint for entry in node.mounts() if entry.mountpoint.endswith(f"/{volume}"))
    flags = ("--absolute-names", "--only-values", "-n")
    assert node.run("getfattr", *flags, "user.note", f"{place}/named").stdout == "kept"
    assert node.run("getfattr", *flags, "security.capability", f"{place}/ping").stdout.encode() == CAPABILITY
    node.docker("rm", "-f", keeper)


def test_03_everything_comes_up(
    seeded: Node, plugin: Plugin, bucket: Bucket, nodes: Callable[..., Node], plugins: Callable[..., Plugin]
) -> None:
    plugin.create("vol", bucket.name)
    seeded.docker(*RUN, "-v", "vol:/data", "seeded", "true")
    check_tree(seeded, "vol")
    plugin.wait_until_idle()

    plugin.kill()  # and no cache: all comes from the bucket
    shutil.rmtree(seeded.path("/var/cache/s3fuse/volume-vol"))
    check_tree(seeded, "vol")
    plugin.wait_until_idle()

    other = nodes("seeded")
    elsewhere = plugins(other, plugin.server)
    elsewhere.create("vol", bucket.name)
    other.docker(*RUN, "-v", "vol:/data", "seeded", "true")  # what is there is left alone
    check_tree(other, "vol")
    elsewhere.wait_until_idle()


def test_04_nocopy(seeded: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    assert set(seen(seeded, "vol", image="seeded")) == {"."}
    argument = "type=volume,src=vol,dst=/data,volume-nocopy"
    assert seeded.docker(*RUN, "--mount", argument, "seeded", "ls", "-A", "/data") == ""
    plugin.wait_until_idle()
    assert not files(bucket)


def test_04_read_only(seeded: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    seeded.docker(*RUN, "-v", "vol:/data:ro", "seeded", "sh", "-ec", "cat /data/plain; ! touch /data/new")
    check_tree(seeded, "vol")
    plugin.wait_until_idle()


def test_04_one_object_obscures_the_image(seeded: Node, plugin: Plugin, bucket: Bucket) -> None:
    bucket.put("only", b"mine")
    plugin.create("vol", bucket.name)
    assert seeded.docker(*RUN, "-v", "vol:/data", "seeded", "ls", "-A", "/data") == "only"
    plugin.wait_until_idle()
    assert files(bucket) == {"only"}


def test_t76_any_user(seeded: Node, plugin: Plugin, bucket: Bucket) -> None:
    """A user who is not root works in an empty volume, and sees what is another's."""
    plugin.create("vol", bucket.name)
    first = (
        "cd /data; echo a >f; echo b >>f; mkdir d; echo c >d/g; rm d/g; rmdir d; chmod 600 f; stat -c %u:%g f; cat f"
    )
    said = seeded.docker(*RUN, "--user", "1000:1000", "-v", "vol:/data", "lab", "sh", "-ec", first)
    assert said.splitlines() == ["1000:1000", "a", "b"]
    second = "cd /data; ! cat f 2>/dev/null; echo mine >h; stat -c %u:%g f h"
    said = seeded.docker(*RUN, "--user", "33:33", "-v", "vol:/data", "lab", "sh", "-ec", second)
    assert said.splitlines() == ["1000:1000", "33:33"]
    plugin.create("owned", bucket.name, prefix="owned", uid="1000", gid="1000", dir_mode="0750")
    said = seeded.docker(
        *RUN, "--user", "1000:1000", "-v", "owned:/data", "lab", "sh", "-ec", "cd /data; touch f; stat -c %u:%g . f"
    )
    assert said.splitlines() == ["1000:1000", "1000:1000"]
    plugin.wait_until_idle()


#: What makes root of all containers user 100000 of the machine.
REMAP = """
sed -i /^dockremap:/d /etc/passwd /etc/group
echo dockremap:x:990:990::/:/bin/false >>/etc/passwd
echo dockremap:x:990: >>/etc/group
echo dockremap:100000:65536 | tee /etc/subuid >/etc/subgid
"""


def test_t76_remapped_users(
    nodes: Callable[..., Node], plugins: Callable[..., Plugin], images: Callable[[str], Path], bucket: Bucket
) -> None:
    """With users of containers that are others on the machine a volume is filled and used as without."""
    if subprocess.run(["unshare", "--user", "true"], check=False, timeout=60).returncode:
        pytest.skip("no user namespaces")
    node = nodes(dockerd=False)
    node.script(REMAP)
    node.start_dockerd("--userns-remap=default")
    node.docker("import", images("seeded"), "seeded")
    plugin = plugins(node, bucket.server)
    plugin.create("vol", bucket.name)
    node.docker(*RUN, "-v", "vol:/data", "seeded", "true")
    assert seen(node, "vol", image="seeded") == listing(copy_up_tree(), "data")
    script = "cd /data; stat -c %u:%g plain; echo more >>plain; chown 1000:1000 plain; stat -c %u:%g plain; cat plain"
    said = node.docker(*RUN, "-v", "vol:/data", "seeded", "sh", "-ec", script)
    plain = next(entry.data for entry in copy_up_tree() if entry.path == "data/plain")
    assert said.splitlines() == ["33:33", "1000:1000", *plain.decode().splitlines(), "more"]
    plugin.create("new", bucket.name, prefix="new")
    script = "cd /data; echo x >file; stat -c %u:%g file; cat file"
    for user in ("0:0", "1000:1000"):
        said = node.docker(*RUN, "--user", user, "-v", "new:/data:nocopy", "seeded", "sh", "-ec", f"{script}; rm file")
        assert said.splitlines() == [user, "x"]
    plugin.wait_until_idle()


def test_t77_many_files(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    """3,000 files with owners and modes; a second run leaves them alone."""
    node = nodes("many")
    plugin = plugins(node, bucket.server)
    plugin.create("vol", bucket.name)
    node.docker(*RUN, "-v", "vol:/data", "many", "true", timeout_s=120)
    want = listing(many_files(3000), "data")
    assert seen(node, "vol") == want
    node.docker(*RUN, "-v", "vol:/data", "many", "sh", "-c", "rm /data/d0/f1; echo new >/data/d0/f2", timeout_s=120)
    found = seen(node, "vol", image="many")
    assert set(want) - set(found) == {"d0/f1"}
    plugin.wait_until_idle()
    assert bucket.get("d0/f2") == b"new\n"


def test_t77_a_store_that_fails_is_noticed(seeded: Node, plugin: Plugin, bucket: Bucket, proxy: Proxy) -> None:
    """Copy-up onto a store that takes nothing is an error of the run; what was copied comes once the store is back."""
    plugin.create("vol", bucket.name, endpoint=proxy.server.endpoint)
    proxy.fail(Fault.DENIED, when=lambda request: request.method in ("PUT", "POST"))
    said = seeded.refused(*RUN, "-v", "vol:/data", "seeded", "true", timeout_s=180)
    assert "vol" in said
    proxy.heal()
    plugin.wait_until_idle()
    check_tree(seeded, "vol")
    plugin.wait_until_idle()
