"""Bodies of the operators' functions, in ONNX's text form.

A body is a product's beginning, its layout's way from the inputs to ``rows`` and ``columns``, the
places of the values, and the product's end.
"""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "CONV", "GROUPS", "LINEAR", "LISTS"]

# Of what is as large as the dense weight a body makes as little as possible: ONNX Runtime keeps all
# of it while it loads a file.
_CONSTANTS = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    zero_float = Constant <value_float = 0.0> ()
    zero_value = CastLike (zero_float, values)
"""
LINEAR = (
    _CONSTANTS
    + """
    c_scalar = Constant <value_int: int = @in_features> ()
    r_scalar = Constant <value_int: int = @out_features> ()
    c = Reshape (c_scalar, one)
    r = Reshape (r_scalar, one)
""",
    """
    row_places = Unsqueeze (rows, minus_one)
    column_places = Unsqueeze (columns, minus_one)
    places = Concat <axis = -1> (column_places, row_places)
    c_r = Concat <axis = 0> (c, r)
    zeros = Expand (zero_value, c_r)
    weight = ScatterND (zeros, places, values)
    product = MatMul (X, weight)
    Y = Add (product, bias)
""",
)
"""Beginning and end of a linear layer's; its weight is turned, (in_features, out_features)."""

CONV = (
    _CONSTANTS
    + """
    kernel = Constant <value_ints: ints = @kernel_shape> ()
    groups = Constant <value_int: int = @group> ()
    in_scalar = Constant <value_int: int = @in_channels> ()
    r_scalar = Constant <value_int: int = @out_channels> ()
    channels_scalar = Div (in_scalar, groups)
    channels = Reshape (channels_scalar, one)
    cells = ReduceProd <keepdims = 1> (kernel)
    c = Mul (channels, cells)
    r = Reshape (r_scalar, one)
""",
    """
    row_places = Unsqueeze (rows, minus_one)
    column_places = Unsqueeze (columns, minus_one)
    places = Concat <axis = -1> (row_places, column_places)
    r_c = Concat <axis = 0> (r, c)
    zeros = Expand (zero_value, r_c)
    matrix = ScatterND (zeros, places, values)
    shape = Concat <axis = 0> (r, channels, kernel)
    weight = Reshape (matrix, shape)
    Y = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
              dilations: ints = @dilations, group: int = @group> (X, weight, bias)
""",
)
"""Beginning and end of a convolution's."""

# The owner of each value, from where the values of each owner begin: one step up at every start.
_OWNERS = """
    starts_shape = Shape (starts)
    steps = Expand (step, starts_shape)
    count = Shape (values)
    count_1 = Add (count, one)
    flat = Expand (first, count_1)
    jumps = ScatterElements <axis = 0, reduction = "add"> (flat, starts, steps)
    climbed = CumSum (jumps, first)
    all_owners = Sub (climbed, one)
    owner = Slice (all_owners, zero, count)
"""
LISTS = (
    """
    pointers = Cast <to = 7> (indptr)
    starts = Slice (pointers, zero, minus_one)
"""
    + _OWNERS
    + """
    rows = Identity (owner)
    columns = Cast <to = 7> (col_indices)
"""
)
GROUPS = (
    """
    last = Constant <value = int64[1] {9223372036854775807}> ()
    row_pointers = Cast <to = 7> (row_ptr)
    row_starts = Slice (row_pointers, zero, minus_one)
    row_ends = Slice (row_pointers, one, last)
    heights = Sub (row_ends, row_starts)
    begins = Cast <to = 7> (col_begin)
    ends = Cast <to = 7> (col_end)
    widths = Sub (ends, begins)
    sizes = Mul (heights, widths)
    stops = CumSum (sizes, first)
    starts = Sub (stops, sizes)
"""
    + _OWNERS
    + """
    count_scalar = Squeeze (count)
    positions = Range (first, count_scalar, step)
    own_start = Gather (starts, owner)
    offset = Sub (positions, own_start)
    height = Gather (heights, owner)
    column = Div (offset, height)
    row = Mod (offset, height)
    own_row_start = Gather (row_starts, owner)
    row_place = Add (own_row_start, row)
    perm = Cast <to = 7> (row_perm)
    rows = Gather (perm, row_place)
    own_begin = Gather (begins, owner)
    column_place = Add (own_begin, column)
    all_columns = Cast <to = 7> (col_indices)
    columns = Gather (all_columns, column_place)
"""
)
_SCALARS = """
    {name}_double = Constant <value = double {{{value}}}> ()
    {name} = CastLike ({name}_double, Z)
"""


def _scalars(**values: float) -> str:
    return "".join(_SCALARS.format(name=name, value=value) for name, value in values.items())


# Y from Z, in operators of opset 18 for every type; ONNX Runtime fuses what it knows.
ACTIVATIONS = {
    "relu": """
    Y = Relu (Z)
""",
    "gelu": _scalars(root_half=0.7071067811865476, one=1.0, half=0.5)
    + """
    scaled = Mul (Z, root_half)
    erf = Erf (scaled)
    above_zero = Add (erf, one)
    double = Mul (Z, above_zero)
    Y = Mul (double, half)
""",
    "gelu_tanh": _scalars(slope=0.7978845608028654, cubic=0.044715, three=3.0, one=1.0, half=0.5)
    + """
    cube = Pow (Z, three)
    bend = Mul (cube, cubic)
    sum = Add (Z, bend)
    scaled = Mul (sum, slope)
    tanh = Tanh (scaled)
    above_zero = Add (tanh, one)
    double = Mul (Z, above_zero)
    Y = Mul (double, half)
""",
    "silu": """
    gate = Sigmoid (Z)
    Y = Mul (Z, gate)
""",
}
