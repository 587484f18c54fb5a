"""--logger: what other programs read is what the JSONL files have, each step once; a logger that fails changes nothing.

The judge of TensorBoard's files is TensorBoard: its own reader, and what its HParams page is given.
"""

import csv
import json
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import main, own_folder, posix, stop_at  # noqa: F401 -- own_folder is used by all

from config import parse_args
from training import gradients, loggers, trainer
from training.logs import EpochRecord

OPTIONS = ["--option", "finetune", "--batch_size", "16", "--lr", "3e-3", "--epochs", "2", "--patience", "0", "--seed",
           "7", "--eval_every", "0.5", "--dropout", "0.1", "--device", "cpu", "--dtype", "float32"]


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory) -> Path:
    """The run without a logger."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert main(*OPTIONS, *inputs, "--output_dir", folder) == 0
    assert not (folder / "loggers").exists() and not [*folder.glob("*.csv")]
    return folder


@pytest.fixture(scope="module")
def logged(inputs, tmp_path_factory) -> Path:
    """The run with those loggers that need nothing more."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    assert main(*OPTIONS, *inputs, "--logger", "csv,tensorboard", "--output_dir", folder) == 0
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(run: Path) -> bytes:
    return (run / "best/model.safetensors").read_bytes()


def read_events(run: Path):
    """What TensorBoard sees of a run, all of it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="tensorboard, which reads the files, is not installed")
    found = accumulator.EventAccumulator(str(run / "loggers"), size_guidance=dict.fromkeys(
        ("scalars", "histograms", "tensors"), 0))
    return found.Reload()


def assert_scalars_are_the_lines(run: Path) -> None:
    """Every number of steps.jsonl and epochs.jsonl once, at its step, as float32; and no others."""
    found, expected = read_events(run), {}
    for group in ("steps", "epochs"):
        for row in lines(run / f"{group}.jsonl"):
            numbers = {k: v for k, v in row.items() if k not in ("step", "update_ratio")}
            numbers |= {f"update_ratio/{k}": v for k, v in (row.get("update_ratio") or {}).items()}
            for name, value in numbers.items():
                expected.setdefault(f"{group}/{name}", []).append((row["step"], float(np.float32(value))))
    seen = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
            if not tag.startswith("final/")}
    assert seen == expected and len(expected["steps/loss"]) == 12


def assert_tables_are_the_lines(run: Path) -> None:
    for group in ("steps", "epochs"):
        with open(run / f"{group}.csv", encoding="utf-8", newline="") as file:
            rows = [{k: json.loads(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        assert rows == lines(run / f"{group}.jsonl") and rows


# --------------------------------------------------------------------------- what is in them


def test_csv_and_tensorboard_have_the_numbers_of_the_jsonl(logged):
    assert_tables_are_the_lines(logged)
    assert_scalars_are_the_lines(logged)


def test_csv_alone_writes_no_events(inputs, tmp_path):
    assert main(*OPTIONS, *inputs, "--logger", "csv", "--epochs", "1", "--output_dir", tmp_path / "run") == 0
    assert_tables_are_the_lines(tmp_path / "run")
    assert not (tmp_path / "run/loggers").exists()


def test_the_histograms_are_of_every_evaluation(logged):
    found = read_events(logged)
    evaluations = [row["step"] for row in lines(logged / "epochs.jsonl")]
    groups = lines(logged / "epochs.jsonl")[-1]["update_ratio"]
    assert len(evaluations) == 4 and "llama.layers.1" in groups
    for group in groups:
        histograms = found.Histograms(f"gradients/{group}")
        assert [h.step for h in histograms] == evaluations
        assert all(h.histogram_value.num > 0 and sum(h.histogram_value.bucket) == h.histogram_value.num
                   for h in histograms)
    ratios = found.Histograms("update_ratio")
    assert [h.step for h in ratios] == [6, 12]
    assert ratios[-1].histogram_value.max == pytest.approx(max(groups.values()))


def test_the_gradients_that_are_taken_are_the_parameters_own():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    model(torch.randn(4, 300)).pow(2).sum().backward()
    before, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    found = gradients.sampled(model)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert {*found} == {"0", "1"} and len(found["1"]) == 603
    assert gradients.SAMPLE / 2 < len(found["0"]) - 200 <= gradients.SAMPLE < 60000
    assert np.isin(found["0"], torch.cat([g.flatten() for g in before[:2]]).numpy()).all()


def test_the_hparams_page_has_the_options_with_the_scores(logged):
    """Through the HParams plugin itself, as its page asks it."""
    pytest.importorskip("tensorboard", reason="tensorboard, which reads the files, is not installed")
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logged.parent))
    multiplexer.Reload()
    context = backend_context.Context(base_plugin.TBContext(data_provider=data_provider.MultiplexerDataProvider(
        multiplexer, str(logged.parent))))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    names = {metric.name.tag for metric in experiment.metric_infos}
    assert metadata and {"final/dev_acc", "final/test_f1"} <= names
    columns = [api_pb2.ColParams(metric=m.name, include_in_result=True) for m in experiment.metric_infos] + [
        api_pb2.ColParams(hparam=h.name, include_in_result=True) for h in experiment.hparam_infos]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, col_params=columns, allowed_statuses=[
        api_pb2.STATUS_SUCCESS])
    (group,) = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert [session.name for session in group.sessions] == [str(Path("run/loggers"))]
    assert (group.hparams["lr"].number_value, group.hparams["optimizer"].string_value) == (3e-3, "adamw")
    assert group.hparams["epochs"].number_value == 2 and not group.hparams["overwrite"].bool_value
    result = json.loads((logged / "result.json").read_text(encoding="utf-8"))
    seen = {value.name.tag: value.value for value in group.metric_values}
    for split in ("dev", "test"):
        for name in ("acc", "f1", "loss"):
            assert seen[f"final/{split}_{name}"] == pytest.approx(result[split][name], rel=1e-6)
    assert seen["final/best_epoch"] == pytest.approx(result["best_epoch"])


def test_the_mistakes_are_those_of_the_predictions(logged, inputs):
    (event,) = read_events(logged).Tensors("mistakes/dev/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    dev = Path(inputs[inputs.index("--dev") + 1]).read_text(encoding="utf-8").splitlines()
    predicted = (logged / "dev-predictions.txt").read_text(encoding="utf-8").splitlines()
    expected = {f"{guess.partition(' ||| ')[0]}, is {truth.partition(' ||| ')[0]}: {truth.partition(' ||| ')[2]}"
                for guess, truth in zip(predicted, dev, strict=True) if guess != truth}
    found = [line.removeprefix("    ").partition(" ") for line in text.splitlines()]
    assert expected and {rest for _, _, rest in found} == expected
    assert [p for p, _, _ in found] == sorted((p for p, _, _ in found), reverse=True)


# --------------------------------------------------------------------------- a run that goes on


@posix
def test_after_a_stop_in_mid_epoch_each_step_is_there_once(inputs, plain, tmp_path, monkeypatch):
    """Stopped in steps, behind the step that an evaluation follows, and in an evaluation."""
    stop_at(monkeypatch, steps=(2, 3, 7, 12), batches=(5,))
    code, stops = main(*OPTIONS, *inputs, "--logger", "csv,tensorboard", "--output_dir", tmp_path / "run"), 0
    while code == 143:
        code, stops = main("--resume", tmp_path / "run"), stops + 1
    assert (code, stops) == (0, 5)
    assert_tables_are_the_lines(tmp_path / "run")
    assert_scalars_are_the_lines(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(plain)


def test_steps_after_the_saved_state_are_not_there_twice(inputs, plain, tmp_path, monkeypatch):
    """A run that dies without a word has logged more than its state knows: an evaluation and a step too."""
    real = trainer.Loop.accumulate

    def die(self, rows):
        if self.progress.step == 8:
            raise SystemExit(9)
        return real(self, rows)

    folder, saves = tmp_path / "run", trainer.Loop.save
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Loop, "accumulate", die)
        patch.setattr(trainer.Loop, "save", lambda self, *a, **b: self.progress.step < 4 and saves(self, *a, **b))
        assert main(*OPTIONS, *inputs, "--logger", "csv,tensorboard", "--output_dir", folder) == 9
    assert [line["step"] for line in lines(folder / "steps.jsonl")][-1] == 8
    assert [e.step for e in read_events(folder).Scalars("epochs/dev_loss")] == [3, 6]
    assert main("--resume", folder) == 0
    assert_tables_are_the_lines(folder)
    assert_scalars_are_the_lines(folder)
    assert weights(folder) == weights(plain)


def test_what_a_rollback_undoes_is_not_there(inputs, tmp_path, capsys):
    """Of a learning rate that no model survives, taken down in the run itself."""
    folder = tmp_path / "run"
    assert main(*OPTIONS, *inputs, "--lr", "3", "--scheduler", "constant", "--dropout", "0", "--logger",
                "csv,tensorboard", "--output_dir", folder) in (0, 3)
    assert "rollback" in capsys.readouterr().err
    assert_tables_are_the_lines(folder)
    losses = [(e.step, e.value) for e in read_events(folder).Scalars("steps/loss")]
    assert losses == [(row["step"], float(np.float32(row["loss"]))) for row in lines(folder / "steps.jsonl")]


def test_a_longer_run_has_its_final_scores_once(inputs, tmp_path):
    folder = tmp_path / "run"
    assert main(*OPTIONS, *inputs, "--epochs", "1", "--keep_state", "--logger", "tensorboard", "--output_dir",
                folder) == 0
    assert main("--resume", folder, "--epochs", "2") == 0
    found = read_events(folder)
    assert [e.step for e in found.Scalars("final/dev_acc")] == [12]
    assert [e.step for e in found.Tensors("mistakes/dev/text_summary")] == [12]
    assert_scalars_are_the_lines(folder)


def test_each_run_of_a_series_has_its_own_and_overwrite_removes_them(inputs, tmp_path):
    folder, options = tmp_path / "runs", [*OPTIONS, *inputs, "--epochs", "1", "--output_dir", tmp_path / "runs"]
    assert main(*options, "--seeds", "2", "--logger", "csv,tensorboard") == 0
    for seed in (7, 8):
        assert_tables_are_the_lines(folder / f"seed-{seed}")
        assert len(read_events(folder / f"seed-{seed}").Scalars("steps/loss")) == 6
    assert main(*options) == 2
    assert main(*options, "--overwrite") == 0
    assert not [*folder.rglob("*.csv")] and not [*folder.rglob("loggers")]


def test_a_table_that_is_somebody_elses_stays(inputs, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "steps.csv").write_text("mine", encoding="utf-8")
    options = [*OPTIONS, *inputs, "--epochs", "1", "--output_dir", folder]
    assert main(*options, "--logger", "csv") == 2
    assert "steps.csv: there is such a file already" in capsys.readouterr().err
    assert main(*options) == 0 and main(*options, "--overwrite") == 0
    assert (folder / "steps.csv").read_text(encoding="utf-8") == "mine"


@posix
def test_a_link_in_the_loggers_folder_is_refused(logged, tmp_path, capsys):
    folder = shutil.copytree(logged, tmp_path / "run")
    (folder / "result.json").unlink()
    (folder / "loggers/mlflow.db").symlink_to(tmp_path / "elsewhere.db")
    assert main("--resume", folder) == 2
    assert "mlflow.db: this is a symbolic link" in capsys.readouterr().err


# --------------------------------------------------------------------------- one that fails


@pytest.mark.parametrize("name, owner, method", [
    ("csv", loggers.CsvTables, "write"), ("tensorboard", loggers.TensorBoard, "event"),
    ("tensorboard", loggers.TensorBoard, "flush"), ("tensorboard", loggers.TensorBoard, "finish"),
    ("csv", loggers.CsvTables, "start"), ("csv", loggers.CsvTables, "__init__")])
def test_a_logger_that_fails_is_switched_off_and_nothing_else_changes(inputs, plain, tmp_path, monkeypatch, capsys,
                                                                      name, owner, method):
    calls = []

    def fail(*arguments, **more):
        calls.append(method)
        raise OSError("no room\nand a second line")

    monkeypatch.setattr(owner, method, fail)
    capsys.readouterr()
    assert main(*OPTIONS, *inputs, "--logger", "csv,tensorboard", "--output_dir", tmp_path / "run") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--logger" in line]
    assert warnings == [f"warning: --logger {name}: OSError: no room; it is switched off, and the run goes on"]
    assert len(calls) == 1 and weights(tmp_path / "run") == weights(plain)
    without = [[{k: v for k, v in row.items() if k != "seconds"} for row in lines(run / "steps.jsonl")]
               for run in (tmp_path / "run", plain)]
    assert without[0] == without[1]
    if name == "csv":
        assert_scalars_are_the_lines(tmp_path / "run")
    else:
        assert_tables_are_the_lines(tmp_path / "run")


def test_with_loggers_the_run_is_the_same(logged, plain):
    assert weights(logged) == weights(plain)
    for name in ("dev-predictions.txt", "test-predictions.txt"):
        assert (logged / name).read_bytes() == (plain / name).read_bytes()


def test_numbers_that_are_not_finite_switch_nothing_off(tmp_path, capsys):
    from training.run_folder import RunFolder

    record = EpochRecord(epoch=0, step=1, train_loss=None, train_acc=0.5, dev_loss=float("nan"), dev_acc=1e300, lr=0.1,
                         seconds=1.0, update_ratio={"a": float("inf"), "b": 1e30})
    with loggers.Loggers(RunFolder(tmp_path), ("csv", "tensorboard")) as some:
        some.start()
        some.gradients = {"a": np.array([np.nan, 1.0], np.float32), "b": np.array([np.inf], np.float32)}
        some.write(record)
        assert {*some.active} == {"csv", "tensorboard"}
    assert not capsys.readouterr().err
    found = read_events(tmp_path)
    assert np.isnan(found.Scalars("epochs/dev_loss")[0].value) and "gradients/b" not in found.Tags()["histograms"]


# --------------------------------------------------------------------------- wandb and mlflow


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboardX")])
def test_what_is_not_installed_is_said_before_the_run(inputs, tmp_path, monkeypatch, capsys, name, package):
    monkeypatch.setattr(loggers, "find_spec", lambda asked: None if asked == package else find_spec(asked))
    assert main(*OPTIONS, *inputs, "--logger", f"csv,{name}", "--output_dir", tmp_path / "run") == 2
    assert f"--logger {name}: the package {package} is not installed; pip install {package}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("typed", ["tensorbord", "csv,,tensorboard", "csv tensorboard", ","])
def test_other_names_are_refused(typed, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--option", "finetune", "--logger", typed])
    assert end.value.code == 2 and "one of csv, tensorboard, wandb, mlflow" in capsys.readouterr().err


def wandb_rows(run: Path) -> list[dict]:
    """The history in the one offline file of a run: LevelDB's log format, with wandb's own records in it."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its other process, which writes the file, has ended afterwards
    (path,) = run.glob("loggers/wandb/offline-run-*/*.wandb")
    data, at, part, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, n, kind = struct.unpack("<IHB", data[at:at + 7])
        part, at = part + data[at + 7:at + 7 + n], at + 7 + n
        if kind in (1, 4):
            record, part = wandb_internal_pb2.Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                             for item in record.history.item})
    return rows


