"""The one kind of error that a user of the command line is meant to see."""


class UserError(Exception):
    """Something the user gave cannot be used: one line with what came in, what was expected, what to do."""
