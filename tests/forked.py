"""Processes of one job, as torchrun would start them, but forked: what each would have to import
(PyTorch alone: 3 seconds) is imported once.

Call it in a process of its own, which so far runs on one thread: a fork copies no other.
"""

import os
import signal
import socket
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
