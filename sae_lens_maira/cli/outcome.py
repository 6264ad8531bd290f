"""Exit codes and error messages of commands, and checks of numbers before a command starts.

0    done                              130  interrupted (128 + SIGINT)
2    an error that the user can fix    141  the reader of stdout has ended (128 + SIGPIPE)
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sae_lens_maira.errors import ConfigError, MairaError
from sae_lens_maira.io import NO_ROOM

# Errors caused by a path or a disk.
DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EIO, errno.ESTALE, errno.EXDEV),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, *NO_ROOM),
}
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports for any program


def exit_code(program: str, call: Callable[[], None]) -> int:
    """Call a command or a recipe, and convert errors that the user can fix to one message on stderr.

    Args:
        program: Name of the program in the message.
        call: Function to run.

    Returns:
        Exit code: 0, 2 after such an error, 130 after an interrupt, 141 if the reader of stdout has ended.
    """
    try:
        call()
        sys.stdout.flush()
    except MairaError as error:
        _complain(f"{program}: {error}\n")
        return 2
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes stdout again when it exits
        return UNREAD
    except OSError as error:
        if error.errno not in DISK or (error.filename is None and error.errno not in NO_ROOM):
            raise
        place = f" at {error.filename}" if error.filename is not None else ""
        _complain(
            f"{program}: {error.strerror}{place}. Give another path, or free space or grant access there.\n"
        )
        return 2
    except RecursionError as error:
        if "json" not in "".join(traceback.format_exception(error)[-8:]):
            raise
        _complain(
            f"{program}: a JSON file that was given is nested too deeply to be read; expected a few levels. It was not "
            "written by this program: give the right file.\n"
        )
        return 2
    except KeyboardInterrupt:
        _complain(f"{program}: interrupted.\n")
        return INTERRUPTED
    return 0


def _complain(message: str) -> None:
    """Write a message on a separate line; progress bars that an error left open are closed first."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    sys.stderr.write(message)


FROM_ONE = frozenset(
    {
        "batch_size",
        "candidates",
        "context_size",
        "image_side",
        "max_bytes",
        "max_features",
        "max_new_tokens",
        "max_norm",
        "max_norm_ratio",
        "max_requests",
        "n_latents",
        "rank_timeout",
        "shard_bytes",
        "shard_studies",
        "steered",
        "studies",
        "studies_per_block",
        "timeout",
        "top",
        "world",
    }
)
"""Options for which zero is not valid."""
SIGNED = frozenset({"strengths", "sentences"})
"""Options that may be negative."""
MOST = 2**63 - 1


def check_numbers(values: dict[str, Any]) -> None:
    """Refuse negative numbers, zero where it is not valid, and numbers that are too large for any library.

    Raises:
        ConfigError: An option has such a number.
    """
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float) or name in SIGNED:
                continue
            if number < 0 or number > MOST or (number == 0 and name in FROM_ONE):
                wanted = "a positive number" if name in FROM_ONE else "0 or more"
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {number}; expected {wanted}, at most {MOST}."
                )
