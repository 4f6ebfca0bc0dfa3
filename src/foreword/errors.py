"""The errors that foreword raises for people: each holds one sentence that says what is wrong and what to do."""


class ForewordError(Exception):
    """Base of foreword's errors. The command line prints the message alone and ends with `exit_code`.

    everywhere: of several processes all raise it, so that one has to say it.
    """

    exit_code = 1

    def __init__(self, sentence: str, *, everywhere: bool = False) -> None:
        super().__init__(sentence)
        self.everywhere = everywhere


class InputError(ForewordError, ValueError):
    """Something that was given is wrong: a path, a column, a setting, a file. Exit code 2."""

    exit_code = 2


class RunError(ForewordError, RuntimeError):
    """The input was right and the work failed: a loss that is not a number, a full disk, an interrupt. Exit code 1."""


class DivergedError(RunError):
    """Training came to a loss that is not a finite number."""
