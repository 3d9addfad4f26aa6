"""Operations on each element by itself, as C expressions of their arguments.

Arguments stand in braces by the names that ATen's schema has for them. They are cast to the type of the
result before, except where that is a truth, and except for conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_vi_kit.capture.in_c.writer import Call

_CONDITIONS = ("condition", "mask")
# Their results are truths, and so are what they read.
_TRUTHS = ("where", "masked_fill", "clone", "copy", "_to_copy", "lift_fresh", "fill", "expand_copy")


def _called(function: str, *names: str) -> str:
    return f"{function}({', '.join(f'{{{name}}}' for name in names)})"


_OF_ONE = {
    **{name: name for name in ("exp", "expm1", "log", "log1p", "log2", "log10", "exp2", "sqrt")},
    **{
        name: name for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
    },
    **{name: name for name in ("asinh", "acosh", "atanh", "erf", "erfc", "floor", "ceil", "trunc")},
    "round": "rint",
    "sigmoid": "sigmoid_",
    "lgamma": "lgamma_once_",
    "digamma": "digamma_",
}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_LOGICAL = {"logical_and": "&&", "logical_or": "||"}


def _scaled(sign: str) -> Callable[[Call], str]:
    """`self + alpha * other` and its like."""

    def template(call: Call) -> str:
        other = "{other}" if call["alpha"] == 1 else "{alpha} * {other}"
        return f"({{self}} {sign} {other})"

    return template


def _rsub(call: Call) -> str:
    return f"({'{other}'} - {'{self}' if call['alpha'] == 1 else '{alpha} * {self}'})"


_POWERS = {
    0: "((void){self}, 1.0)",
    1: "{self}",
    2: "square_({self})",
    3: "cube_({self})",
    0.5: "sqrt({self})",
    -0.5: "(1 / sqrt({self}))",
    -1: "(1 / {self})",
    -2: "(1 / square_({self}))",
}


def _power(call: Call) -> str:
    return _POWERS.get(call["exponent"], "pow({self}, {exponent})")


def _clamp(call: Call) -> str:
    text = "{self}" if call["min"] is None else "at_least_({self}, {min})"
    return text if call["max"] is None else f"at_most_({text}, {{max}})"


def _plain_cross_entropy(call: Call) -> str:
    plain = call["weight"] is None and call["pos_weight"] is None and call["reduction"] == 0
    return _called("binary_cross_entropy_", "self", "target") if plain else ""


def _plain_quotient(call: Call) -> str:
    return "({self} / {other})" if call["rounding_mode"] is None else ""


def _negated(call: Call) -> str:
    return "(!{self})" if call.ctype == "uint8_t" else "(~{self})"


# A template, or what makes one of a call; an empty one refuses it. By overload, without "aten.".
TEMPLATES: dict[str, str | Callable[[Call], str]] = {
    **{f"{op}.default": _called(name, "self") for op, name in _OF_ONE.items()},
    **{
        f"{op}.{kind}": f"({{self}} {sign} {{other}})"
        for kind in ("Tensor", "Scalar")
        for op, sign in (_COMPARISONS | _BITWISE).items()
    },
    **{f"{op}.default": f"({{self}} {sign} {{other}})" for op, sign in _LOGICAL.items()},
    **{
        f"{op}.{kind}": template
        for kind in ("Tensor", "Scalar")
        for op, template in {
            "add": _scaled("+"),
            "sub": _scaled("-"),
            "rsub": _rsub,
            "mul": "({self} * {other})",
            "div": "({self} / {other})",
        }.items()
    },
    "div.Tensor_mode": _plain_quotient,
    "true_divide.Tensor": "({self} / {other})",
    "logical_not.default": "(!{self})",
    "logical_xor.default": "(!{self} != !{other})",
    "bitwise_not.default": _negated,
    "neg.default": "(-{self})",
    "abs.default": "fabs({self})",
    "sgn.default": "sign_({self})",
    "sign.default": "sign_({self})",
    "relu.default": "at_least_({self}, 0)",
    "frac.default": "({self} - trunc({self}))",
    "square.default": "square_({self})",
    "reciprocal.default": "(1 / {self})",
    "rsqrt.default": "(1 / sqrt({self}))",
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": "pow({self}, {exponent})",
    "pow.Scalar": "pow({self}, {exponent})",
    "atan2.default": _called("atan2", "self", "other"),
    "clamp.default": _clamp,
    "clamp_min.default": "at_least_({self}, {min})",
    "clamp_max.default": "at_most_({self}, {max})",
    "maximum.default": _called("maximum_", "self", "other"),
    "minimum.default": _called("minimum_", "self", "other"),
    "xlogy.Tensor": _called("xlogy_", "self", "other"),
    "xlogy.Scalar_Other": _called("xlogy_", "self", "other"),
    "xlogy.Scalar_Self": _called("xlogy_", "self", "other"),
    "special_xlog1py.default": _called("xlog1py_", "self", "other"),
    "logaddexp.default": _called("logaddexp_", "self", "other"),
    "softplus.default": _called("softplus_", "self", "beta", "threshold"),
    "softplus_backward.default": _called(
        "softplus_backward_", "grad_output", "self", "beta", "threshold"
    ),
    "sigmoid_backward.default": _called("sigmoid_backward_", "grad_output", "output"),
    "tanh_backward.default": _called("tanh_backward_", "grad_output", "output"),
    "threshold_backward.default": "({self} <= {threshold} ? 0 : {grad_output})",
    "log_sigmoid_forward.default": "log_sigmoid_({self})",
    "log_sigmoid_backward.default": _called("log_sigmoid_backward_", "grad_output", "self"),
    "binary_cross_entropy_with_logits.default": _plain_cross_entropy,
    "isnan.default": "(isnan((double){self}) != 0)",
    "isinf.default": "(isinf((double){self}) != 0)",
    "isfinite.default": "(isfinite((double){self}) != 0)",
    "addcmul.default": "({self} + {value} * {tensor1} * {tensor2})",
    "addcdiv.default": "({self} + {value} * {tensor1} / {tensor2})",
    "lerp.Scalar": _called("lerp_", "self", "end", "weight"),
    **{
        f"where.{kind}": "({condition} ? {self} : {other})"
        for kind in ("self", "ScalarSelf", "ScalarOther", "Scalar")
    },
    "masked_fill.Scalar": "({mask} ? {value} : {self})",
    "masked_fill.Tensor": "({mask} ? {value} : {self})",
    "clone.default": "{self}",
    "_to_copy.default": "{self}",
    "copy.default": "{src}",
    "fill.Scalar": "{value}",
    "fill.Tensor": "{value}",
    **{f"{op}_like.default": text for op, text in (("zeros", "0"), ("ones", "1"))},
    **{f"new_{op}.default": text for op, text in (("zeros", "0"), ("ones", "1"))},
    "full_like.default": "{fill_value}",
    "new_full.default": "{fill_value}",
}


def casts(op: str, name: str, ctype: str) -> bool:
    """Whether an argument of an operation is cast to the type of its result."""
    if name in _CONDITIONS:
        return False
    if ctype != "uint8_t":
        return True
    return op.split(".", maxsplit=1)[0] in _TRUTHS
