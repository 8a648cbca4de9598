class LauncherError(Exception):
    """What the person at the terminal has to know; printed without a traceback."""
