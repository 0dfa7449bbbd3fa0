"""Bad input: each message names the thing, what was expected, and the remedy."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.analysis.purposes import each_once
from fisherlab.statistics.fishers import require_kinds
from tests import cases
from tests.cases import normal

X, Y = normal(4, 3), torch.tensor([0, 1, 1, 0])
NESTED = torch.nested.nested_tensor([X, X], layout=torch.jagged)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls it a prototype
    MASKED = [torch.masked.masked_tensor(t, t > 0) for t in (X, Y)]


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[1] = float("nan")
    return tensor


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.map(x), x


class Pooled(Several):
    def forward(self, x):
        return self.map(x).mean(0)


class Transposed(Several):
    def forward(self, x):
        return self.map(x).T


BAD_DATA = {
    "nan in x": ((with_nan(X), Y), "x holds NaN or infinity in 1 of 4"),
    "infinity in x": ((X * math.inf, Y), "x holds NaN or infinity in 4 of 4"),
    "squares that overflow": ((X / X.abs().max() * 1e160, Y), "up to 1e\\+160.*squares"),
    "empty batch": ((X[:0], Y[:0]), "a batch is empty"),
    "no batch": ([], "no example was given"),
    "lengths": ((X, Y[:3]), r"axis 0 is the example.*\[4, 3\]"),
    "a triple": ((X, Y, Y), "pair"),
    "not pairs": ([X, X], "pair"),
    "sparse x": ((X.to_sparse(), Y), "a sparse tensor was given; dense.*to_dense"),
    "sparse y": ((X, Y.to_sparse()), "a sparse tensor was given"),
    "meta x": (({"a": X, "b": X.to("meta")}, Y), "a meta tensor was given"),
    "nested x": ((NESTED, Y[:2]), "a nested tensor was given"),
    "masked x": (({"a": X, "b": MASKED[0]}, Y), "a masked tensor was.*to_tensor"),
    "masked y": ((X, MASKED[1]), "a masked tensor was given"),
    "labels as a list": ((X, [0, 1, 1, 0]), "y must be a tensor.*list"),
}


@pytest.mark.parametrize("which", BAD_DATA)
@pytest.mark.parametrize("call", [fl.collect, fl.mean_gradient])
def test_bad_data(which, call):
    data, message = BAD_DATA[which]
    with pytest.raises(ValueError, match=message):
        call(model(), data, fl.Categorical())


def test_data_that_cannot_be_iterated():
    for data in (X, 3):
        with pytest.raises(TypeError, match=r"tuple \(x, y\).*\(x, None\)"):
            fl.collect(model(), data, fl.Categorical())


BAD_LABELS = {
    "too large": (fl.Categorical(), Y + 1, "run from 1 to 2.*2 classes"),
    "negative": (fl.Categorical(), Y - 1, "run from -1 to 0"),
    "real classes": (fl.Categorical(), Y.double(), "torch.float64.*integers"),
    "class vectors": (fl.Categorical(), normal(4, 2).long(), r"\(4, 2\).*\(4,\)"),
    "above one": (fl.Bernoulli(), normal(4, 2).abs() + 1, r"\[0, 1\]"),
    "below zero": (fl.Bernoulli(), -torch.ones(4, 2), "run from -1 to -1"),
    "bernoulli shape": (fl.Bernoulli(), torch.ones(4, 3), r"\(4, 3\).*\(4, 2\)"),
    "gaussian shape": (fl.Gaussian(), torch.ones(4), r"\(4,\).*\(4, 2\)"),
    "infinite": (fl.Gaussian(), torch.full((4, 2), math.inf), "8 of 8 are infinite"),
    "complex": (fl.Gaussian(), torch.ones(4, 2) * 1j, "finite real.*complex"),
}


@pytest.mark.parametrize("which", BAD_LABELS)
@pytest.mark.parametrize("fisher", cases.FISHERS)
def test_bad_labels(which, fisher):
    likelihood, y, message = BAD_LABELS[which]
    with pytest.raises(ValueError, match=message):
        fl.collect(model(), (X, y), likelihood, cases.FISHERS[fisher])
    with pytest.raises(ValueError, match=message):
        fl.mean_gradient(model(), (X, y), likelihood)


def test_missing_labels_where_they_are_needed():
    with pytest.raises(ValueError, match=r"Empirical\(\) needs.*y is None"):
        fl.collect(model(), (X, None), fl.Categorical(), fl.Empirical())
    with pytest.raises(ValueError, match="needs the data's labels"):
        fl.mean_gradient(model(), (X, None), fl.Categorical())


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match=r"one class.*Bernoulli\(\)"):
        fl.collect(nn.Linear(3, 1).double(), (X, None), fl.Categorical())


@pytest.mark.parametrize("layers", [["3"], "head", ["0", "1"], []])
def test_unknown_layers_list_the_known(layers):
    with pytest.raises(ValueError, match=r"layers: .*known blocks: 0, 2"):
        fl.collect(model(), (X, Y), fl.Categorical(), layers=layers)


def test_nan_in_the_weights_names_the_parameter():
    broken = model()
    with torch.no_grad():
        broken[2].bias[1] = float("nan")
    for call in (fl.collect, fl.mean_gradient):
        with pytest.raises(ValueError, match=r"'2\.bias' holds NaN"):
            call(broken, (X, Y), fl.Categorical())


def test_an_overflow_inside_the_model_is_named():
    broken = model()
    with torch.no_grad():  # four hidden units of one sign: their sum of 4e308 is infinite
        broken[0].weight.fill_(1.0)
        broken[0].bias.zero_()
        broken[2].weight.fill_(1e308)
    with pytest.raises(fl.NumericalError, match="output holds NaN or infinity"):
        fl.collect(broken, (X * 1e3, Y), fl.Categorical())


BAD_MODELS = {
    "batch norm in train mode": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(),
        r"couple.*'1'.*frozen\(model\)",
    ),
    "batch norm without running means": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
        .double()
        .eval(),
        "couple.*'1'.*track_running_stats",
    ),
    "active dropout": (
        nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.3)).double(),
        r"Dropout.*'1'.*frozen\(model\)",
    ),
    "a tuple": (Several(), "returns tuple.*one tensor"),
    "examples averaged": (Pooled(), "axis 0|the examples beside it"),
    "examples last": (Transposed(), "axis 0|the examples beside it"),
    "no parameters": (nn.Tanh(), "no parameters"),
    "nothing trainable": (
        nn.Linear(3, 2).double().requires_grad_(False),
        "trainable|require",
    ),
}


@pytest.mark.parametrize("which", BAD_MODELS)
def test_models_that_would_have_to_be_guessed_about(which):
    broken, message = BAD_MODELS[which]
    with pytest.raises(fl.UnsupportedModelError, match=message):
        fl.collect(broken, (X, None), fl.Categorical())


def test_inactive_dropout_is_no_dropout():
    linear = nn.Linear(3, 2).double()
    quiet = nn.Sequential(linear, nn.Dropout(0.0))
    found = fl.collect(quiet, (X, Y), fl.Categorical())["0"]
    plain = fl.collect(linear, (X, Y), fl.Categorical())["weight"]
    torch.testing.assert_close(found.gradients, plain.gradients)


def test_a_budget_that_is_too_small_names_bytes_and_remedy():
    with pytest.raises(fl.BudgetError, match=r"bytes.*more than the budget of 300 B"):
        fl.collect(model(), (X, Y), fl.Categorical(), budget=300)
    with pytest.raises(ValueError, match="not understood"):
        fl.collect(model(), (X, Y), fl.Categorical(), budget="a lot")
    with pytest.raises(ValueError, match="chunk_size=0"):
        fl.collect(model(), (X, Y), fl.Categorical(), chunk_size=0)


def test_packing_names_what_is_missing():
    stats = fl.collect(model(), (X, Y), fl.Categorical())["0"]
    with pytest.raises(ValueError, match=r"0\.bias.*not given.*0\.weight"):
        stats.pack({"0.weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(\.\.\., 4, 4\)"):
        stats.unpack(torch.zeros(3, 4))


def test_errors_are_caught_by_the_usual_names():
    assert issubclass(fl.DataError, ValueError)
    assert issubclass(fl.UnsupportedModelError, ValueError)
    assert issubclass(fl.BudgetError, MemoryError)
    assert issubclass(fl.NeedsSharedForm, TypeError)
    assert issubclass(fl.IndefiniteError, fl.NumericalError)
    assert all(
        issubclass(getattr(fl, name), fl.FisherlabError)
        for name in fl._NAMES
        if name.endswith(("Error", "Form"))
    )


def test_one_pass_data_is_refused_by_methods_of_two_passes():
    pairs = iter([(X, Y)])
    with pytest.raises(ValueError, match=r"no example|iterat|pass"):
        fl.approximate(model(), pairs, fl.Categorical(), ["ekfac"])


@pytest.mark.parametrize("wrong", ["categorical", fl.Categorical, None])
def test_names_and_classes_in_place_of_a_likelihood_are_refused(wrong):
    with pytest.raises(
        TypeError, match=r"likelihood=.*such as fl\.Categorical\(\) for cross"
    ):
        require_kinds(wrong, None)
    for fisher in ("exact", fl.Exact):
        with pytest.raises(TypeError, match=r"fisher=.*fl\.Exact\(\) is expected"):
            require_kinds(fl.Categorical(), fisher)


@pytest.mark.parametrize("call", [fl.collect, fl.mean_gradient, fl.estimate])
def test_a_model_whose_parameters_are_all_frozen_is_refused(call):
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    data = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(fl.UnsupportedModelError, match="no trainable parameters"):
        call(model, data, fl.Categorical())


@pytest.mark.parametrize("wrong", [fl.KFAC, [fl.KFAC], {"mine": fl.KFAC}])
def test_a_class_in_place_of_a_method_is_refused(wrong):
    stats = fl.collect(model(), (X, Y), fl.Categorical())
    with pytest.raises(TypeError, match=r"the class KFAC was given.*fl\.KFAC\(\)"):
        fl.compare(stats, wrong)


@pytest.mark.parametrize("wrong", ["laplace", [fl.Laplace], [fl.Sharpness(), "step"]])
def test_what_is_no_purpose_is_refused(wrong):
    with pytest.raises(TypeError, match=r"purpose=.*: a value is expected, of fl\.Step"):
        each_once(wrong)


def test_misspelt_names_of_the_package_are_answered_by_the_nearest():
    with pytest.raises(AttributeError) as caught:
        fl.compair
    assert (caught.value.name, caught.value.obj) == ("compair", fl)
    with pytest.raises(ValueError, match=r"Did you mean 'kpsvd'\?"):
        fl.compare(fl.collect(model(), (X, Y), fl.Categorical()), ["KPSVD"])


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(3, 2))


def meta():
    return nn.Linear(3, 2, device="meta")


def quantised():
    """Return a model whose linear maps are integers and whose norms have parameters."""
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})


class Mixed(nn.Module):
    """A layer in float32 and one in float64, which asks for its precision itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).float(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.last(self.first(x).double())


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: fl.blocks(scripted()), None, "TorchScript"),
        (lambda: fl.collect(meta(), (X, Y), fl.Categorical()), None, "no numbers yet"),
        (
            lambda: fl.collect(nn.LazyLinear(2), (X, Y), fl.Categorical()),
            None,
            "no numbers",
        ),
        (
            lambda: fl.collect(model(), (X, Y), fl.Categorical(), dtype=torch.int32),
            TypeError,
            "dtype=torch.int32: None or a real one",
        ),
    ],
)
def test_what_is_no_model_or_no_number_is_refused_in_a_sentence(call, kind, words):
    with pytest.raises(kind or fl.UnsupportedModelError, match=words):
        call()


