"""Let compiled code call our GPU ops directly.

A call through PyTorch's dispatcher, and the search for a plan by the arguments' shapes and strides, take longer than
the launch of a kernel.  Where all of these are numbers, Dynamo's guards and Inductor's own assertions have seen to
them already.  Inductor writes for ``bicompile::mm``::

    buf3 = torch.ops.bicompile.mm.default(buf2, arg1_1)       # before

    site_0 = Site('mm')                                       # after, with static shapes: at the top of the module
    buf3 = site_0(buf2, arg1_1)                               # and in its place

    buf3 = ON_GPU['mm'](buf2, arg1_1)                         # after, where a shape is symbolic

Numerics: unchanged; the same function is called.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator

from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from .plans import ON_GPU

DEVICE = "cuda"
_IMPORT = "from bicompile.lowering.gpu.plans import ON_GPU, Site"


@contextlib.contextmanager
def direct_calls() -> Iterator[None]:
    """Make Inductor write sites until the context is left.

    The patch holds for the process: enter it around code generation only, under Dynamo's compile lock.
    """
    with unittest.mock.patch.object(PythonWrapperCodegen, "generate_fallback_kernel", _generate_fallback_kernel):
        yield


_generate = PythonWrapperCodegen.generate_fallback_kernel


def _generate_fallback_kernel(self: PythonWrapperCodegen, node: ir.FallbackKernel) -> None:
    """``PythonWrapperCodegen.generate_fallback_kernel``, which calls ours without the dispatcher."""
    if (op := _direct(node)) is not None:
        self.add_import_once(_IMPORT)
        node.python_kernel_name = f"ON_GPU[{op!r}]"
        if _is_static(node):
            node.python_kernel_name = f"site_{self.next_kernel_suffix()}"
            self.header.writeline(f"{node.python_kernel_name} = Site({op!r})")
    _generate(self, node)


def _direct(node: ir.FallbackKernel) -> str | None:
    """The name of an op that may be called directly; None if the dispatcher must."""
    op = node.op_overload
    if not isinstance(op, OpOverload) or op.namespace != "bicompile" or node.codegen_kwargs():
        return None
    name = op._schema.name.removeprefix("bicompile::")
    devices = {getattr(x.get_device(), "type", None) for x in tree_leaves(node.inputs)}
    return name if name in ON_GPU and devices == {DEVICE} else None


def _is_static(node: ir.FallbackKernel) -> bool:
    """Are all sizes and strides that a call gets numbers, and all numbers constants?"""
    given = [n for x in tree_leaves(node.inputs) for n in (*x.get_size(), *x.get_stride())]
    return not any(getattr(n, "free_symbols", ()) for n in (*given, *tree_leaves(node.constant_args)))
