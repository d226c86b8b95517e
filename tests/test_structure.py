"""The shape of the project: imports point downward, scripts stay short, settings are what DeepSpeed accepts."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "llava").rglob("*.py"))
SHELL = sorted([*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
ZERO = sorted((ROOT / "scripts").glob("zero*.json"))

# Each room may import the rooms named beside it, and itself.
BELOW_ALL = {"constants", "utils", "files", "locks", "registry", "folds", "padding", "devices", "truncation"}
BELOW_ALL |= {"normal_form", "outside", "schema", "inside", "targets", "progress", "heap"}
PICTURES = {"image_io", "dicom", "deep_grey"}
HELPERS = BELOW_ALL | PICTURES | {"conversation", "mm_utils"}
MODEL = HELPERS | {"checkpoints", "slots", "data"}
MAY_IMPORT = {
    "constants": set(),
    "utils": {"constants"},
    "files": {"constants", "utils", "targets"},
    "locks": {"utils", "files", "targets"},
    "registry": {"utils"},
    "outside": {"utils"},
    "schema": {"outside", "utils"},
    "inside": {"utils"},
    "targets": {"utils"},
    "cli": {"utils", "schema"},
    "progress": {"utils"},
    "heap": set(),
    "folds": set(),
    "padding": set(),
    "truncation": set(),
    "normal_form": set(),
    "devices": {"utils"},
    "conversation": BELOW_ALL | {"image_io"},
    "image_io": BELOW_ALL | {"dicom", "deep_grey"},
    "dicom": {"utils", "deep_grey"},
    "deep_grey": set(),
    "mm_utils": BELOW_ALL | {"image_io"},
    "checkpoints": BELOW_ALL,
    "slots": BELOW_ALL | {"checkpoints"},
    "data": HELPERS,
    "model": HELPERS | {"checkpoints", "slots", "cli"},
    "continual": MODEL | {"model", "cli"},
    "train": MODEL | {"model", "cli", "continual"},
    "eval": MODEL | {"model", "cli", "continual"},
    "serve": MODEL | {"model", "cli", "continual", "eval"},
    "toy": MODEL | {"model", "continual", "train", "eval"},
}
RAW_READERS = {"toy"}
"""Rooms beside ``data/raw`` itself that may import it; scripts and tests may too."""
ROOT_SCRIPTS = {"fusion", "train_prompt_key", "merge_prompt_key", "scripts", "tests"}


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            found |= {".".join((*package, *filter(None, [node.module]), alias.name)) for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    """``llava.model.builder`` -> ``model``; None outside the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "llava" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{path.name} is in no room that the design names"
    for module in imported_modules(path):
        target = room_of(module)
        assert module.split(".")[0] not in ROOT_SCRIPTS, f"{path} imports the script {module}"
        assert target is None or target == room or target in MAY_IMPORT[room], f"{path} imports {module}"


def test_raw_data_sets_are_read_by_nobody_else():
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        if parts[1] in RAW_READERS or parts[1:3] == ("data", "raw"):
            continue
        raw = {module for module in imported_modules(path) if module.startswith("llava.data.raw")}
        assert not raw, f"{path} imports {raw}"


COMMAND_LINES = [
    *SOURCES,
    *sorted([*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]),
]
PARSERS = {"argparse", "transformers.hf_argparser", "transformers.HfArgumentParser", "optparse", "getopt", "click"}


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_command_lines_parse_arguments(path):
    """One module knows the parser, and one that of transformers' arguments; who uses it is started as a command, or
    holds the arguments of one."""
    name = str(path.relative_to(ROOT))
    modules = imported_modules(path)
    used = {module for module in modules if any(f"{module}.".startswith(f"{parser}.") for parser in PARSERS)}
    theirs = {"transformers.hf_argparser.HfArgumentParser"} if name == "llava/train/arguments.py" else set()
    assert used <= theirs or name == "llava/cli.py", f"{name} imports {used}"
    parses = {f"llava.cli.{word}" for word in ("parse", "parse_command", "Parser", "FieldsParser")} & modules
    text = path.read_text(encoding="utf-8")
    assert not parses or 'if __name__ == "__main__":' in text or name == "llava/train/arguments.py", name


