"""Whether the library that holds a base in 4 or 8 bit is here and works, asked before it is needed.

transformers says only that it could not import a module of its own, and PEFT fails where a bitsandbytes is installed
that cannot be imported, whatever the quantization.
"""

from __future__ import annotations

from lmtune.errors import ModelError
from lmtune.models.libraries import quiet_libraries

INSTALL = "`pip install bitsandbytes`"
_AGAIN = "install it again (`pip install --force-reinstall bitsandbytes`)"


def check_bitsandbytes(quantization: str) -> None:
    """Make sure that bitsandbytes is there for `nf4` and `int8`, and in no case installed but broken.

    Raises:
        ModelError: with both ways out.
    """
    quiet_libraries()
    needed = quantization in ("nf4", "int8")
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "bitsandbytes":
            if needed:
                raise ModelError(
                    f"model.quantization: {quantization} needs bitsandbytes, which is not installed; {INSTALL}, or set "
                    "model.quantization=none"
                ) from None
            return
        raise _broken(quantization, needed, error) from error
    except Exception as error:
        raise _broken(quantization, needed, error) from error


def _broken(quantization: str, needed: bool, error: Exception) -> ModelError:
    why = f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    take_away = "take it away (`pip uninstall bitsandbytes`)"
    if needed:
        return ModelError(
            f"model.quantization: {quantization} needs bitsandbytes, which is installed but {why}; {_AGAIN}, or "
            f"{take_away} and set model.quantization=none"
        )
    return ModelError(f"bitsandbytes is installed but {why}, and PEFT imports it; {_AGAIN}, or {take_away}")
