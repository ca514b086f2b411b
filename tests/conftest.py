"""Where libtpu is installed, to compile for TPUs without one, jax must not look for one."""

import os
from importlib.util import find_spec

if find_spec("libtpu") and not find_spec("jax_cuda13_plugin"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