BARS = {"tqdm", "rich", "progressbar", "alive_progress", "transformers.trainer_callback.ProgressCallback"}
BARS |= {"transformers.ProgressCallback", "transformers.utils.logging.tqdm", "huggingface_hub.utils.tqdm"}


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_module_shows_how_far_a_long_step_is(path):
    used = {name for name in imported_modules(path) if any(f"{name}.".startswith(f"{bar}.") for bar in BARS)}
    assert not used or path.name == "progress.py", f"{path.name} imports {used}; count with llava.progress.Progress"


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_short_and_strict(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines[0].startswith("#!") and "set -euo pipefail" in lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_have_a_docstring_and_fit_in_a_head(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 420


READS = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_)?load|\.read_text\(|(?<![.\w])open\(")
READERS = {
    "llava/outside.py": "the one place that reads text of others",
    "llava/files.py": "writes, and reads bytes for checksums",
    "llava/locks.py": "reads who holds a lock",
    "llava/checkpoints/weights.py": "reads the ends of weights for the fingerprint",
    "llava/checkpoints/card.py": "a card of any encoding is kept as it is",
    "llava/data/raw/download.py": "writes the pictures of a zip",
    "llava/eval/model_vqa_mmbench.py": "a table of gigabytes is read line by line",
    "llava/checkpoints/large_files.py": "samples weights for their checksum",
    "llava/eval/answer_file.py": "appends answers",
    "llava/image_io.py": "looks for DICOM's mark",
}


def test_text_from_outside_is_read_in_one_place():
    """JSON read anywhere else reaches code unchecked; whoever must open a file stands above with the reason."""
    sources = [*SOURCES, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        if READS.search(re.sub(r"\bdef open\(", "", path.read_text(encoding="utf-8")))
    }
    assert found - {"scripts/check_env.py"} == set(READERS), found ^ set(READERS)


REPLACES = re.compile(r"\.unlink\(|\bos\.(replace|remove|rename)\(")


def test_files_are_replaced_and_removed_in_two_places():
    """Anything else might take a device, a pipe or a link away (``llava.targets`` knows which file may go)."""
    sources = [*SOURCES, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in sources if REPLACES.search(path.read_text(encoding="utf-8"))}
    assert found <= {"llava/files.py", "llava/targets.py", "llava/locks.py"}, found


ACCELERATORS = re.compile(r"(cuda|hip|rocm|mps|npu|xpu|hpu|tpu)(:\d+)?")
DEVICE_NAMES_STAY = {
    "llava/devices.py": "the one place that chooses",
    "llava/model/builder.py": "load_pretrained_model's signature is LLaVA's own: device='cuda'",
    "llava/model/loading.py": "and so are its flags",
}


def device_names(source: str) -> list[str]:
    """Accelerators that a source names: ``"cuda:0"`` as a value, ``.cuda()``, ``torch.cuda`` and their like.

    The CPU may be named: it is always there, and results are moved to it before they are written.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ACCELERATORS.fullmatch(node.value):
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Attribute) and ACCELERATORS.fullmatch(node.attr):
            found.append(f"line {node.lineno}: .{node.attr}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "x.cuda()",
        "x.to('cuda:1')",
        "torch.device('mps')",
        "def load(device='cuda'): pass",
        "DEVICES = {'first': 'npu'}",
        "torch.cuda.empty_cache()",
        "parser.add_argument('--device', default='cuda')",
        "autocast(device_type='xpu')",
    ],
)
def test_a_device_name_is_found_wherever_it_is_written(source):
    assert device_names(source)


def test_no_device_is_written_into_the_code():
    """Fixed devices: AMD, Apple and CPU users can't run them."""
    assert not device_names("x.cpu(); torch.load(file, map_location='cpu'); help = 'cuda or cpu'")
    sources = [*SOURCES, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    found = {str(path.relative_to(ROOT)): device_names(path.read_text(encoding="utf-8")) for path in sources}
    assert {path for path, names in found.items() if names} == set(DEVICE_NAMES_STAY), found


def text_files() -> list[Path]:
    folders = ["llava", "scripts", "tests", "docs", "benchmarks", ".ci"]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kinds = {".py", ".sh", ".json", ".md", ".toml", ".txt", ".yaml", ".yml", ""}
    top = [path for path in ROOT.glob("*.*") if path.name != ".git"]  # a file in a linked worktree
    return sorted(path for path in [*top, *inside] if path.is_file() and path.suffix in kinds)


def test_no_file_holds_a_path_of_one_machine():
    homes = "|".join(("work", "root", "home", "Users", "mnt", "data[0-9]", "llava"))
    pattern = re.compile(rf"(?<![\w.~}}\])/:-])/(?:{homes})/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.name)
def test_deepspeed_settings_hold_integers_and_validate(path):
    settings = json.loads(path.read_text(encoding="utf-8"))
    zero = settings["zero_optimization"]
    floats = {name: value for name, value in zero.items() if isinstance(value, float)}
    assert not floats, f"write integers: {floats}"
    buckets = [name for name in zero if name.endswith(("_size", "_threshold", "_parameters", "_distance"))]
    assert buckets and all(type(zero[name]) is int for name in buckets)
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] == "auto"
    assert settings["bf16"]["enabled"] == "auto"
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(**zero).stage == int(path.stem[4])


def test_the_three_deepspeed_files_ship():
    assert [path.name for path in ZERO] == ["zero2.json", "zero3.json", "zero3_offload.json"]


def test_constraints_hold_every_dependency_exactly():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    declared = re.findall(r'^ {4}"([A-Za-z0-9_.-]+?)[><=~]', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared and {name.lower() for name in declared} <= {name.lower() for name in pinned}
    assert pinned["torch"] == "2.13.0"


def test_scripts_that_use_torch_keep_other_libraries_quiet():
    """A newcomer reads this project's lines: DeepSpeed warned in the quick start that it finds no GPU."""
    scripts = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "torch" in imported_modules(path)]
    assert scripts and all("    quiet_libraries()\n" in path.read_text(encoding="utf-8") for path in scripts)
