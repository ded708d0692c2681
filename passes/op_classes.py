"""What a node can do to the bits of a row: the allowlist that ``certify`` goes by.

An op is *exact* if it only moves, compares or selects values, or computes on integers: every order gives the same
bits.  It is *elementwise* if each output element follows from the input elements at its own place, and Inductor
generates the code for it (whose numerics ``bicompile.config`` pins).  Everything else must be one of our own ops.
A denylist would not do: the next fused op of PyTorch would not be on it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import lowering as inductor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
prims = torch.ops.prims

_EXACT_NAMES = frozenset(
    """
    _c10d_functional.all_gather_into_tensor _c10d_functional.all_gather_into_tensor_coalesced
    _c10d_functional.all_to_all_single _c10d_functional.broadcast _c10d_functional.wait_tensor aten._assert_async
    aten._assert_scalar aten._assert_tensor_metadata aten._conj_physical aten._functional_assert_async
    aten._has_same_storage_numel aten._local_scalar_dense aten._pack_padded_sequence
    aten._pack_padded_sequence_backward aten._to_copy aten._unique2 aten._unsafe_index
    aten._unsafe_index_put aten._unsafe_masked_index aten._unsafe_view aten._upsample_nearest_exact1d
    aten._upsample_nearest_exact2d aten._upsample_nearest_exact3d aten.adaptive_max_pool2d aten.adaptive_max_pool3d
    aten.all aten.any aten.arange aten.argmax aten.argmin aten.as_strided_copy aten.as_strided_scatter
    aten.broadcast_tensors aten.bucketize aten.cat aten.clone aten.conj_physical aten.constant_pad_nd aten.copy
    aten.copy_ aten.cummax aten.cummin aten.diagonal_copy aten.diagonal_scatter aten.embedding aten.empty
    aten.empty_like aten.empty_permuted aten.empty_strided aten.equal aten.fill aten.flip aten.full aten.full_like
    aten.gather aten.histc aten.index aten.index_put aten.index_select aten.isin aten.item aten.kthvalue aten.lift
    aten.lift_fresh_copy aten.lu_unpack aten.masked_fill aten.masked_scatter aten.masked_scatter_backward
    aten.masked_select aten.max aten.max_pool2d_with_indices aten.max_pool3d_with_indices aten.median aten.min
    aten.nanmedian aten.new_empty aten.new_empty_strided aten.new_full aten.nonzero aten.nonzero_static aten.ones
    aten.ones_like aten.repeat aten.repeat_interleave aten.resize aten.roll aten.scalar_tensor aten.scatter
    aten.searchsorted aten.select_backward aten.select_scatter aten.set_ aten.slice_backward aten.slice_scatter
    aten.sort aten.squeeze_copy aten.stack aten.sym_constrain_range aten.sym_constrain_range_for_size aten.sym_numel
    aten.sym_size aten.sym_storage_offset aten.sym_stride aten.topk aten.tril aten.tril_indices aten.triu
    aten.triu_indices aten.unfold_copy aten.unique_consecutive aten.unique_dim aten.upsample_nearest1d
    aten.upsample_nearest2d aten.upsample_nearest3d aten.where aten.zeros aten.zeros_like inductor.resize_storage_bytes_
    prims._low_memory_max_pool_offsets_to_indices prims._low_memory_max_pool_with_offsets prims._make_token
    prims._sink_tokens prims.convert_element_type prims.copy_strided prims.device_put prims.inductor_force_stride_order
    prims.iota prims.rev prims.view_of profiler._record_function_enter_new profiler._record_function_exit
    """.split()
)

# Of equal elements these name any; so do sort and topk, which are made to name the first.
_FREE_TIES = frozenset("aten.kthvalue aten.median aten.nanmedian aten.mode aten.sort aten.topk".split())

# Elementwise by what they compute, though PyTorch does not tag them so.
_ELEMENTWISE_NAMES = frozenset(
    """
    aten.copysign aten.frexp aten.glu aten.ldexp aten.native_dropout_backward aten.true_divide prims.acos prims.acosh
    prims.add prims.asin prims.asinh prims.atan prims.atan2 prims.atanh prims.bitwise_and prims.bitwise_or
    prims.bitwise_xor prims.ceil prims.cos prims.cosh prims.div prims.eq prims.erf prims.erfc prims.exp prims.expm1
    prims.fma prims.fmod prims.frexp prims.ge prims.gt prims.le prims.lgamma prims.log prims.log10 prims.log1p prims.lt
    prims.ne prims.neg prims.remainder prims.sin prims.sinh prims.sqrt prims.sub prims.tan prims.tanh
    """.split()
)

# Control flow whose bodies are graphs of their own, which the pipeline visits like any other.
_CONTROL_FLOW = frozenset({"cond", "while_loop", "invoke_subgraph", "scan", "map_impl", "with_effects"})


def is_exact(node: Node) -> bool:
    """Whether every way of computing the node gives the same bits."""
    target = node.target
    if not isinstance(target, OpOverload):
        return target is operator.getitem or _is_size_arithmetic(node)
    if target is aten.index_put.default or target is aten._unsafe_index_put.default:
        return not _flag(node, "accumulate") or _integers_only(node)
    if torch.Tag.nondeterministic_seeded in target.tags:
        return draws_one_number(target, node.args)
    return exact_by_name(target) or is_view(target) or _integers_only(node)


def exact_by_name(target: OpOverload) -> bool:
    """Whether the op moves, compares or selects values, whatever their dtype."""
    return op_name(target) in _EXACT_NAMES and target not in (aten.scatter.reduce, aten.scatter.value_reduce)


def draws_one_number(target: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the op draws a single random number, for no row in particular.

    Layer drop draws one for each layer, dropout as we do it one for each call, and a DataLoader seeds its workers
    with one.
    """
    if target is aten.random_.default:
        return isinstance(args[0], Tensor) and args[0].dim() == 0
    places = {aten.rand.default: 0, aten.randn.default: 0, aten.randint.default: 1, aten.randint.low: 2}
    return target in places and len(args[places[target]]) == 0


