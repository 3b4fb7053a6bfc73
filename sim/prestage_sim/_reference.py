"""State of compiled functions handed on as one pointer.

Numba passes a tuple of arrays by value: seven words and more of each array, at every call that is
not inlined. For the fifty arrays of the simulator's engine that took half of its time.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils as _cgutils
from numba.core.datamodel.models import PointerModel
from numba.core.typing import templates
from numba.extending import intrinsic, lower_getattr_generic, register_model

__all__ = ["by_reference"]

# Numba has types for some of its functions only.
_gep: Any = _cgutils.gep_inbounds
_alloca: Any = _cgutils.alloca_once
_infer: Any = templates.infer_getattr
_lower: Any = lower_getattr_generic
_Template: Any = templates.AttributeTemplate
_Type: Any = types.Type


class _Reference(_Type):  # type: ignore[misc]
    """Pointer to a named tuple."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"_Reference({dtype.name})")


register_model(_Reference)(PointerModel)


def _field(reference: _Reference, name: str) -> Any:
    """Type that a field is read as."""
    dtype = reference.dtype[reference.dtype.fields.index(name)]
    return _Reference(dtype) if isinstance(dtype, types.BaseNamedTuple) else dtype


@_infer
class _Fields(_Template):  # type: ignore[misc]
    """Types of a reference's fields."""

    key = _Reference

    def generic_resolve(self, reference: _Reference, name: str) -> Any:
        return _field(reference, name) if name in reference.dtype.fields else None


@_lower(_Reference)  # type: ignore[untyped-decorator]
def _read_field(context: Any, builder: Any, reference: _Reference, pointer: Any, name: str) -> Any:
    """Read a field, or point to it where it is a tuple."""
    place = _gep(builder, pointer, 0, reference.dtype.fields.index(name))
    dtype = _field(reference, name)
    return place if isinstance(dtype, _Reference) else context.unpack_value(builder, dtype, place)


def _by_reference(typing_context: Any, state: Any) -> Any:
    """A named tuple of arrays and of other such tuples, to be handed on as one pointer.

    Compiled functions read its fields as those of the tuple itself; a field that is a tuple is a
    pointer, too. It is kept with the variables of the function that calls this, so it may be handed
    to functions which that one calls, and nowhere else.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _alloca(builder, context.get_data_type(state))
        context.pack_value(builder, state, arguments[0], pointer)
        return pointer

    return _Reference(state)(state), codegen


by_reference: Any = intrinsic(_by_reference)
