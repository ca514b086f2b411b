"""For processes of our own, in which nobody uses PyTorch, though it may be installed."""

import logging
import sys


def import_transformers_alone() -> None:
    """Imports transformers without PyTorch, which it imports where it is installed, though its tokenizers need none of
    it: that takes each process seconds and hundreds of megabytes. It does not say that there is none, either.

    If PyTorch or transformers has been imported before, it changes nothing.
    """
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # cannot be found (importlib's docs), while it looks
    try:
        from transformers.utils import is_torch_available

        is_torch_available()  # it keeps its answer
    finally:
        del sys.modules["torch"]
