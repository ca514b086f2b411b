"""Where libtpu and jax's CUDA plugin are installed to compile for machines that are not there, jax must not look for
them. On a machine that has the tests' packages and a device, JAX_PLATFORMS names it."""

import os
from importlib.util import find_spec

if find_spec("libtpu"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

if find_spec("hypothesis"):  # a GPU machine may be without
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # an example may compile something, beside other programs
    settings.load_profile("untimed")
