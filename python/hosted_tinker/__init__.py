"""Launcher of hosted-tinker: finds models and binaries, then becomes the server."""

__version__ = "0.1.0"
