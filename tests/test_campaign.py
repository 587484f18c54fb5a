"""The short form of the campaign of faults in tests/campaign/: some cases of each script, through the same functions.

The long form is started by hand, see docs/reliability.md.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "campaign"))
import command_lines  # noqa: E402
import common  # noqa: E402
import flips  # noqa: E402
import full_disk  # noqa: E402
import hostile  # noqa: E402
import kills  # noqa: E402

pytestmark = pytest.mark.skipif(not common.CAN_FORK, reason="a process for each case is slow where there is no fork")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    common.import_program()
    return common.Sandbox(tmp_path_factory.mktemp("campaign") / "sandbox", n_train=32)


@pytest.mark.parametrize("script, cases", [
    (kills, (0, 3, 4, 21)),
    (full_disk, (0, 5, 10)),
    (flips, (4, 11, 16)),
    (hostile, (2, 11, 13, 17, 18)),
    (command_lines, (0, 1, 2, 3, 4, 5, 6, 7)),
], ids=lambda value: getattr(value, "__name__", ""))
def test_the_short_form_of_the_campaign(sandbox, script, cases):
    tally = common.Tally(script.__name__, seed=0)
    script.run(tally, cases, sandbox)
    assert not tally.failures, "\n".join(tally.failures)


# --------------------------------------------------------------------------- the campaign sees what it is to see


def call(sandbox, argv, place, **more):
    return common.call(argv, place, allowed=[place / "run"], **more)


def test_the_campaign_notices_a_write_outside_a_traceback_and_an_endless_case(sandbox, monkeypatch):
    from commands import generate  # imported here already, so that the forked case has the one that is exchanged

    def traceback(config):
        return {}[config.option]

    def outside(config):
        Path("../outside.txt").write_text("x", encoding="utf-8")
        return 0

    def endless(config):
        while True:
            pass

    seen = []
    for bad, timeout in ((traceback, 60), (outside, 60), (endless, 1)):
        monkeypatch.setattr(generate, "run", bad)
        place = sandbox.fresh()
        seen.append(call(sandbox, ["--option", "generate"], place, timeout=timeout).faults())
    assert "a traceback: KeyError" in seen[0][0] and seen[1][0].startswith("a write outside: open")
    assert seen[2] == ["no end within 1 s"]


def test_the_campaign_notices_another_end_and_half_a_file(sandbox):
    import shutil

    straight = sandbox.done()
    run = sandbox.fresh() / "run"
    shutil.copytree(straight, run)
    assert common.differences(run, straight) == [] == common.half_written(run)
    for name in ("steps.jsonl", "best/model.safetensors", "dev-predictions.txt", "result.json"):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: len(data) // 2])
        assert common.differences(run, straight) == [name]
        assert name == "steps.jsonl" or len(common.half_written(run)) == 1
        (run / name).write_bytes(data)
    (next((run / "last").iterdir()) / "tensors.safetensors").unlink()
    assert common.differences(run, straight) == ["last/ (0 states)"]
