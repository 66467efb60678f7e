"""Halve what a small launch costs in Triton's interpreter."""

from typing import Any

from triton.runtime import interpreter


def patch_language_once_a_launch() -> None:
    """Let the interpreter replace the functions of Triton's language once a launch and module.

    It looks through the whole language again at every call of a device function, where nothing is left to replace.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()  # the launch before has put the language back
        launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
