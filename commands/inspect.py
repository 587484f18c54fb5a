"""--option inspect: what is wrong with data, before anything is trained on them, or with a finished run (--run).

    python run_llama.py --option inspect --train train.txt --dev dev.txt
    python run_llama.py --option inspect --run runs/finetune-10-1e-05

As text, and as inspect.md and inspect.json in --output_dir: in the run's folder, or for data in runs/inspect, which the
next inspection replaces.
"""

from pathlib import Path

from commands import inspect_data, inspect_pages, inspect_run
from config import RunConfig, no_effect
from formats import files
from training import logs
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    for line in no_effect(config):
        logs.warn(f"no effect: {line}")
    if not config.run:
        sections = inspect_data.sections_of(config)
        folder, values, title = Path(config.output_dir or Path("runs") / "inspect"), {}, "Data"
    else:
        found = inspect_run.inspected(config)
        sections, title = found.sections, f"Run {config.run[0]}"
        folder, values = Path(config.output_dir or found.home), {"card": found.card, "best": found.best}
    for name in inspect_pages.NAMES:
        files.check_writable(folder / name, "--output_dir")
    inspect_pages.tell(sections)
    inspect_pages.write(folder, title, sections, values)
    return 0
