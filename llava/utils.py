"""What every command line of the project shares: errors a user can act on, who speaks, logging.

``UserError`` is the one exception for bad input. ``run_cli`` turns it (and whatever the operating system refuses) into
one line on standard error and a non-zero exit code; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
"""Present where a driver for NVIDIA or AMD GPUs is loaded."""

server_error_msg = "**The model worker failed; its log says why. Ask again or reload the page.**"
moderation_msg = "This input was refused by moderation; please word it differently."
"""What LLaVA's workers and web server show; LLaVA's own text blames the network for every error."""

_SYSTEM_ERRORS = {
    errno.EIO: "the disk reports an error; check it (dmesg), or choose another place",
    errno.EFBIG: "the file is larger than the file system or the limit (ulimit -f) allows; choose another place",
    errno.ENOSYS: "the file system cannot do this; choose a place on another one",
    errno.ENOLCK: "the file system gives no locks; choose a place on another one",
    errno.ESTALE: "the network file system has lost the file; run the same command again",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EMFILE: "too many files are open (ulimit -n); allow more",
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "permission denied; choose a place you may write to, or change its permissions",
    errno.EPERM: "permission denied; choose a place you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose a place you may write to",
    errno.EEXIST: "a file stands where a folder is needed; choose another place, or move it away",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place, or move it away",
    errno.EISDIR: "a folder stands where a file is needed; choose another place, or move it away",
}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_HIDDEN_FULL_DISK = ("PytorchStreamWriter failed", "iostream error", "No space left on device", "unexpected pos")
"""How torch and safetensors say that a file could not be written to its end."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    Names out of files stand in it, so what would end the line or steer the terminal is written as an escape.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_on_one_line(str(message)))


def _on_one_line(text: str) -> str:
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and exit with its code.

    A ``UserError`` and whatever the operating system refuses end in one line on standard error and exit code 2.
    """
    _say_all()
    try:
        code = main()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        line = in_a_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = EXIT_USER_ERROR
    sys.exit(code or 0)


def in_a_line(error: Exception) -> str | None:
    """What a user is told of an error; ``None`` for one that is a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    found = system_error(error)
    return None if found is None else _in_words(found)


def _say_all() -> None:
    """On a terminal that is not UTF-8, write what it lacks as escapes: an answer is not lost over a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that ``error`` is or hides; ``None`` where it is of another kind.

    torch and safetensors report what the system refuses by errors of their own.
    """
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    text = str(error)
    if told := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(told[1]), os.strerror(int(told[1])))
    if not any(mark in text for mark in _HIDDEN_FULL_DISK):
        return None
    before = error.__context__  # what torch's writer was told before it saw that bytes are missing
    return before if isinstance(before, OSError) and before.errno else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _in_words(error: OSError) -> str:
    number = error.errno or 0
    where = f"{_on_one_line(str(error.filename))}: " if error.filename else ""
    if not where and error.strerror and "temporary directory" in error.strerror:  # what Python itself says of it
        return f"{_on_one_line(error.strerror)}; set TMPDIR to a folder with room that you may write to"
    return f"{where}{_SYSTEM_ERRORS.get(number) or f'{os.strerror(number)}; check this place'}"


def require_file(path: str | os.PathLike, what: str, mend: str) -> Path:
    """``path`` as a ``Path`` if it is a readable file; else a ``UserError`` saying what was expected and the mend."""
    found = Path(path)
    if not found.is_file():
        raise UserError(f"{what} not found: {found} ({mend})")
    if not os.access(found, os.R_OK):
        raise UserError(f"{what} is not readable: {found} (check its permissions)")
    return found


def is_main_process() -> bool:
    """True on the process that talks to the user (rank 0 of a distributed run)."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0) <= 0


def rank0_print(*values: object) -> None:
    """``print`` on rank 0 only."""
    if is_main_process():
        print(*values, flush=True)


def build_logger(logger_name: str, logger_filename: str | None = None) -> logging.Logger:
    """A logger that writes to standard error and, if a file name is given, to that file in ``LOGDIR``.

    Unlike LLaVA's it leaves standard output and standard error alone; ``StreamToLogger`` redirects them if wanted.
    """
    from llava.constants import LOGDIR

    logger = logging.getLogger(logger_name)
    if logger.handlers:
        return logger
    logger.setLevel(logging.INFO)
    formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if logger_filename:
        handlers.append(logging.FileHandler(Path(LOGDIR) / logger_filename, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


class StreamToLogger:
    """A stream whose lines go to a logger, for programs that print: ``sys.stdout = StreamToLogger(logger)``.

    What else is asked of it (``isatty``, ``encoding``) the standard output of the time answers.
    """

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.terminal = sys.stdout
        self.logger = logger
        self.log_level = log_level
        self.linebuf = ""

    def __getattr__(self, attr: str) -> Any:
        return getattr(self.terminal, attr)

    def write(self, buf: str) -> int:
        """Log each line that is complete; the rest waits for its end, or for ``flush``."""
        *lines, self.linebuf = (self.linebuf + buf).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(buf)

    def flush(self) -> None:
        """Log a line that has no end yet."""
        if self.linebuf:
            self.logger.log(self.log_level, self.linebuf.rstrip())
        self.linebuf = ""


def pretty_print_semaphore(semaphore: Any) -> str:
    """A worker's ``asyncio.Semaphore`` (or None) in words, for its log."""
    return "None" if semaphore is None else f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def violates_moderation(text: str) -> NoReturn:
    """LLaVA sends ``text`` to a moderation service on the internet; here no text of a patient leaves the machine.

    Raises:
        UserError: always.
    """
    raise UserError("texts are not sent to a moderation service; start the server without --moderate")


def quiet_libraries() -> None:
    """Let other libraries speak only of what is wrong, so that the user reads this project's lines.

    Called before they are imported where possible: DeepSpeed and bitsandbytes report at import that they find no GPU.
    """
    for name in ("DeepSpeed", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not any(os.path.exists(device) for device in GPU_DEVICES):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.stderr is None or not sys.stderr.isatty():  # bars of loaded weights and downloads would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if imported := sys.modules.get("transformers.utils.logging"):  # which has read the variable already
            imported.disable_progress_bar()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")


def disable_torch_init() -> None:
    """Accepted for LLaVA's callers; does nothing, because skipping initialisation leaves new modules undefined."""
