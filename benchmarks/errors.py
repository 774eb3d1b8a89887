"""The one exception that means "the caller asked for something wrong"."""


class BenchError(Exception):
    """A mistake in the arguments or in a file: printed in one line, exit status 2, no traceback."""
