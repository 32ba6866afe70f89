"""Explicit SIMD for numba kernels: registers of floats, raw pointers and an atomic counter.

Loops over these become vector code by construction, where the automatic vectoriser depends on what it can prove about
aliasing. Knows nothing of attention. All of it is for use inside compiled functions. Memory of bfloat16 is typed
uint16; `load` widens it and `store` rounds to nearest even.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.core.types import Type
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

Vector: TypeAlias = Any  # a value of type `Lanes` in compiled code
Pointer: TypeAlias = Any  # a typed address in compiled code; p[i] reads and writes single elements

_WORD = ir.IntType(32)
_FLOAT = ir.FloatType()

# Numba is typed in part, and its intrinsics with the signature of what compiles them, not with that of their calls.
types: Any = numba.types
_declare: Any = cgutils.get_or_insert_function
_type_callable: Any = type_callable
_lower_builtin: Any = lower_builtin
_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = cast(Any, intrinsic)
_intrinsic_of_literals: Callable[[Callable[..., Any]], Callable[..., Any]] = cast(Any, intrinsic(prefer_literal=True))


_F = TypeVar("_F", bound=Callable[..., Any])
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True}
called: Callable[[_F], _F] = cast(Any, numba.njit(**_OPTIONS))  # compiles a function that compiled code calls
inlined: Callable[[_F], _F] = cast(Any, numba.njit(**_OPTIONS, inline="always"))  # or takes in


class Lanes(Type):
    """A register of `width` floats (several machine registers where the processor's are narrower)."""

    def __init__(self, width: int) -> None:
        super().__init__(name=f"Lanes({width})")
        self.width = width


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(_FLOAT, lanes.width))  # type: ignore[no-untyped-call]


def _words(width: int, value: int) -> Any:
    return ir.Constant(ir.VectorType(_WORD, width), [value] * width)


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, _WORD(0)), undefined, _words(width, 0))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(_declare(builder.module, kind, name), [a, b, c])


def _round_to_bfloat16(builder: Any, vector: Any, width: int) -> Any:
    bits = builder.bitcast(vector, ir.VectorType(_WORD, width))
    odd = builder.and_(builder.lshr(bits, _words(width, 16)), _words(width, 1))
    rounded = builder.add(bits, builder.add(odd, _words(width, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    chosen = builder.select(is_nan, _words(width, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, _words(width, 16)), ir.VectorType(ir.IntType(16), width))


def _define(symbol: Any, instruction: str) -> None:
    def typer_of(_context: Any) -> Any:
        return lambda a, b: a if isinstance(a, Lanes) and a == b else None

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)

    _type_callable(symbol)(typer_of)
    _lower_builtin(symbol, Lanes, Lanes)(emit)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_symbol, _name)


@_intrinsic
def pointer(_typing: Any, address: Any, dtype: Any) -> Any:
    """The integer `address` as a pointer to elements of a numpy scalar type."""

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(dtype.dtype)))

    return types.CPointer(dtype.dtype)(types.int64, dtype), emit


@_intrinsic
def advance(_typing: Any, memory: Any, count: Any) -> Any:
    """The pointer `count` elements further."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.int64), emit


@_intrinsic
def fetch_add(_typing: Any, memory: Any, index: Any) -> Any:
    """Add 1 to the int64 `memory[index]`, which threads share, and return what it was (acquire and release)."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), ir.IntType(64)(1), "acq_rel")

    return types.int64(memory, types.int64), emit


@_intrinsic
def prefetch(_typing: Any, memory: Any, index: Any) -> Any:
    """Ask for the cache line of `memory[index]`, to be read soon; any address is safe."""

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        place = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        call = _declare(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [place, _WORD(0), _WORD(2), _WORD(1)])  # read, into the second level, data
        return context.get_dummy_value()

    return types.void(memory, types.int64), emit


@_intrinsic_of_literals
def fill(_typing: Any, like: Any, scalar: Any) -> Any:
    """The scalar in every lane; as many lanes as `like`, which is a literal integer or another vector."""
    lanes = like if isinstance(like, Lanes) else Lanes(like.literal_value)

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _splat(builder, args[1], lanes.width)

    return lanes(like, types.float32), emit


