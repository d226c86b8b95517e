"""Does this Python have what pyproject.toml asks for? Exit code 0 if so; otherwise 1 and one line that says why not.

Runs on a bare Python too, which lacks ``packaging`` and so does not fit. Used by scripts/setup_env.sh.
    python scripts/check_env.py [EXTRA ...]      e.g. dev
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    print("packaging is not installed")
    sys.exit(1)

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The requirement strings of ``dependencies`` and the extras, by pattern: Python 3.10 has no TOML reader."""
    text = PYPROJECT.read_text(encoding="utf-8")
    lists = [re.search(rf"^{re.escape(name)} = \[(.*?)\]$", text, re.M | re.S) for name in ("dependencies", *extras)]
    return [quoted for found in lists if found for quoted in re.findall(r'"([^"]+)"', found.group(1))]


def unmet(text: str) -> str | None:
    """Why a requirement such as ``transformers>=5.17,<6`` does not hold here, or None."""
    wanted = Requirement(text)
    try:
        installed = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        # A machine with opencv-python has the same cv2 as the headless package.
        if wanted.name == "opencv-python-headless":
            return unmet(f"opencv-python{wanted.specifier}")
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(installed, prereleases=True):
        return f"{wanted.name} is {installed}, wanted {wanted.specifier}"
    return None


def main() -> int:
    reasons = [reason for reason in map(unmet, requirements(sys.argv[1:])) if reason]
    if reasons:
        print(reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""))
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
