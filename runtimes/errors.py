"""Errors a user meets, each with the exit code the command line ends with.

::

    PocketbertError            1   base class; never raised itself
    ├── BadInput               2   usage, recipe, data or model; names what, where and what to do
    ├── GateFailed             3   a budget or a check refused the result
    ├── TargetUnreachable      4   a place to measure did not answer
    └── IntegrityError         5   a file is not what its checksum or its manifest says
"""


class PocketbertError(Exception):
    """Base of every error with a message for the user."""

    exit_code = 1


class BadInput(PocketbertError):
    exit_code = 2


class GateFailed(PocketbertError):
    exit_code = 3


class TargetUnreachable(PocketbertError):
    exit_code = 4


class IntegrityError(PocketbertError):
    exit_code = 5
