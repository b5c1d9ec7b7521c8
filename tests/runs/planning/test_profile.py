"""Profiles: operations told apart by their paths and contents, times that add up, and the command on a tiny config."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.__main__ import main
from iresnet_jax.runs.planning import profile
from iresnet_jax.runs.planning.operations import KINDS, PARTS, Operation, operations, part_of
from iresnet_jax.runs.planning.profile import Profile
from iresnet_jax.runs.planning.recording import Event, read_events, self_seconds, summarize

NORMS, FORWARD, LOGDET, BACKWARD, RANDOM, OPTIMIZER, DEVICES, OTHER = PARTS
CONVOLUTION, PRODUCT, ELEMENTWISE, COPY, REDUCTION, _, LOOP = KINDS


# --- operations -----------------------------------------------------------------------------------------------------

PATHS = {
    "jit(step)/shard_map/jvp(norms)/vmap()/while/body/dot_general": NORMS,
    "jit(step)/shard_map/transpose(jvp(norms))/mul": NORMS,
    "jit(step)/shard_map/jvp(jvp())/conv_general_dilated": FORWARD,
    "jit(step)/shard_map/jvp(log_determinant)/while/body/closed_call/transpose(jvp())/add": LOGDET,
    "jit(step)/shard_map/transpose(jvp(log_determinant))/jvp()/add": BACKWARD,
    "jit(step)/shard_map/transpose(jvp(while))/body/transpose": BACKWARD,
    "jit(step)/shard_map/jvp()/transpose": FORWARD,
    "jit(step)/shard_map/jvp(log_determinant)/vmap(random_signs)/and": RANDOM,
    "jit(step)/shard_map/vmap(jit(_threefry_fold_in))/while/body/xor": RANDOM,
    "jit(step)/shard_map/optimizer/add": OPTIMIZER,
    "jit(step)/shard_map/psum": DEVICES,
    "jit(step)/shard_map/mul": OTHER,
    "": OTHER,
}


@pytest.mark.parametrize("path", PATHS)
def test_parts_follow_from_paths(path):
    assert part_of(path) == PATHS[path]


TEXT = """HloModule jit_step, is_scheduled=true

%fused_convolution (p: f32[8,4,4,3]) -> f32[8,4,4,5] {
  %p = f32[8,4,4,3]{3,2,1,0} parameter(0)
  ROOT %convolution.1 = f32[8,4,4,5]{3,2,1,0} convolution(%p, %p), AT(jvp()/conv_general_dilated)
}

%fused_product (p.1: f32[8,3]) -> f32[8,8] {
  %p.1 = f32[8,3]{1,0} parameter(0)
  ROOT %convolution.2 = f32[8,8]{1,0} convolution(%p.1, %p.1), AT(jvp()/dot_general)
}

%fused_copy (p.2: f32[8,3]) -> f32[3,8] {
  %p.2 = f32[8,3]{1,0} parameter(0)
  ROOT %transpose.1 = f32[3,8]{1,0} transpose(%p.2), dimensions={1,0}
}

%fused_sum (p.3: f32[8,3]) -> f32[] {
  %p.3 = f32[8,3]{1,0} parameter(0)
  %mul.1 = f32[8,3]{1,0} multiply(%p.3, %p.3)
  ROOT %reduce.1 = f32[] reduce(%mul.1, %c), to_apply=%add
}

%body (p.4: (s32[], u32[4])) -> (s32[], u32[4]) {
  %p.4 = (s32[], u32[4]{0}) parameter(0)
  %gte.1 = u32[4]{0} get-tuple-element(%p.4), index=1
  %copy.1 = u32[4]{0} copy(%gte.1)
  ROOT %tuple.1 = (s32[], u32[4]{0}) tuple(%gte.1, %copy.1)
}

