"""Hooks for suites that use the tinker client. It goes on asking a server that a test has ended, in a thread that nobody can
join, and a request in flight during the interpreter's shutdown aborts the process (curioswitch/pyqwest#164), whatever the
tests said. So these suites end without that shutdown, with pytest's own exit status."""

import os
import sys

_status = None


def pytest_sessionfinish(exitstatus):
    global _status
    _status = int(exitstatus)


def pytest_unconfigure():
    if _status is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
