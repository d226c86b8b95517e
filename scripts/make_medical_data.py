"""Write what the medical base is trained on: rows in LLaVA's format out of SLAKE's training rows and phantoms.

Example::

    python scripts/make_medical_data.py --slake_dir data/slake --output_dir output/medical-data

``align.json`` and ``instruct.json`` are for LLaVA's two stages, with pictures in ``images/``. Running it again with the
same settings does nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.checkpoints.manifest import manifest_of
from llava.cli import flag, flags_of, given, parse
from llava.files import values_sha256
from llava.toy.medical_rows import MedicalRows, make_medical_rows, read_inputs
from llava.utils import run_cli


@dataclass(kw_only=True)
class Arguments(flags_of(MedicalRows)):
    """Flags; those of ``MedicalRows`` override its defaults."""

    slake_dir: str = flag("data/slake", "folder with train.json, validate.json, test.json and imgs/")
    output_dir: str = flag("output/medical-data", "folder to write")
    fingerprint: list[str] | None = flag(None, "print a checksum of SLAKE and of these folders alone", empty=True)


def main() -> int:
    """Write the rows unless they are there already."""
    args = parse(Arguments, description=__doc__)
    if args.fingerprint is not None:
        _, inputs = read_inputs(Path(args.slake_dir))
        print(values_sha256([inputs, *map(manifest_of, args.fingerprint)]))
        return 0
    made = make_medical_rows(Path(args.output_dir), Path(args.slake_dir), MedicalRows(**given(args, MedicalRows)))
    print(f"{args.output_dir}: {'written' if made else 'already complete, nothing to do'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
