"""Refuse the network to every Python that starts with this folder on its PYTHONPATH, and to all that it starts.

Python's own sockets and questions for names are refused in words. Each process and each refusal becomes a line of the
file that ``NETWORK_LOG`` names: a program may swallow the error. What compiled code opens, the kernel ends the process
for (Linux on the two usual processors). Sockets between processes of one machine (``AF_UNIX``) are no network.
"""

import ctypes
import os
import platform
import socket
import struct
import sys

NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
TAKEN_OVER = -1
"""The family with which Python wraps a socket that is open already."""
CALL = {"x86_64": 41, "aarch64": 198}.get(platform.machine())
"""The number of ``socket`` among the system's calls."""
LOAD, IF_EQUAL, RETURN, KILL, ALLOW = 0x20, 0x15, 0x06, 0x8000_0000, 0x7FFF_0000
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


def note(line: str) -> None:
    with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()} {line}\n")


def refuse(event: str, values: tuple) -> None:
    """An audit hook, which sees what any library asks of Python's sockets and cannot be taken away again."""
    opens = event == "socket.__new__" and values[1] not in (socket.AF_UNIX, TAKEN_OVER)
    if opens or event in NAMES:
        note(f"refused {event} {values[1:]}")
        raise OSError(f"the network is refused to this test: {event} {values[1:]}")


def refuse_below_python(number: int) -> bool:
    """A filter of the kernel for this process and its children: ``socket`` of another family than the machine's own.

    Returns:
        Whether the kernel takes it.
    """
    steps = [
        (LOAD, 0, 0, 0),  # which call
        (IF_EQUAL, 0, 3, number),
        (LOAD, 0, 0, 16),  # its first argument
        (IF_EQUAL, 1, 0, socket.AF_UNIX),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    system = ctypes.CDLL(None)
    return not (system.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or system.prctl(SECCOMP, FILTER, program, 0, 0))


if "NETWORK_LOG" in os.environ:
    filtered = sys.platform == "linux" and CALL is not None and refuse_below_python(CALL)
    sys.addaudithook(refuse)
    note(f"began{'' if filtered else ' unfiltered'} {' '.join([*sys.orig_argv, *sys.argv])}")
