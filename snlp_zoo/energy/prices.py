"""Which primitives every tensor operation outside matrix products takes. What stands nowhere here is an error.

Per element, in floats; exp stands for exponential, error function, sigmoid and their like.
"""

REAL_BYTES = 4  # of a word or weight that is no integer: adders are float32's, whatever a model was loaded in

ELEMENTWISE: dict[str, tuple[str, dict[str, int]]] = {  # per element of the output: operation -> (role, primitives)
    **dict.fromkeys(("add", "sub", "rsub"), ("residual", {"add": 1})),
    **dict.fromkeys(("mul",), ("other", {"mul": 1})),
    **dict.fromkeys(("div", "reciprocal", "sqrt", "rsqrt", "pow"), ("other", {"div": 1})),
    **dict.fromkeys(("exp", "erf", "sigmoid", "tanh", "log", "sin", "cos"), ("activation", {"exp": 1})),
    **dict.fromkeys(("relu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"), ("activation", {"add": 1})),
    **dict.fromkeys(("eq", "ne", "ge", "gt", "le", "lt", "round", "floor", "ceil"), ("other", {"add": 1})),
    "softplus": ("activation", {"exp": 2, "add": 1}),  # log(1 + exp(x))
    "square": ("activation", {"mul": 1}),
    "gelu": ("activation", {"exp": 1, "mul": 2, "add": 1}),
    "silu": ("activation", {"exp": 1, "mul": 1}),
    "lerp": ("other", {"mul": 2, "add": 2}),
    "addcmul": ("other", {"mul": 1, "add": 1}),
    "native_layer_norm": ("norm", {"add": 4, "mul": 3}),
    "_fused_rms_norm": ("norm", {"add": 2, "mul": 3}),
    **dict.fromkeys(("_softmax", "_log_softmax"), ("softmax", {"exp": 1, "add": 1, "div": 1})),
}
# One token and channel of RWKV-4's recurrence, p the running maximum, a and b numerator and denominator:
#   out     q = max(p, u + k), e1 = exp(p - q), e2 = exp(u + k - q), (e1 a + e2 v) / (e1 b + e2)
#           adds: u + k, max, two differences, two sums; products: e1 a, e2 v, e1 b
#   update  q = max(p + w, k), e1 = exp(p + w - q), e2 = exp(k - q), a = e1 a + e2 v, b = e1 b + e2
#           the same numbers without the division
WKV4 = {"add": 6 + 6, "mul": 3 + 3, "exp": 2 + 2, "div": 1}
WKV4_STATE = 3  # words of a, b and p, read and written for every token and channel
REDUCTIONS = ("sum", "mean", "cumsum", "amax", "amin", "argmax", "argmin")  # an addition per element of the input
GATHERS = ("embedding", "index", "index_select", "gather")  # words are read, nothing is computed
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")

# Same values in another order, shape or dtype: the output is what the first input was.
SAME = {
    *("view", "_unsafe_view", "reshape", "alias", "detach", "t", "transpose", "permute", "expand", "unsqueeze"),
    *("squeeze", "select", "slice", "unbind", "split", "split_with_sizes", "chunk", "clone", "_to_copy", "contiguous"),
    *("repeat", "unfold", "narrow", "as_strided", "lift_fresh", "_reshape_alias", "constant_pad_nd", "roll", "flip"),
    *("masked_fill", "tril", "triu", "copy"),  # zeros in other places: still of the same alphabet
}
# Wires, constants and control flow: no arithmetic.
FREE = {
    *("empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like", "ones", "new_ones", "ones_like"),
    *("full", "new_full", "full_like", "arange", "scalar_tensor", "promote_types", "cat", "stack", "where", "fill"),
    *("abs", "neg", "sign", "isnan", "isfinite", "any", "all", "is_nonzero", "_local_scalar_dense"),
    *("count_nonzero", "zero", "equal", "bitwise_not", "logical_not", "bitwise_and", "bitwise_or", "logical_and"),
}
# Made of nothing but numbers in the program: as constant as a weight.
CONSTANTS = {"arange", "scalar_tensor"}


def plain_name(schema: str) -> str:
    """aten::add_ -> add; other libraries keep their name: snlp_zoo::bit_linear."""
    library, _, name = schema.partition("::")
    if library not in ("aten", "prims"):
        return schema
    return name if name.endswith("__") else name.removesuffix("_")
