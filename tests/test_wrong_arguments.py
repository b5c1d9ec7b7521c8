"""Wrong calls, and words of their refusals: a number would be wrong in silence, or work lost."""

import dataclasses
import functools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pandas as pd
import pytest
import test_conversion
from certified_flows import density, times
from PIL import Image

import iresnet_jax as ir
from iresnet_jax import data
from iresnet_jax.bijections.chain import Multiscale, Stage
from iresnet_jax.bijections.reshape import squeeze_bijection
from iresnet_jax.branches import kinds
from iresnet_jax.branches.branch import BranchSpec
from iresnet_jax.conversion import convert
from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import fraction_masks
from iresnet_jax.data.images import Contents, decoded, read_idx
from iresnet_jax.data.tables import describe
from iresnet_jax.estimators import ResidualFlowClassifier, ResidualFlowDensity
from iresnet_jax.maths import activations
from iresnet_jax.models.columns import Column, columns_of
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.runs import trained_run
from iresnet_jax.storage import path_of

RNG, KEY = np.random.default_rng(0), jax.random.key(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
LABELS = np.arange(60) % 2
STAGE = ir.StageSpec(1, (4,))
HALF = ir.StageSpec(1, (4,), factor_out=True)
KERNEL = jnp.ones((3, 3, 1, 1))
IMAGES, _ = kept.images(5)
PIXELS = np.zeros((20, 4, 4), np.uint8)
BOUNDED = dataclasses.replace(kept.POINTS, transform=ir.Bounded((-9.0, -np.inf), (9.0, np.inf)))
FREE = dataclasses.replace(kept.CLASSIFIER, constrained=False)
points, images, given, bounded = (
    functools.partial(kept.model, spec) for spec in (kept.POINTS, kept.IMAGES, kept.GIVEN, BOUNDED)
)
contraction = functools.partial(density, "lipswish")


def fit(x: Any = X, *arguments: Any, **options: Any) -> Any:
    return ir.fit(x, *arguments, **{"steps": 1, "progress": False} | options)


def init(x: Any = X, **settings: Any) -> Any:
    return ir.Density.init(KEY, x, stages=(STAGE,), **settings)


def flow(*stages, shape=(4, 4, 1)):
    return ir.FlowSpec(shape, stages)


def own(make):
    """The model of a branch that a function makes."""
    return kept.model(DensitySpec(flow(ir.StageSpec(1, branch=make), shape=(2,))))


class Own(BranchSpec):
    """A kind of which certificates know nothing."""

    def initial_weights(self, key, *, last_scale=1.0, sharpness=0.0):
        return {"scale": jnp.full((), 0.5 * last_scale)}

    def apply(self, weights, x, context):
        return weights["scale"] * jnp.sin(x)

    def lipschitz_bound(self, weights):
        return jnp.abs(weights["scale"])


def huge():
    """With scales that overflow."""
    block = contraction().weights["stage0"]
    log_scale = block.actnorm.log_scale + np.float32(650)
    actnorm = dataclasses.replace(block.actnorm, log_scale=log_scale)
    return contraction().with_(weights={"stage0": block._replace(actnorm=actnorm)})


def multiscale():
    return Multiscale([Stage(squeeze_bijection(2))], (2, 4, 2))


def arrays(x, *others, **options):
    return from_arrays("mine", Arrays(x, *others), **options)


def beside(column):
    """A table of two columns, of which this is the second."""
    columns = tuple(Column(name, "float64") for name in ("height", "age"))
    return arrays(np.stack([X[:, 0], column], axis=1), columns=columns)


def written(name, content):
    """A file in the folder of the test."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(text):
    return data.load(f"csv:{written('a.csv', text.encode())}")


def npz(**content):
    np.savez("a.npz", **content)
    return data.load("npz:a.npz")


def folder_of_images():
    for name, shape in (("train/a/0", (4, 4)), ("train/a/1", (4, 3)), ("test/a/0", (4, 4))):
        path = written(f"images/{name}.png", b"")
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    return data.load("folder:images")


def labelled(*labels):
    """Decoded images with these classes of four."""
    read = lambda split: ((f"image {i}", PIXELS[i], label) for i, label in enumerate(labels))  # noqa: E731
    contents = Contents({"train": 2, "test": 2}, 4, read)
    return decoded("x", Path(), [written("source", b"")], lambda: contents)


def bounds(**given):
    x = np.stack([X[:, 0], np.linspace(0, 1, 60, dtype=np.float32)], axis=1)
    return describe({"train": x}, ["rent", "rest"], bounds=given)


def frame(**columns):
    return columns_of(pd.DataFrame(columns))


def saved(change):
    """A model whose file is changed before it is read."""
    path = points().save("model.npz")
    content = change(dict(np.load(path)))
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    return ir.load(path)


def train(data, loss=lambda model, batch, key: -model.log_prob(batch).mean(), **options):
    return ir.train(points(), loss, data, key=0, steps=1, batch_size=4, progress=False, **options)


def toy(name, array):
    """A converted network of which one array is another one, or is missing."""
    network = test_conversion.network("toy")
    arrays = network.arrays | {name: array}
    return convert({key: own for key, own in arrays.items() if own is not None}, network.command)


def without(module, call):
    """A call where a module is not installed."""
    with mock.patch.dict(sys.modules, {module: None}):
        return call()


def run_without_training():
    points().save("model.npz")
    return trained_run.load("")


# What is called, in an empty folder, and a fragment of the sentence that answers it.
WRONG: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "key": [
        (lambda: fit(key=7), r"jax.random.key\(0\), got 7"),
        (lambda: fit(key=jax.random.split(KEY, (2, 2))), r"a key array of shape \(2, 2\)"),
        (lambda: points().sample(0, 3), "key must be a key"),
        (lambda: ir.SeriesLogdet()(jnp.tanh, X), "key must be a key"),
        (lambda: ir.SeriesLogdet()(jnp.tanh, X, jax.random.split(KEY, 3)), "for each of 60"),
    ],
    "settings of fit": [
        (lambda: fit(minutes=1), "not both"),
        (lambda: fit(lerning_rate=1), "unexpected keyword argument 'lerning_rate'"),
        (lambda: fit(learning_rate=-1), "learning_rate must lie in"),
        (lambda: fit(validation_fraction=0.999), "too few"),
        (lambda: fit(validation=X[:, :1]), "must agree in type and shape"),
        (lambda: fit(validation=(X, LABELS)), "in having no labels"),
        (lambda: fit(objective="classification"), "objective classification needs labels"),
        (lambda: fit(X, LABELS, context=X, objective="classification"), "and no contexts"),
    ],
    "data of fit": [
        (lambda: fit(X[:, 0]), r"x\[:, None\]"),
        (lambda: fit(X[:2]), "needs 10 rows or more, got 2"),
        (lambda: fit(X, np.zeros(3, int)), "labels must be 60"),
        (lambda: fit(X, LABELS * 2**32), "got 4294967296"),  # which int32 would make 0
    ],
    "estimators": [
        (lambda: ResidualFlowDensity(steps=1).fit(X[:, 0]), "1D array"),
        (lambda: ResidualFlowClassifier().fit(X, [None] * 30 + ["a"] * 30), "label"),
    ],
    "train": [
        (lambda: train((X, X[:3])), "equally many rows"),
        (lambda: train(X, validation=X * np.nan), "validation holds NaN"),
        (lambda: train((10**12 * (X > 0)).astype(np.int64)), "too large for int32"),
        (lambda: train(X, lambda model, x, key: jnp.square(x).mean()), "depend on the model"),
    ],
    "layers": [
        (lambda: ir.conv(jnp.ones((1, 4, 4, 1)), KERNEL, padding="VALID"), "one of SAME, CIRCULAR"),
        (lambda: activations.get("swish"), "one of clipswish, elu, .*, got 'swish'"),
        (lambda: activations.maxmin(jnp.zeros((2, 3))), "even number of them, got 3"),
        (
            lambda: activations.register_activation("elu", activations.ACTIVATIONS["tanh"]),
            "another activation 'elu' already",
        ),
        (
            lambda: activations.register_activation(
                "steep", activations.Activation(lambda x: jnp.sin(5 * x), slope_lipschitz=1.0)
            ),
            r"the slope of the activation 'steep' reaches (5|4\.9\d*)",
        ),
    ],
    "branches": [
        (lambda: ir.FlowSpec((2,), (STAGE,), coeff=1.0), r"coeff must lie in \(0, 1\), got 1.0"),
        (lambda: ir.FlowSpec((2,), (STAGE,), budget="all"), "budget must be layer or block"),
        (lambda: ir.StageSpec(1, (3,), kind="dens"), "kind must be one of feedforward"),
        (lambda: kinds.register("potential", Own), "there is a kind of branch 'potential' already"),
        (lambda: ir.FeedforwardSpec((4, 4, 1), (4,)), "branch of vectors has none; got examples"),
        (lambda: ir.FeedforwardSpec((4, 4, 1), (4,), (3,)), r"kernel_sizes=\(3,\) and hidden"),
        (lambda: kinds.get("potential")((4,), (4, 4)), "one hidden layer"),
        (lambda: kinds.get("sandwich")((4,), (4,), activation="maxmin"), "with slopes in"),
        (lambda: kinds.get("sandwich")((4, 4, 1), (4,), (3, 2)), "kernels of odd sizes"),
        (
            lambda: ir.Branch(ir.FeedforwardSpec((4,), (4,)), {})(X),
            r"bounds are for examples of shape \(4,\), got \(2,\)",
        ),
        (lambda: own(lambda key: jnp.tanh), "has no weights"),
        (
            lambda: own(lambda key: {"mask": np.random.default_rng().random(2)}),
            "differ from call to call",
        ),
    ],
    "flows": [
        (lambda: flow(ir.StageSpec(1, (4,), channel_order=(0, 0))), "each of its 1 channels once"),
        (lambda: flow(ir.StageSpec(1, (4,), squeeze=3)), "sides divisible by 3"),
        (lambda: flow(HALF, shape=(3,)), "squeeze before it"),
        (lambda: ir.ClassifierSpec(flow(HALF), (4, 4, 1), 3), "no stage may factor_out"),
        (lambda: multiscale().forward(jnp.zeros((2, 2, 4, 3))), "takes examples"),
        (lambda: multiscale().inverse(jnp.zeros((2, 21))), r"shape \(16,\)"),
    ],
    "transforms": [
        (lambda: ir.Standardize.fit(np.full((100, 1), 0.1)), "entry is constant"),
        (
            lambda: ir.Standardize((0.0,), (2.0,)).map(jnp.ones((2, 3))),
            r"for 1 entries, got .* \(2",
        ),
        (lambda: ir.Whiten((0.0, 0.0), ((1.0, 0.5), (0.0, 1.0))), "lower triangular"),
        (lambda: ir.Bounded([0.0, 1.0], 1.0), "must be below the upper one, got 1.0 and 1.0"),
        (lambda: ir.Bounded([1e6], [1e6 + 1.0]), "subtract their mean"),
        (lambda: init(X + np.array([0.0, 1e8])), "cannot tell the values of entry 1 of x"),
        (lambda: init(transform=ir.Logit(0.05)), "out of the range of their transform, Logit"),
        (lambda: init(transform=ir.Standardize((0.0,), (1.0,))), "Standardize has 1 entries"),
    ],
    "arguments of models": [
        (lambda: images().encode(IMAGES / 255), "undo the scaling"),
        (lambda: images().log_prob(IMAGES.astype(int) + 200), "got levels from"),
        (lambda: points().log_prob(X[:, :1]), r"takes floats of shape \(batch, 2\)"),
        (lambda: points().decode(np.zeros((2, 5, 3))), r"latents of shape \(2,\), got"),
        (lambda: bounded().log_prob(X + 10), "not within the range -9 to 9"),
        (lambda: given().encode(X), r"a context of shape \(batch, 3\), got none"),
        (lambda: images().sample_and_log_prob(KEY, 2), r"model\.continuous"),
        (lambda: points().sample(KEY, 2.5), r"num .*got 2.5: give a whole number"),
        (
            lambda: kept.model(kept.HYBRID).sample(KEY, 2, labels=jnp.array([0])),
            r"labels must be 2 integers, .* of shape \(1,\)",
        ),
        (lambda: points().with_(spec=DensitySpec(flow(STAGE, shape=(2,)))), "fit the new spec"),
        (lambda: kept.model(FREE).freeze(), "nothing to freeze"),
        (lambda: points().to_frame(X), "not fitted to a data frame"),
        (
            lambda: ir.evaluate_energy(points(), lambda x: jnp.log(x[:, 0]), KEY, 100),
            r"infinite at \d+ of 100 samples of the model",
        ),
    ],
    "certificates": [
        (lambda: ir.certify.inverse(times(contraction(), 3), X, X), "not certified to be"),
        (lambda: ir.certify.decode(times(contraction(), 3), X), "not certified to be"),
        (lambda: ir.certify.inverse(huge(), X, X), "log_scale is not within 600"),
        (lambda: ir.certify.decode(given(), X), "got none"),
        (lambda: ir.certify.decode(given(), X[:2], context=np.zeros((3, 3))), "shape mismatch"),
        (lambda: ir.certify.decode(own(Own), X), "which certificates cannot follow"),
    ],
    "files of models": [
        (lambda: times(points(), np.inf).save("nowhere.npz"), "numbers that are not finite"),
        (
            lambda: saved(
                lambda content: {name: content[name] for name in {*content} - {"header"}}
            ),
            "or is damaged: .*header",
        ),
        (
            lambda: saved(lambda content: content | {"header": np.frombuffer(b"{}", np.uint8)}),
            "has the format None, not 2",
        ),
        (
            lambda: saved(
                lambda content: {
                    name: part[..., :3] if name.endswith("dense0/kernel") else part
                    for name, part in content.items()
                }
            ),
            r"dense0/kernel in it is \(2, 2, 3\)",
        ),
        (
            lambda: saved(lambda _: Path("model.npz").read_bytes()[:999]),
            r"model\.npz .* is damaged",
        ),
        (run_without_training, "says nothing of a training"),
        (lambda: path_of("s3://bucket//run"), "has an empty name in it"),
    ],
    "arrays": [
        (lambda: beside(1e6 + X[:, 1]), "column 'age' apart: subtract its mean"),
        (lambda: arrays(X, None, 1.7e9 + 5 * np.float64(X[:, 0])), "entry 0 of the context apart"),
        (lambda: beside(np.where(np.arange(60) == 3, 1e300, np.float64(X[:, 0]))), "too large"),
        (
            lambda: arrays(np.where(np.arange(120).reshape(60, 2) == 7, np.nan, X)),
            "row 3, column 1",
        ),
        (lambda: arrays(200 + PIXELS[..., None].astype(int) * 0 + 100), "levels 0 to 255"),
        (lambda: arrays(np.zeros((40, 4, 4, 1))), "channel 0 of the images has 1 different values"),
        (lambda: arrays(X, np.full(60, 0.5)), "integers from 0 on"),
        (lambda: arrays(X, None, np.zeros((3, 2))), "each of 60"),
        (
            lambda: from_arrays("mine", {"train": Arrays(X), "test": Arrays(X[:, :1])}),
            "must agree in type and shape",
        ),
        (lambda: data.conditioned_on_labels(arrays(X)), "no labels"),
        (lambda: data.padded(arrays(X), 2, 3), "are for images"),
        (lambda: fraction_masks(30, (0.6, 0.5)), "30 examples are too few"),
    ],
    "columns": [
        (lambda: frame(**{"height": [1.0, np.nan]}), "'height' has 1 missing values, .* in row 1"),
        (lambda: frame(name=["Ada", "Bo", "Cy"]), "'name' occur once, as names do"),
        (lambda: columns_of(pd.DataFrame([[1, 2]], columns=["a", "a"])), "two columns are called"),
        (lambda: bounds(rset=(0, 1)), "columns 'rent', 'rest', by name or number, got 'rset'"),
        (lambda: bounds(rest=(1, 0)), "two rising numbers"),
        (lambda: bounds(rest=(0.0, 0.5)), r"'rest', is outside of its bounds 0 and 0.5"),
        (lambda: bounds(rest=(-1e9, 1e9)), "cannot tell the values of column 'rest' apart"),
    ],
    "files of data": [
        (lambda: table("a,b\n1,2\n3,\n"), "string '' to float64 at row 1, column 2"),
        (lambda: table("1,2\n3,nan\n" * 9), "the data holds NaN"),
        (lambda: table("0,1\n0.5,2\n1,3\n"), "first line of .* numbers the columns"),
        (
            lambda: read_idx(written("a", bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0]))),
            "no IDX file",
        ),
        (folder_of_images, r"1\.png has uint8 pixels"),
        (lambda: npz(x_train=PIXELS, contexts_train=PIXELS), "holds contexts_train, which nothing"),
        # a pickle, which could run anything
        (lambda: npz(x_train=np.array([{"code": 1}])), "Object arrays cannot be loaded"),
        (lambda: data.load("h5:/a/b"), "unknown data set 'h5:/a/b': .*digits, mnist.*moons.*idx:"),
        (lambda: labelled(0, -1), "has the class -1, and classes of x lie in 0 to 3"),
        (lambda: labelled(0), "shorter"),
    ],
    "conversion": [
        (lambda: convert({}, "train_img.py --block coupling"), "invalid choice: 'coupling'"),
        (lambda: convert({}, "CIFAR_main.py -densityEstimation --inj_pad 4"), "--inj_pad"),
        (lambda: toy("chain.1.nnet.1.bias", None), r"1\.bias .*of shape \(5,\), got none"),
        (lambda: toy("chain.0.bias", np.zeros(3)), r"of shape \(2,\), got float64 of shape \(3,\)"),
        (lambda: toy("chain.1.nnet.1.weight", np.full((5, 2), np.nan)), "must be finite numbers"),
        (lambda: toy("chain.9.extra", np.zeros(2)), "are no arrays of train_toy.py"),
        (lambda: convert({}, "main.py --lr 1"), "CIFAR_main.py, train_img.py, train_toy.py"),
        (lambda: convert(written("a.pth", pickle.dumps({})), "train_toy.py"), "pickle"),
    ],
    "packages": [
        (
            lambda: without("gcsfs", lambda: ir.load("gs://bucket/model.npz")),
            r"for gs:// pip install 'iresnet_jax\[gcs\]'",
        ),
        (
            lambda: without("iresnet_jax.energies", lambda: ir.fit_energy),
            r"fit_energy needs .*: pip install 'iresnet_jax\[energies\]'$",
        ),
    ],
}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(*case, id=f"{argument} {number}")
        for argument, cases in WRONG.items()
        for number, case in enumerate(cases)
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_a_wrong_argument_is_refused_in_a_sentence(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises((ValueError, TypeError, ModuleNotFoundError), match=sentence):
        call()
    assert not list(tmp_path.glob("cache/decoded*"))


@pytest.mark.usefixtures("unchecked_annotations")
def test_lists_are_taken_for_tuples_and_arrays():
    assert hash(ir.FlowSpec([2], [STAGE])) == hash(ir.FlowSpec((2,), (STAGE,)))
    own = kept.model(kept.HYBRID).continuous
    by_array = own.sample_and_log_prob(KEY, 2, labels=jnp.array([1, 0]))
    by_list = own.sample_and_log_prob(KEY, 2, labels=[1, 0])
    np.testing.assert_array_equal(by_list.log_prob, by_array.log_prob)
