"""The rooms and floors of CONTRIBUTING.md: imports run down, there is no circle, no room is too long, and torch is
imported only where it may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A room may import those on lower floors; inside a folder, a file may import those that stand behind it here.
FLOORS = [
    ["run_llama"],
    [f"commands.{name}" for name in (
        # one for each --option
        "search",
        "inspect", "inspect_run", "inspect_data", "inspect_pages",
        "finetune", "evaluate", "predict", "serve", "prompt", "generate", "lr_find", "verify_resume", "report",
        "export", "export_hf", "model_card", "export_tokenizer", "exported",
        # what they share
        "report_pages",
        "report_pictures",
        "past_runs",
        "confirm",
        "finalists", "search_pages", "trial", "study", "storage", "space",
        "series",
        "one_run",
        "resume",
        "plan",
        "estimate",
        "run_pictures",
        "rate_pictures",
        "plot",
        "job",
        "defaults",
        "start",
        "ensemble",
        "results",
        "scores",
        "classification",
        "http_service",
        "batcher",
        "answers",
        "adapted",
        "finished",
        "inputs",
        "splits",
    )],
    ["minllama"],
    [f"training.{name}" for name in (
        "advice",
        "contradictions",
        "copies",
        "pairs",
        "verdicts",
        "saliency",
        "mistakes",
        "calibration",
        "data_checks",
        "checks",
        "trainer",
        "task",
        "loggers",
        "gradients",
        "diagnosis",
        "guards",
        "metrics",
        "kept",
        "frozen",
        "comparisons",
        "bar",
        "saved",
        "best",
        "state",
        "average",
        "clock",
        "course",
        "device",
        "signals",
        "streams",
        "run_folder",
        "logs",
    )],
    ["dataset", "classifier", "lora"],
    ["llama", "tokenizer"],
    [f"formats.{name}" for name in (
        "run_tables",
        "run_logs",
        "log_lines",
        "command_lines",
        "past_run",
        "export_peft", "export_hf", "export_gguf", "export_llama2c",
        "peft",
        "weights",
        "adapters",
        "huggingface", "llama2c", "gguf_weights",
        "tensors",
        "gguf",
        "words",
        "holdout",
        "labels",
        "tables",
        "delimited",
        "columns",
        "rows",
        "lines",
        "text",
        "new_folder",
        "files",
        "memory",
    )],
    ["config.parser", "config.run", "config.model", "config.words", "optimizer"],
    ["schedule", "fused", "data.prepare", "data.hub", "data.download"],
]
FOLDERS = ("commands", "training", "formats", "config", "data")
PLACE = {room: (floor, i) for floor, rooms in enumerate(FLOORS) for i, room in enumerate(rooms)}
WITHOUT_TORCH = [
    "run_llama", "config.parser", "schedule", "tokenizer", "formats.memory", "formats.files", "formats.labels",
    "formats.tables", "formats.holdout", "formats.lines",
    "formats.gguf", "data.prepare", "data.download", "data.hub", "training.logs",
    "training.run_folder", "training.streams",
    "training.signals", "training.course", "training.clock", "commands.report",
    "formats.words", "training.data_checks", "training.calibration", "training.mistakes", "commands.space"]
# What a room may import inside a function: a library that takes over 0.2 s, or one that only some systems have.
LATE = {"sklearn", "scipy", "matplotlib", "safetensors", "tokenizers", "sentencepiece", "gguf", "tqdm", "importlib",
        "optuna", "sqlalchemy", "jinja2", "markupsafe", "pyarrow", "tensorboardX", "wandb", "mlflow", "fcntl", "msvcrt",
        "resource", "huggingface_hub"}


def path_of(room: str) -> Path:
    return ROOT / f"{room.replace('.', '/')}.py"


def rooms_there() -> list[str]:
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files
                  if path.name != "__init__.py")


def imports(room: str) -> list[tuple[str, bool]]:
    """(module, is it inside a function?) of each import in a room; `from a import b` gives a.b where that is a room."""
    found = []

    def visit(node: ast.AST, is_late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((name.name, is_late) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{room}: a relative import"
                found.extend((f"{child.module}.{name.name}" if f"{child.module}.{name.name}" in PLACE else child.module,
                              is_late) for name in child.names)
            visit(child, is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path_of(room).read_text(encoding="utf-8")), False)
    return found


def test_every_room_has_its_place_and_every_place_its_room():
    assert rooms_there() == sorted(PLACE)


@pytest.mark.parametrize("room", sorted(PLACE))
def test_imports_run_down(room):
    """From a floor to a lower one, inside a folder from a file to one that stands behind it: so there is no circle."""
    floor, place = PLACE[room]
    for other, is_late in imports(room):
        if other in PLACE:
            its_floor, its_place = PLACE[other]
            together = room.partition(".")[0] == other.partition(".")[0] and "." in room
            assert its_floor > floor or (its_floor == floor and together and its_place > place), f"{room} -> {other}"
            assert not is_late, f"{room} imports {other} inside a function"


@pytest.mark.parametrize("room", sorted(PLACE))
def test_only_slow_libraries_are_imported_late(room):
    late = {module.partition(".")[0] for module, is_late in imports(room) if is_late}
    assert late <= LATE, f"{room} imports {late - LATE} inside a function"


def test_rooms_without_torch_import_none():
    """In one process, one after another: what one of them imports is there for all."""
    code = ("import importlib, sys\n"
            f"for room in {WITHOUT_TORCH}:\n    importlib.import_module(room)\n"
            "    assert 'torch' not in sys.modules, room\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", rooms_there() + [f"benchmarks.{path.stem}" for path in (
    ROOT / "benchmarks").glob("*.py")])
def test_no_room_is_longer_than_one_reads_in_one_go(room):
    assert len(path_of(room).read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("room", sorted(PLACE))
def test_no_loose_bags_and_one_import_by_name(room):
    text = path_of(room).read_text(encoding="utf-8")
    assert "SimpleNamespace" not in text
    assert ("import_module" in text) == (room == "run_llama")


def test_no_benchmark_has_the_name_of_a_room_or_changes_the_path():
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert path.stem not in PLACE and "sys.path" not in path.read_text(encoding="utf-8"), path.name


def test_every_command_of_the_parser_is_a_file_with_a_run():
    from config import COMMANDS

    for name in COMMANDS:
        assert re.search(r"^def run\(config: RunConfig\) -> int:$", path_of(f"commands.{name}").read_text(
            encoding="utf-8"), re.MULTILINE), name


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in PLACE:
        assert re.search(rf"\b{room.rpartition('.')[2]}\b", text), f"CONTRIBUTING.md does not name {room}"