ENTRY %main (x: f32[8,3]) -> f32[8,3] {
  %x = f32[8,3]{1,0} parameter(0)
  %fusion.1 = f32[8,4,4,5]{3,2,1,0} fusion(%x), kind=kCustom, calls=%fused_convolution, AT(transpose(jvp())/conv)
  %fusion.2 = f32[8,8]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%fused_product, AT(jvp(log_determinant)/dot_general)
  %fusion.3 = f32[3,8]{1,0} fusion(%fusion.2), kind=kLoop, calls=%fused_copy
  %fusion.4 = f32[] fusion(%x), kind=kInput, calls=%fused_sum, AT(optimizer/reduce_sum)
  %add.1 = f32[8,3]{1,0} add(%x, %x), AT(jvp()/add)
  %gemm.1 = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", AT(jvp(norms)/dot_general)
  %while.1 = (s32[], /*index=1*/u32[4]{0}) while(%tuple), condition=%cond, body=%body, AT(jit(_threefry_fold_in)/while)
  ROOT %all-reduce.1 = f32[8,3]{1,0} all-reduce(%add.1), to_apply=%add
}
"""
PROGRAM = re.sub(r"AT\((.*)\)$", r'metadata={op_name="jit(step)/shard_map/\1"}', TEXT, flags=re.MULTILINE)
EXPECTED = {
    "fusion.1": ("f32[8,4,4,5]", BACKWARD, CONVOLUTION),
    "fusion.2": ("f32[8,8]", LOGDET, PRODUCT),  # of a TPU, which multiplies by convolutions
    "fusion.3": ("f32[3,8]", LOGDET, COPY),  # without a path: that of what it transposes
    "fusion.4": ("f32[]", OPTIMIZER, REDUCTION),
    "add.1": ("f32[8,3]", FORWARD, ELEMENTWISE),
    "gemm.1": ("(f32[8,8], s8[4])", NORMS, PRODUCT),
    "while.1": ("(s32[], u32[4])", RANDOM, LOOP),
    "copy.1": ("u32[4]", RANDOM, COPY),  # without a path: that of its loop
    "all-reduce.1": ("f32[8,3]", DEVICES, DEVICES),
}


def test_operations_are_read_from_a_program():
    found = operations(PROGRAM)
    assert {name: (found[name].shape, found[name].part, found[name].kind) for name in EXPECTED} == EXPECTED
    assert found["fusion.2"].place == (PRODUCT, "f32[8,8]", "jvp(log_determinant)/dot_general")


# --- times ----------------------------------------------------------------------------------------------------------


def test_operations_inside_others_are_subtracted_on_their_own_line_alone():
    events = [Event(0, "while", 0, 10), Event(0, "a", 1, 3), Event(0, "a", 4, 5), Event(0, "b", 5, 2), Event(0, "c", 10, 1)]
    events += [Event(1, "a", 2, 4)]
    assert self_seconds(events) == pytest.approx({"while": 2e-9, "a": (3 + 3 + 4) * 1e-9, "b": 2e-9, "c": 1e-9})


def test_times_are_means_over_steps_and_lanes():
    known = {name: Operation(name, "f32[2]", "jvp()/add", FORWARD, ELEMENTWISE) for name in ("add.1", "add.2")}
    events = [Event(0, "add.1", 100, 6), Event(0, "add.2", 110, 2), Event(1, "add.1", 104, 4), Event(1, "unknown", 112, 8)]
    made = summarize(events, known, num_steps=2, num_lanes=4, num_devices=2)
    assert made.seconds == pytest.approx(10e-9)
    known_ones, unknown = pytest.approx((1.5e-9, 0.75)), pytest.approx((1e-9, 0.25))
    assert made.by("part") == {FORWARD: known_ones, OTHER: unknown}
    assert made.by("kind") == {ELEMENTWISE: known_ones, LOOP: unknown}
    assert made.idle_share == pytest.approx(0.75)
    assert [(place[2], share.runs) for place, share in made.by("place").items()] == [("jvp()/add", 0.75), ("unknown", 0.25)]


def test_without_events_a_profile_says_so():
    assert summarize([], {}, num_steps=1, num_lanes=1, num_devices=1) is None
    made = Profile("1 x gpu", "1 device", 8, 0.5, 2e9, False, 8e9, "float32", None, runs.ROOT)
    assert made.share_of_peak == 0.5
    assert "no operations of these devices were recorded" in str(made)


def trace(**planes):
    """A trace by plane and line: ``[(name, statistics), ...]``, each event of 1 ns."""

    def event(name, stats):
        return SimpleNamespace(name=name, stats=stats.items(), start_ns=0.0, duration_ns=1.0)

    def plane(name, lines):
        made = [SimpleNamespace(name=line, events=[event(*each) for each in events]) for line, events in lines.items()]
        return SimpleNamespace(name=name, lines=made)

    return SimpleNamespace(planes=[plane(*each) for each in planes.items()])


TRACES = {
    "cpu": trace(
        **{
            "/host:CPU": {"a thread": [("add.1", {"hlo_op": "add.1"}), ("end: add.1", {}), ("Wait", {})]},
            "/device:CUSTOM": {"x": [("y", {})]},
        }
    ),
    "gpu": trace(
        **{
            "/host:CPU": {"a thread": [("launch", {"hlo_op": "add.1"})]},
            "/device:GPU:0": {"Stream #7(Compute)": [("loop_kernel", {"hlo_op": "add.1"})], "Steps": [("3", {})]},
        }
    ),
    "tpu": trace(**{"/device:TPU:0": {"XLA Modules": [("jit_step", {})], "XLA Ops": [("%add.1 = f32[2] add(%x)", {})]}}),
}


@pytest.mark.parametrize("backend", TRACES)
def test_operations_are_found_where_a_backend_records_them(backend):
    assert list(read_events(TRACES[backend], backend)) == [Event(0, "add.1", 0, 1)]


def test_the_peak_is_a_positive_speed():
    assert 0 < profile.matmul_peak(jnp.float32, 64) < 1e16


def test_a_batch_repeats_few_examples_and_is_of_placeholders_for_endless_data():
    assert profile.first_batch((np.arange(3), None), 4)[0].tolist() == [[0, 1], [2, 0]]
    assert profile.first_batch(None, 4).shape == (2, 2)


# --- the command ----------------------------------------------------------------------------------------------------


def config_file(folder, source=runs.DIGITS_CONFIG):
    path = folder / "config.py"
    path.write_text(source)
    return path


def test_the_command_prints_tables_that_add_up_and_writes_the_trace(tmp_path, capsys, monkeypatch):
    taken, take = [], profile.take
    monkeypatch.setattr(profile, "take", lambda *arguments: taken.append(take(*arguments)) or taken[0])
    for name, value in {"WARMUP": 1, "FEWEST": 3, "MOST": 3, "RECORDED": 2, "MATRIX_SIZE": {"cpu": 256}}.items():
        monkeypatch.setattr(profile, name, value)
    folder = tmp_path / "trace"
    command = ["profile", "--config", str(config_file(tmp_path)), "--config.logdet.num_terms=2", "--output", str(folder)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert list(folder.rglob("*.xplane.pb"))
    [made] = taken
    found = made.recording
    assert made.batch_size == 32
    assert 0 < made.share_of_peak <= 1
    of_parts, of_kinds = ({name: share.seconds for name, share in found.by(each).items()} for each in ("part", "kind"))
    assert found.busy_seconds == pytest.approx(sum(of_parts.values()))
    assert found.busy_seconds == pytest.approx(sum(of_kinds.values()))
    assert all(seconds >= 0 for seconds in [*of_parts.values(), *of_kinds.values()])
    assert all(of_parts[part] > 0 for part in PARTS if part != OTHER)
    assert of_parts.get(OTHER, 0) < 0.2 * found.busy_seconds
    assert of_kinds.get(CONVOLUTION, 0) + of_kinds.get(PRODUCT, 0) > 0
    assert "32 examples on 2 x cpu" in out
    assert out.endswith(f"trace: {folder}\n")
    for title in ("by part", "by kind of operation", "costliest operations", "idle"):
        assert f"\n{title} " in out


def test_mistakes_are_answered_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for option, sentence in (
        ("--config.training.batch_size=33", "multiple of 2 devices times 1 parts, got 33"),
        (f"--output={tmp_path / 'file'}", str(tmp_path / "file")),
    ):
        assert main(["profile", f"--config={config_file(tmp_path)}", option]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        [line] = err.splitlines()
        assert sentence in line
