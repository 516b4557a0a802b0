"""Processes of one job, as torchrun would start them, but forked: what each would have to import
(PyTorch alone: 3 seconds) is imported once.

Call it in a process of its own, which so far runs on one thread: a fork copies no other.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def end_with(work):
    "Do the work and end this process, with the exit status that Python would have given it."
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ranks(count, work):
    "Call work() in so many processes -> 0, or the exit status of the first that fails."
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    running = []
    for rank in range(count):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        child = os.fork()
        if not child:
            end_with(work)
        running.append(child)
    failed = 0
    while running:
        child, status = os.wait()
        running.remove(child)
        status = os.waitstatus_to_exitcode(status)
        if status and not failed:
            failed = status
            for other in running:  # as torchrun does
                os.kill(other, signal.SIGTERM)
    return failed


class Child:
    "work() in a fork with an environment, files and a group of its own, held like a Popen."

    def __init__(self, work, environment, stdin=None, stdout=None, stderr=None):
        theirs, self.stdin, self.stdout, self.returncode = [], None, None, None
        ours = []
        for fd, given in enumerate((stdin, stdout, stderr)):
            if given == subprocess.PIPE:
                ends = os.pipe()  # (to read from, to write to)
                mine, given = ends[fd == 0], ends[fd != 0]
                setattr(self, ("stdin", "stdout")[fd], open(mine, ("wb", "rb")[fd], buffering=0))
                ours.append(mine)
            elif given == subprocess.DEVNULL:
                given = os.open(os.devnull, os.O_RDWR)
            theirs.append(given if isinstance(given, int) else given.fileno())
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setpgid(0, 0)
            for fd in ours:
                os.close(fd)
            for fd, their in enumerate(theirs):
                os.dup2(their, fd)
            sys.stdin, sys.stdout, sys.stderr = map(open, (0, 1, 2), "rww")
            os.environ.clear()
            os.environ.update(environment)
            end_with(work)
        os.setpgid(self.pid, self.pid)  # whichever of both comes first
        for given, their in zip((stdin, stdout, stderr), theirs):
            if given in (subprocess.PIPE, subprocess.DEVNULL):
                os.close(their)

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        return self.poll(0)
