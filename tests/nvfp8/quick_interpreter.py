"""Triton's interpreter without work that comes to nothing: more than half of the time of the tests that run in it.

What kernels compute, and what the interpreter refuses, stays. In Triton 3.6 and 3.7:

- With every call of a helper, such as `tl.sum` or a function of ours, the interpreter lists the members of `triton.language` and
  puts its own functions in their place, where they are since the launch. Here that is done once a launch for a module of helpers.
- Every sum, difference and product of integers is computed again in 64 bits and compared with what its dtype holds, for an
  assertion that is then not made: only debug mode makes any (`TritonSemantic.device_assert`). Here there is nothing of that.
- Whenever a value is made, a table of all dtypes is built to look up one. Here what was found is kept.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from triton.runtime import interpreter

_patch, _restore, _dtype = interpreter._patch_lang, interpreter._LangPatchScope.restore, lru_cache(interpreter._get_np_dtype)
_patched: set[int] = set()  # modules, by their globals, whose language is the interpreter's in the launch that runs


def _patch_once(function: Any) -> Any:
    if id(function.__globals__) in _patched:
        return interpreter._LangPatchScope()
    _patched.add(id(function.__globals__))
    return _patch(function)


def _restore_after_a_launch(scope: Any) -> None:
    _restore(scope)
    _patched.clear()


def _dtype_of_elements(dtype: Any) -> Any:
    scalar = dtype.scalar
    return _dtype.__wrapped__(scalar) if scalar.is_ptr() else _dtype(scalar)  # pointers have no hash, and need no table


def install() -> None:
    """From here on, in this process."""
    interpreter._patch_lang = _patch_once
    interpreter._LangPatchScope.restore = _restore_after_a_launch
    interpreter._get_np_dtype = _dtype_of_elements
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
