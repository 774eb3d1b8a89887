"""Loads the compiled extension, and says how to build it when it is missing or belongs to something else.

An extension is bound to one Python, one torch and one version of this package. With another it may crash,
or compute with yesterday's kernels: both are refused here, once, at import.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import torch

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent


def build_command() -> str:
    """The exact command that builds the extension for this Python and this torch."""
    pip = f"{sys.executable} -m pip install --no-build-isolation --no-deps"
    checkout = _PACKAGE.parent
    if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
        return f"cd {checkout} && {pip} -e ."
    return f"{pip} --force-reinstall .    (in the folder of fused_rnn's sources)"


def load() -> ModuleType:
    """Returns `fused_rnn._C`, or raises ImportError with the reason and the command that mends it."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    # Looked for by hand: an editable install's finder would bring another copy's extension.
    if not any((_PACKAGE / f"_C{suffix}").exists() for suffix in suffixes):
        others = sorted(path.name for path in _PACKAGE.glob("_C*.so"))
        found = f" for this Python (found only {', '.join(others)})" if others else ""
        raise ImportError(_message(f"its compiled extension is missing{found}"))
    try:
        extension = importlib.import_module("fused_rnn._C")
    except ImportError as error:
        reason = f"its compiled extension does not load with torch {torch.__version__}: {error}"
        raise ImportError(_message(reason)) from error
    check(extension)
    return extension


def check(extension: ModuleType) -> None:
    """Refuses an extension that was built from another version of the package or against another torch."""
    if not (hasattr(extension, "version") and hasattr(extension, "torch_version")):
        raise ImportError(_message("its compiled extension is stale: it does not even say its version"))
    if extension.version() != __version__:
        raise ImportError(
            _message(
                f"its compiled extension is stale: built from {extension.version()}, this is {__version__}"
            )
        )
    if extension.torch_version() != torch.__version__:
        raise ImportError(
            _message(
                "its compiled extension is stale: built against torch"
                f" {extension.torch_version()}, this is torch {torch.__version__}"
            )
        )


def _message(reason: str) -> str:
    return f"fused_rnn cannot start: {reason}.\nBuild it with:\n    {build_command()}"