_COMPARISONS = frozenset("aten.eq aten.ne aten.lt aten.le aten.gt aten.ge".split())


def breaks_ties_freely(node: Node) -> bool:
    """Whether the node, on a GPU, names one of several equal elements by a kernel that may follow the batch."""
    leaves = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    if all(v.device.type == "cpu" for v in leaves) or not isinstance(node.target, OpOverload):
        return False
    if node.target is aten.sort.stable:
        return not node.kwargs.get("stable")
    return op_name(node.target) in _FREE_TIES and node.target not in (aten.median.default, aten.nanmedian.default)


def compares_with_sizes(node: Node) -> bool:
    """Whether the node compares a half precision with a number made of symbolic sizes, which Inductor does not round.

    It rounds constants there, as PyTorch does, so that the answer would tell static shapes from dynamic ones.
    """
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return (
        op_name(node.target) in _COMPARISONS
        and any(isinstance(v, (torch.SymInt, torch.SymFloat)) for v in values)
        and any(isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) for v in values)
    )


def is_elementwise(node: Node) -> bool:
    """Whether the node is computed element by element in code that Inductor generates."""
    target = node.target
    if not isinstance(target, OpOverload) or target not in inductor.lowerings or target in inductor.fallbacks:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or _touches_complex(node):
        return False
    name = op_name(target)
    tagged = torch.Tag.pointwise in target.tags or name.startswith("aten._foreach_")
    return tagged or name in _ELEMENTWISE_NAMES


def is_control_flow(node: Node) -> bool:
    """Whether the node runs other graphs, each of which is certified by itself."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in _CONTROL_FLOW


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers, which follow an element's place in the batch."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def op_name(target: Any) -> str:
    """``aten.sum`` for ``aten.sum.dim_IntList``; the callable's own name for what is no ATen op."""
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._opname}"
    return target.name() if isinstance(target, HigherOrderOperator) else getattr(target, "__name__", str(target))


def is_view(target: OpOverload) -> bool:
    """Whether the op returns views of its inputs and nothing else."""
    aliases = [result.alias_info for result in target._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _is_size_arithmetic(node: Node) -> bool:
    """Python arithmetic on sizes: no tensor goes in or comes out."""
    leaves = [leaf for n in (node, *node.all_input_nodes) for leaf in tree_leaves(n.meta.get("val"))]
    return not isinstance(node.target, HigherOrderOperator) and not any(isinstance(v, Tensor) for v in leaves)


def _integers_only(node: Node) -> bool:
    """Whether all tensors that go in and come out are integer or boolean, and there is one."""
    leaves = [leaf for n in (node, *node.all_input_nodes) for leaf in tree_leaves(n.meta.get("val"))]
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    return bool(tensors) and not any(v.is_floating_point() or v.is_complex() for v in tensors)


def _touches_complex(node: Node) -> bool:
    leaves = [leaf for n in (node, *node.all_input_nodes) for leaf in tree_leaves(n.meta.get("val"))]
    return any(isinstance(v, Tensor) and v.is_complex() for v in leaves)


def _flag(node: Node, name: str) -> bool:
    assert isinstance(node.target, OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(name, argument.default_value)
            return bool(given)
    return False
