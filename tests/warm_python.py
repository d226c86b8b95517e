"""A ``python`` whose libraries are imported already: for tests of scripts that start many programs.

A server imports the libraries once and forks for each call. The program runs in a process of its own, with the caller's
words, folder, environment and streams, and imports the project itself anew; it ends when its caller is killed. What
depends on how Python starts (flags but ``-m`` and ``-c``, variables such as PYTHONWARNINGS) is left to the real one,
and so is everything on a machine with a GPU, which a fork may not use, and in the thorough tests.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

LIBRARIES = """torch torch._dynamo transformers.hf_argparser transformers.trainer transformers.image_processing_utils
transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama transformers.models.clip.modeling_clip
peft.peft_model accelerate datasets bitsandbytes deepspeed matplotlib.pyplot cv2 torch.distributed.run""".split()
AT_IMPORT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
AT_IMPORT |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
"""What libraries read when they are imported, as the tests set it for their programs."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
cold = False
"""Whether the real one is to be started each time."""

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]  # lines are not held back anyway
plain = ("PYTHON", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
own = [name for name in os.environ if name.startswith("PYTHON") and name not in plain]
if own or not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
server.sendall(call)
code = int(server.recv(16) or 255)
if code < 0:
    if -code in (signal.SIGINT, signal.SIGPIPE):  # Python handles them itself
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def warm_python() -> Path:
    """The ``python`` to start, in a folder that may lead the PATH; its server ends with this process."""
    if cold or any(map(os.path.exists, GPU_DEVICES)):
        return Path(sys.executable)
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    client, address = folder / "python", str(folder / "socket")
    client.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    client.chmod(0o700)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | AT_IMPORT
    command = [sys.executable, __file__, str(client), address]
    server = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)  # its input ends, and so does it
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    return client


def serve(client: str, address: str) -> None:
    """Fork for each call until standard input ends; returns in the processes that are to run a program."""
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.executable, paths = client, sys.path[1:]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    gc.freeze()  # the programs share this memory as long as they leave it alone
    print("ready", flush=True)
    while select.select([0, listener], [], [])[0] != [0]:
        caller = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            keep(caller, paths)
            return
        caller.close()
    os._exit(0)


def keep(caller: socket.socket, paths: list[str]) -> None:
    """Fork once more for the program; tell its caller how it ends, or end it with its caller."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    size, call = int.from_bytes(head, "big"), b""
    while len(call) < size:
        call += caller.recv(size - len(call))
    program = os.fork()
    if program == 0:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        become(*json.loads(call), paths)
        return
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(program)
    if ended not in select.select([ended, caller], [], [])[0]:
        os.kill(program, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        caller.sendall(str(code).encode())
    finally:
        os._exit(0)


def become(words: list[str], folder: str, environment: dict[str, str], paths: list[str]) -> None:
    """Make this process what Python makes of a command line before it runs the program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    named = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {"-m": folder, "-c": ""}.get(words[0]) if words[0][0] == "-" else str(Path(words[0]).resolve().parent)
    sys.argv, sys.path = words, [str(own), *named, *paths]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False, buffering=1)
        setattr(sys, name, stream)
    if any(Path(path, "sitecustomize.py").exists() for path in named):  # the server started without these folders
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    import numpy

    numpy.random.seed()


def run(words: list[str]) -> int:
    """The program of a command line, in this process; returns its exit status."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
    status = run(sys.argv)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take all libraries apart would take longer than the program
