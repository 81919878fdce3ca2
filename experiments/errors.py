"""The errors that a user of the command line is meant to see."""


class UserError(Exception):
    """Something the user gave cannot be used: one line with what came in, what was expected, what to do.

    Attributes:
      status: the exit status of the command.
    """

    status = 2


class GaveUpError(UserError):
    """The work itself failed, such as a training of which no step could be taken; what to look at."""

    status = 1
