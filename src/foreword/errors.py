"""The two errors that foreword raises for people: each holds one sentence that says what is wrong and what to do."""


class ForewordError(Exception):
    """Base of foreword's errors. The command line prints the message alone and ends with `exit_code`."""

    exit_code = 1


class InputError(ForewordError, ValueError):
    """Something that was given is wrong: a path, a column, a setting, a file. Exit code 2."""

    exit_code = 2


class RunError(ForewordError, RuntimeError):
    """The input was right and the work failed: a loss that is not a number, a full disk, an interrupt. Exit code 1."""
