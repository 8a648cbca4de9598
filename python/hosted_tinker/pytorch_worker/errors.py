"""Failures that a request's author is told (src/base/error.h): what was wrong, with which value, what is allowed."""

USER, SERVER = 0, 1  # ErrorCategory


class WorkerError(Exception):
    category = SERVER


class UserError(WorkerError):
    """The input is wrong, repeating it is pointless."""

    category = USER


def category_of(error: Exception) -> int:
    return error.category if isinstance(error, WorkerError) else SERVER


def text_of(error: Exception) -> str:
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