@posix
@needs("wandb")
def test_wandb_has_each_step_once_after_a_stop(inputs, plain, tmp_path, monkeypatch):
    stop_at(monkeypatch, steps=(2, 6))
    folder = tmp_path / "run"
    assert main(*OPTIONS, *inputs, "--logger", "wandb", "--output_dir", folder) == 143
    assert main("--resume", folder) == 143 and main("--resume", folder) == 0
    rows = wandb_rows(folder)
    for group in ("steps", "epochs"):
        seen = [(row["_step"], row[f"{group}/lr"]) for row in rows if f"{group}/lr" in row]
        assert seen == [(line["step"], line["lr"]) for line in lines(folder / f"{group}.jsonl")]
    assert weights(folder) == weights(plain) and not (tmp_path / "wandb").exists()


@posix
@needs("mlflow")
def test_mlflow_has_each_step_once_after_a_stop(inputs, plain, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    stop_at(monkeypatch, steps=(2, 6))
    folder = tmp_path / "run"
    assert main(*OPTIONS, *inputs, "--logger", "mlflow", "--output_dir", folder) == 143
    assert main("--resume", folder) == 143 and main("--resume", folder) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'loggers/mlflow.db').as_posix()}")
    (run,) = client.search_runs([client.get_experiment_by_name("minllama").experiment_id])
    for group in ("steps", "epochs"):
        seen = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"{group}/lr"))
        assert seen == [(line["step"], line["lr"]) for line in lines(folder / f"{group}.jsonl")]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert run.data.metrics["final/test_acc"] == result["test"]["acc"] and run.data.params["lr"] == "0.003"
    assert run.info.status == "FINISHED" and not (tmp_path / "mlruns").exists()
    assert weights(folder) == weights(plain)
