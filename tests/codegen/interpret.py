"""Runs a module's tests under Triton's interpreter, on the CPU.

TRITON_INTERPRET must be set before triton is imported, so those tests run in a process of their own:

    from interpret import INTERPRETED, run_interpreted

    if INTERPRETED:
        def test_numerics(): ...
    else:
        def test_interpreted():
            run_interpreted(__file__)
"""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(path, only: str = ""):
    """Fails with the inner report unless every test of the module at `path` passes under the interpreter.  only: as pytest's
    -k."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "-k", only, str(path)]
    done = subprocess.run(command, env=env, cwd=Path(path).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


if INTERPRETED:
    # The interpreter's scalars are arrays of one element, which NumPy 2.4 no longer turns into an int by itself.
    import triton
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_scalars(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_scalars

    # Since 3.7 or later (3.9 is what was seen) it holds a comparison's result as its operands' type, and some masks as int32,
    # which it then does not take. That a mask is boolean has been checked before, by the language.
    def _with_masks(method, at):
        def called(self, *args):
            mask = interpreter.TensorHandle(args[at].data.astype(bool), args[at].dtype)
            return method(self, *args[:at], mask, *args[at + 1 :])

        return called

    if not triton.__version__.startswith("3.6."):
        for _name, _at in (("create_masked_load", 1), ("create_masked_store", 2)):
            setattr(interpreter.InterpreterBuilder, _name, _with_masks(getattr(interpreter.InterpreterBuilder, _name), _at))
