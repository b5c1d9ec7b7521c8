"""Mistakes in a config file or on the command line are one sentence; nothing is written."""

from pathlib import Path

import pytest
import tiny_runs as runs
from tiny_runs import ROOT

from iresnet_jax.runs import job
from iresnet_jax.runs.config import parse_train_flags


@pytest.fixture(scope="module")
def config_files(tmp_path_factory):
    """A config file for each of `runs.CONFIGS`."""
    folder = tmp_path_factory.mktemp("configs")
    for name, source in runs.CONFIGS.items():
        (folder / f"{name}.py").write_text(source)
    return {name: folder / f"{name}.py" for name in runs.CONFIGS}


@pytest.fixture
def answer(capsys, tmp_path):
    """The one line on stderr of a command that fails."""

    def run(*arguments, workdir=None):
        workdir = tmp_path / "new" if workdir is None else workdir
        existed = workdir.exists()
        status = runs.train_main(f"--workdir={workdir}", *arguments)
        out, err = capsys.readouterr()
        *_, line = err.rstrip().splitlines()
        assert (status, out) == (2, "")
        assert line.startswith("error: ")
        assert "Traceback" not in err
        assert workdir.exists() == existed, "a mistake must not claim a workdir"
        return line

    return run


# config, overrides, and a fragment of the answer
MISTAKES = [
    # settings by themselves
    ("toy", "trainig.batch_size=3", "no config.trainig.batch_size: did you mean 'training'?"),
    ("toy", "model.stages[0].num_block=2", "stages[0].num_block: did you mean 'num_blocks'?"),
    ("toy", "training.batch_size=abc", "config.training.batch_size: Input should be a valid int"),
    ("toy", "model.coeff=1.5", "config.model.coeff: must lie in (0, 1), got 1.5"),
    ("toy", "model.stages[0].kind=magic", "config.model.stages[0]: kind must be one of feedfor"),
    # settings that do not fit together
    ("toy", "classifier.mean=(0.2,)", "settings config.classifier are for classification and hyb"),
    ("toy", "constraint.norms=none", "a density needs contractions"),
    ("classifier", "classifier.margin=1.0", "needs config.classifier.head = linear"),
    # settings that do not fit the data or the devices
    ("toy", "training.batch_size=15", "multiple of 2 devices times 1 parts, got 15"),
    ("hybrid", "training.batch_size=2000", "must be at most 1257, the training examples"),
    ("toy", "preprocessing.transform=logit", "is for data with grey levels"),
    ("toy", "augmentation.noise=0.1", "noise is for densities of arrays"),
    ("toy", "training.initial_model=nowhere", "No such file or directory: 'nowhere'"),
]


@pytest.mark.parametrize(("name", "override", "fragment"), MISTAKES)
def test_mistakes_are_answered_in_one_sentence(config_files, answer, name, override, fragment):
    assert fragment in answer(f"--config={config_files[name]}", f"--config.{override}")


def test_mistakes_in_other_flags_are_answered_in_one_sentence(config_files, answer):
    config = f"--config={config_files['toy']}"
    assert "worcdir" in answer(config, "--worcdir=x")
    assert "Protocol not known: nosuch" in answer(config, "--workdir=nosuch://bucket/run")


@pytest.mark.parametrize(
    ("program", "fragment"),
    [
        (None, "No such file or directory"),
        (b"def get_config(:", "invalid syntax (wrong.py, line 1)"),
        (b"def get_config(name):\n    raise ValueError(f'{name} is none of a and b')", "c is none"),
    ],
)
def test_a_config_file_that_fails_is_answered_in_one_sentence(answer, tmp_path, program, fragment):
    wrong = tmp_path / "wrong.py"
    if program is not None:
        wrong.write_bytes(program)
    found = answer(f"--config={wrong}" + (":c" if b"(name)" in (program or b"") else ""))
    assert f"the config file {wrong} fails: " in found
    assert fragment in found


def test_failures_of_a_run_are_sentences_unless_debugging_and_bugs_are_not(
    config_files, answer, tmp_path, monkeypatch
):
    def fail(error):
        def train(config, workdir):
            raise error

        monkeypatch.setattr(job, "train", train)

    arguments = [f"--config={config_files['toy']}", f"--workdir={tmp_path}"]
    fail(RuntimeError("nll became non-finite;\n lower the learning rate"))
    assert answer(*arguments) == "error: nll became non-finite; lower the learning rate"
    with pytest.raises(RuntimeError, match="non-finite"):
        runs.train_main(*arguments, "--debug")
    fail(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        runs.train_main(*arguments)


def test_flags_override_fields_and_name_the_workdir_after_the_config(config_files, monkeypatch):
    arguments = [
        f"--config={config_files['toy']}",
        "--config.seed=3",
        "--config.model.stages[0].hidden=(4,)",
    ]
    flags = parse_train_flags(["train.py", *arguments, "--config.training.total_steps=1e3"])
    assert flags.config.training.total_steps == 1000
    assert (flags.config.seed, flags.config.model.stages[0].hidden, flags.debug) == (3, (4,), False)
    arguments.append("--config.model.stages[0].actnorm=false")  # which the file does not mention
    assert not parse_train_flags(["train.py", *arguments]).config.model.stages[0].actnorm
    assert flags.workdir == Path("runs/toy")
    group = parse_train_flags(
        ["train.py", *arguments, "--config.training={'total_steps': 30}"]
    ).config.training
    assert (group.total_steps, group.batch_size) == (30, 16)  # which the file has set
    monkeypatch.chdir(ROOT)
    flags = parse_train_flags(["train.py", "--debug"])
    assert (flags.workdir, flags.debug) == (Path("runs/digits_density"), True)
    assert parse_train_flags(["train.py", "--config=configs/toy_2d.py:moons"]).workdir == Path(
        "runs/toy_2d_moons"
    )


# --- the folder of a run --------------------------------------------------------------------------