@_intrinsic
def load(_typing: Any, like: Any, memory: Any, index: Any) -> Any:
    """`memory[index:]` as floats, as many as `like` has."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place, width = builder.gep(args[1], [args[2]]), like.width
        element = place.type.pointee
        vector = builder.load(builder.bitcast(place, ir.VectorType(element, width).as_pointer()))
        vector.align = 4 if element == _FLOAT else 2
        if element == _FLOAT:
            return vector
        wide = builder.shl(builder.zext(vector, ir.VectorType(_WORD, width)), _words(width, 16))
        return builder.bitcast(wide, ir.VectorType(_FLOAT, width))

    return like(like, memory, types.int64), emit


@_intrinsic
def store(_typing: Any, memory: Any, index: Any, vector: Any) -> Any:
    """`memory[index:] = vector`."""

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]])
        value = args[2] if place.type.pointee == _FLOAT else _round_to_bfloat16(builder, args[2], vector.width)
        builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4 if value is args[2] else 2)
        return context.get_dummy_value()

    return types.void(memory, types.int64, vector), emit


@_intrinsic
def scatter(_typing: Any, memory: Any, index: Any, stride: Any, vector: Any) -> Any:
    """`memory[index + i * stride] = vector[i]`, float32 memory only."""

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]])
        for lane in range(vector.width):
            builder.store(builder.extract_element(args[3], _WORD(lane)), place)
            place = builder.gep(place, [args[2]])
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64, vector), emit


@_intrinsic
def store_each(_typing: Any, memory: Any, index: Any, stride: Any, vectors: Any) -> Any:
    """`memory[index + i * stride:] = vectors[i]`, float32 memory only."""

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]])
        for i in range(vectors.count):
            vector = builder.extract_value(args[3], i)
            builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)
            place = builder.gep(place, [args[2]])
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64, vectors), emit


@_intrinsic
def fma_each(_typing: Any, vectors: Any, memory: Any, index: Any, stride: Any, factor: Any) -> Any:
    """`vectors[i] + memory[index + i * stride] * factor` for each vector of a tuple: a step of an outer product."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        result, place = args[0], builder.gep(args[1], [args[2]])
        for i in range(vectors.count):
            scalar = _splat(builder, builder.load(place), factor.width)
            result = builder.insert_value(result, _fma(builder, scalar, args[4], builder.extract_value(result, i)), i)
            place = builder.gep(place, [args[3]])
        return result

    return vectors(vectors, memory, types.int64, types.int64, factor), emit


@_intrinsic
def fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, fused where the processor can."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _fma(builder, *args)

    return a(a, b, c), emit


@_intrinsic
def where_less(_typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Lane by lane `yes if a < b else no`; a NaN chooses `no`."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return a(a, a, a, a), emit


@_intrinsic
def shift_exponent(_typing: Any, a: Any, biased: Any) -> Any:
    """`a * 2**k`, k being the integer in the low bits of `biased` = k + 1.5 * 2**23; no check for overflow."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        words = ir.VectorType(_WORD, a.width)
        shift = builder.shl(builder.bitcast(args[1], words), _words(a.width, 23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], words), shift), args[0].type)

    return a(a, a), emit


@inlined
def exp(x: Vector) -> Vector:
    """e**x for x <= 80 to 2 units in the last place, 0 below -87; the polynomial of Cephes' expf."""
    magic = fill(x, 12582912.0)  # 1.5 * 2**23: adding it rounds to an integer
    biased = fma(x, fill(x, 1.44269504088896341), magic)
    k = biased - magic
    r = fma(k, fill(x, 2.12194440e-4), fma(k, fill(x, -0.693359375), x))
    p = fma(fill(x, 1.9875691500e-4), r, fill(x, 1.3981999507e-3))
    p = fma(p, r, fill(x, 8.3334519073e-3))
    p = fma(p, r, fill(x, 4.1665795894e-2))
    p = fma(p, r, fill(x, 1.6666665459e-1))
    p = fma(p, r, fill(x, 5.0000001201e-1))
    p = fma(p * r, r, r) + fill(x, 1.0)
    return where_less(x, fill(x, -87.0), fill(x, 0.0), shift_exponent(p, biased))
