"""Short names for the LLVM vector instructions of which `simd` builds its intrinsics."""

from llvmlite import ir
from numba.core import cgutils

I32, I64, F32, F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


class Emitter:
    """Emits into the function that an intrinsic generates; vectors are of `lanes` float32 unless another type is given."""

    def __init__(self, context, builder, signature, args, lanes):
        self.context, self.b, self.types, self.args, self.lanes = context, builder, signature.args, args, lanes
        self.vector = ir.VectorType(F32, lanes)

    def data(self, i):
        """Pointer to the first element of array argument `i`."""
        return self.context.make_array(self.types[i])(self.context, self.b, self.args[i]).data

    def int(self, value):
        return ir.Constant(I64, value)

    def at(self, pointer, *offsets):
        for offset in offsets:
            pointer = self.b.gep(pointer, [self.int(offset) if isinstance(offset, int) else offset])
        return pointer

    def load(self, pointer, element=None, align=4):
        vector = self.vector if element is None else ir.VectorType(element, self.lanes)
        value = self.b.load(self.b.bitcast(pointer, vector.as_pointer()))
        value.align = align
        return value

    def store(self, value, pointer):
        self.b.store(value, self.b.bitcast(pointer, self.vector.as_pointer())).align = 4

    def splat(self, scalar, vector=None):
        undefined = ir.Constant(vector or self.vector, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def constant(self, value, vector=None):
        return ir.Constant(vector or self.vector, [value] * self.lanes)

    def call(self, name, *values):
        vector = values[0].type
        kind, bits = ir.FunctionType(vector, [vector] * len(values)), 32 if vector.element == F32 else 64
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.{name}.v{self.lanes}f{bits}"), values)

    def is_code(self, value, code):
        return self.b.icmp_signed("==", value, ir.Constant(value.type, code))

    def transpose(self, vectors):
        """Transpose `lanes` vectors of `lanes` elements by log2(lanes) perfect shuffles."""
        n, half = self.lanes, self.lanes // 2
        mask = ir.VectorType(I32, n)
        low = ir.Constant(mask, [i // 2 + n * (i % 2) for i in range(n)])
        high = ir.Constant(mask, [half + i // 2 + n * (i % 2) for i in range(n)])
        for _ in range(n.bit_length() - 1):
            pairs = [(vectors[i], vectors[i + half]) for i in range(half)]
            vectors = [self.b.shuffle_vector(a, c, m) for a, c in pairs for m in (low, high)]
        return vectors
