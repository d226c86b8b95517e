"""Refuse the network to every Python that starts with this folder on its PYTHONPATH.

Each process and each refusal becomes a line of the file that ``NETWORK_LOG`` names: a program may swallow the error.
Sockets between processes of one machine (``AF_UNIX``) are no network.
"""

import os
import socket
import sys

OF_A_SOCKET = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
OF_A_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")


def note(line: str) -> None:
    with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()} {line}\n")


def refuse(event: str, values: tuple) -> None:
    """An audit hook, which sees what any library asks of Python's sockets and cannot be taken away again."""
    if event in OF_A_NAME or (event in OF_A_SOCKET and values[0].family != socket.AF_UNIX):
        note(f"refused {event} {values[1:]}")
        raise OSError(f"the network is refused to this test: {event} {values[1:]}")


if "NETWORK_LOG" in os.environ:
    sys.addaudithook(refuse)
    note(f"began {' '.join([*sys.orig_argv, *sys.argv])}")
