"""Kernels of the interpreter that runs the chain."""

from __future__ import annotations

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec


class ThisInterpreter(AsyncKernelManager):
    """Kernels of this interpreter, whichever kernelspecs Jupyter finds under a notebook's name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())
