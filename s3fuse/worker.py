"""The process that serves a mount: `python -m s3fuse.worker LINK`, started by the keeper at the other end of LINK."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

from s3fuse import config, daemon, link, mount
from s3fuse.errors import ExitCode, UserError, described, first
from s3fuse.keeping import Keeping

log = logging.getLogger(__name__)

#: Signals that mean nothing to a worker, and end a process by default: its end is a pause for every program on the
#: mount, and a few are taken for a worker that cannot live. Those of faults stay, SIGABRT too.
IGNORED = {
    *(signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGIO, signal.SIGPWR),
    *(signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGSTKFLT),
    *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
}


def main() -> NoReturn:
    """Waits for its turn, serves, and ends with the mount's exit code or, where another one goes on, with GO_ON."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)  # what it makes on this host is for nobody else
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    with suppress(OSError):
        link.send(end, {"warm": True})
    try:
        keeping, options = Keeping.begin(end)
    except (EOFError, OSError):
        os._exit(0)  # nobody needs it any more
    os._exit(serve(keeping, options))


def serve(keeping: Keeping, options: dict[str, object]) -> int:
    """The exit code. What fails is told to the keeper."""
    try:
        settings = config.from_json(options)
        daemon.set_up_logging(settings.log_level, settings.log_file, is_new_mount=not keeping.is_successor)
        code = mount.serve(settings, keeping)
    except BaseException as raised:
        error = first(raised)
        if isinstance(error, UserError):
            if keeping.is_successor:
                log.error("%s", error)
            keeping.say(error=str(error), exit_code=int(error.exit_code))
            return int(error.exit_code)
        log.error("the daemon failed", exc_info=raised)
        keeping.say(error=f"the daemon failed: {described(error)}", exit_code=int(ExitCode.FAILED))
        return int(ExitCode.FAILED)
    finally:
        logging.shutdown()
    if code is None:
        return link.GO_ON
    keeping.say(ended=int(code))
    return int(code)


if __name__ == "__main__":
    main()