def test_parameters_of_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        net = model()
    with pytest.raises(fl.UnsupportedModelError, match=r"'0.weight' was made in torch.inf"):
        fl.collect(net, (X, Y), fl.Categorical())


@pytest.mark.parametrize(
    "door",
    [
        fl.blocks,
        fl.coverage,
        lambda net: fl.collect(net, (X.float(), Y), fl.Categorical()),
        lambda net: fl.mean_gradient(net, (X.float(), Y), fl.Categorical()),
        lambda net: fl.NaturalGradient(net, fl.Categorical(), "exact", 0.1, 0.1),
    ],
)
def test_a_quantised_model_is_refused_at_every_door(door):
    with pytest.raises(fl.UnsupportedModelError, match=r"quantised: .* the model that it"):
        door(quantised())


def test_layers_of_two_precisions_are_seen_in_the_wider_one():
    stats = fl.collect(Mixed(), (X.float(), Y), fl.Categorical())
    assert stats["first"].inputs.dtype == torch.float64


MADE_OF = {
    "NeedsSharedForm": ("KFAC", "norm"),
    "IndefiniteError": ("A sum", 0.1, -2.0),
    "UnsupportedMetric": ("gaussian_kl", "A sum", "Give it an inverse."),
}
KINDS = [k for name, k in vars(fl.errors).items() if name.endswith(("Error", *MADE_OF))]
THROUGH = (copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize("again", THROUGH)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_come_back_whole_from_other_processes(kind, again):
    error = kind(*MADE_OF.get(kind.__name__, ("A sentence.",)))
    error.add_note("Of the layer fc1.")
    found = again(error)
    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
