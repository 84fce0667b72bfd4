"""The one exception that means "your input, not our bug"."""


class BitwrightError(Exception):
    """Bad input: one line that says what is wrong, where, and what is accepted.

    The command line prints the line and exits with 2; everything else is a bug and keeps its traceback.
    """
