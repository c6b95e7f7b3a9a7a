"""What every command of the command line shares: errors as one clear line with their exit code, and JSON."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from runtimes.errors import PocketbertError

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
"""How threads of a matrix product wait for each other: some microseconds awake, then asleep. Threads that go on spinning (libgomp's
own 300,000 rounds) take the core from the one they wait for wherever something else computes as well;
``python -m benchmarks.neighbour`` measures both."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into one clear line and the exit code that belongs to them."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows an escape for what it cannot show
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except PocketbertError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("stopped; finished stages and the last checkpoint are kept, the same command goes on from there", 130)
        except BrokenPipeError:
            # The reader of our output has gone (| head); what is left in the buffer has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                fail(f"{str(error.filename)[:100]}...: the name is too long for a file; give a shorter path", 2)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            place = f" ({error.filename})" if error.filename else ""
            fail(f"{error.strerror}{place}; finished stages and the last checkpoint are kept, the same command goes on from there", 2)
        except ModuleNotFoundError as error:
            extra = "demo" if error.name and error.name.startswith("gt_") else "train"
            fail(f"{error.name} is not installed, and this command needs it; pip install 'pocketbert[{extra}]'", 2)

    return run


def fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    print(json_line(value, indent=1))


def json_line(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that standard output can take: letters as they are in UTF-8, as escapes in any other encoding."""
    return json.dumps(value, indent=indent, ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8")


def quieten_libraries() -> None:
    """Keep libraries from printing over our own output, and from opening connections. Set before they are imported."""
    for name, value in {
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR", **WAITING,
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    for name in ("torchao", "torch.utils._pytree"):  # what they warn of at import concerns nobody who runs a recipe
        logging.getLogger(name).setLevel(logging.ERROR)
