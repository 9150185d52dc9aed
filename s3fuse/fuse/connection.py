"""libfuse on a connection to the kernel that is ours: made here, or taken over from a process that was killed.

libfuse answers nothing before an INIT, and the kernel sends that once. So what libfuse reads is first a socket pair
that delivers the INIT as it was recorded; its reply goes to the kernel the first time only. Then the connection is
put in the socket's place.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from typing import TYPE_CHECKING

import pyfuse3
import trio

from s3fuse.fuse import resent
from s3fuse.fuse.wait import quick_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3fuse.fuse.adapter import Adapter

log = logging.getLogger(__name__)

_READ_BYTES = 64 << 10
#: How long requests that were begun may take to their end, before they are left to the next process: those that take
#: longer wait for uploads, and nobody else is served meanwhile.
FINISH_S = 0.1


class Connection:
    """The kernel's connection `device`, whose INIT request is `init` and was answered with `reply` ("": not yet)."""

    def __init__(self, device: int, init: bytes = b"", reply: bytes = b"") -> None:
        self.device = device
        self.init = init
        self.reply = reply
        self.can_resend = resent.can_resend(init)
        self._handed_over = False
        self._ended = False
        self._serving = trio.CancelScope()

    async def serve(self, adapter: Adapter, serving: Callable[[], None]) -> bool:
        """Answers requests until the mount is gone (False), or another process is to go on (True). Raises OSError.

        `serving` is called when that begins; from then on another process can take over.
        """
        if not self.init:
            await trio.lowlevel.wait_readable(self.device)
            self.init = os.read(self.device, _READ_BYTES)
            self.can_resend = resent.can_resend(self.init)
        feed, fake = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        feed.setblocking(False)
        slot = fake.detach()
        pyfuse3.init(adapter, f"/dev/fd/{slot}", set(pyfuse3.default_options))
        try:
            with quick_device(), self._serving:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._loop)
                    feed.send(self.init)
                    await trio.lowlevel.wait_readable(feed)
                    self._take(feed.recv(_READ_BYTES), adapter)
                    os.dup2(self.device, slot, inheritable=False)
                    trio.lowlevel.notify_closing(slot)
                    feed.close()
                    serving()
            return self._handed_over and not self.is_over()
        finally:
            pyfuse3.close(unmount=False)
            os.close(self.device)

    async def _loop(self) -> None:
        """pyfuse3's loop, until the connection is over: it may end before, when what it waits for is replaced."""
        while True:
            await pyfuse3.main()
            if self._ended or self.is_over():
                return

    def is_over(self) -> bool:
        """Whether the kernel has ended the connection: the mount is gone."""
        poll = select.poll()
        poll.register(self.device, 0)
        return bool(poll.poll(0))

    def _take(self, reply: bytes, adapter: Adapter) -> None:
        if not self.reply:
            os.write(self.device, reply)
            self.reply = reply
            return
        if reply[16:] != self.reply[16:]:
            log.warning("libfuse answers the kernel otherwise than when this was mounted; mount anew when you can")
        if self.is_over() or not self.can_resend:
            return
        resent.ask_again(self.device)
        pending = resent.read_pending(self.device)
        adapter.forgotten(pending.forgotten)
        adapter.repeats.expect(pending.resent)

    def end(self) -> None:
        """Answers no further request: `serve` returns when those that were begun are answered."""
        self._ended = True
        pyfuse3.terminate()

    async def hand_over(self) -> None:
        """`end`, so that another process goes on. What takes longer is left to that one, where the kernel resends."""
        self._handed_over = True
        self.end()
        if self.can_resend:
            await trio.sleep(FINISH_S)
            self._serving.cancel()
