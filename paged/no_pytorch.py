"""For processes of our own, which have no use for PyTorch, though it may be installed."""

import logging
import sys


def keep_pytorch_out() -> None:
    """From now on this process has no PyTorch, unless it has been imported before; and transformers does not say that
    there is none.

    Where it is installed transformers imports it, though its tokenizers need none of it: that takes each process
    seconds and hundreds of megabytes.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as if it could not be found (sys.modules' docs)
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
