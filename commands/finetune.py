"""--option finetune: train on train, choose the best evaluation on dev, evaluate that one on dev and test."""

from commands import defaults, one_run, plan, results, resume, series
from commands import inputs as run_inputs
from commands import job as jobs
from config import RunConfig, no_effect
from training import clock, frozen, loggers, logs, run_folder
from training import device as devices
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    """One run, or those of --seeds or --folds, or what is left of a run that was stopped. Returns 3 where a run has
    diverged, else 0."""
    results.check_outputs(config)
    if config.resume:
        config = resume.resumed(config)
        results.check_outputs(config)
    else:
        loggers.check_installed(config)  # a run that goes on does so without one that is not there, and says so
    inputs = run_inputs.load(config, need=("train", "dev"))
    config = defaults.with_defaults(config, inputs)
    if config.pooling == "first" and config.attention == "causal":
        logs.warn("--pooling first with causal attention: the first token sees no other; add --attention "
                  "bidirectional, or pool the last")
    runs = series.runs_of(config, inputs)
    for one in runs:  # a schedule that cannot be is refused before anything is written
        jobs.schedule_of(one.config, one.inputs.steps_per_epoch(one.config))
    device = devices.choose_device(config)
    if config.plan:
        return plan.show(config, runs[0].config, runs[0].inputs, device, len(runs))
    if not config.resume:
        for line in no_effect(config):
            logs.warn(f"no effect: {line}")
        logs.notice(frozen.notice(config))
    if run_folder.asks_for_series(vars(config)):
        return series.repeat(config, inputs, runs, device)
    return series.exit_code(one_run.train(runs[0].config, runs[0].inputs, device, deadline=clock.deadline_of(config)))
