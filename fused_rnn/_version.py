"""The version, in one place: setup.py, pyproject.toml, the extension and the package all read it here."""

__version__ = "0.1.0"
