"""Models of Hugging Face, built from configurations with random weights, on real text."""

import warnings
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.problems.data import prose
from tests.brute_force import full_fisher, spans
from tests.model_zoo import Case, randomised
from tests.oracles import assert_close

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY = 100  # characters of the text are fewer
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 6}
BERT = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 5, "num_labels": 3} | SMALL


def text(n: int = 3, t: int = 5) -> UserDict[str, Tensor]:
    """Return what a tokenizer returns of texts, the second one shorter than the others."""
    (x, _), _ = prose(None, torch.float64)
    ids, mask = x[:n, :t].clone(), torch.ones(n, t, dtype=torch.long)
    mask[1, 3:], ids[1, 3:] = 0, 0
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


def gpt2(dtype: torch.dtype = torch.float64) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=4, n_layer=1, n_head=2
    )
    return randomised(transformers.GPT2LMHeadModel(config)).to(dtype)


def bert(kind: str) -> Any:
    config = transformers.BertConfig(**BERT)
    return randomised(getattr(transformers, kind)(config))


def with_adapters(base: nn.Module) -> Any:
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    with warnings.catch_warnings():  # peft asks transformers by an old name
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, config).eval()


class Small(nn.Module):
    """Logits of some entries, so that the oracle's loop over them is short."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(**inputs)[..., :3]


def test_blocks_of_a_language_model_are_the_fisher_of_its_own_loss() -> None:
    net, batch = Small(fl.hf(gpt2())), text()
    x, y = net.net.as_pair(batch)
    y = torch.where(y < 0, y, y % 3)
    case = Case(net, x, y, fl.Categorical())
    blocks = fl.blocks(net)
    full, at = full_fisher(case, blocks), spans(blocks, net)
    stats = fl.collect(net, (x, y), fl.Categorical())
    for name, layer in stats.items():
        assert_close(fl.ExactBlock()(layer).to_dense(), full[at[name], at[name]])
    shared = {name for name, layer in stats.items() if layer.is_shared}
    layers = [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj")]
    layers += [f"transformer.h.0.mlp.{n}" for n in ("c_fc", "c_proj")]
    named = {f"net.model.{layer}{end}" for layer in layers for end in ("", ".bias")}
    assert shared == named | {"net.model.transformer.wte"}


def test_the_loss_is_that_of_the_model() -> None:
    """Labels are moved and padding is ignored as the models themselves do it."""
    batch = text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (
        gpt2(),
        bert("BertForMaskedLM"),
        bert("BertForTokenClassification"),
        bert("BertForSequenceClassification"),
    ):
        net = fl.hf(model)
        wanted = labels if net.task.endswith("lm") else torch.where(labels < 0, labels, 1)
        wanted = torch.tensor([0, 2, 1]) if net.task.startswith("seq") else wanted
        x, y = net.as_pair({**batch, "labels": wanted})
        assert y is not None
        loss = fl.Categorical().loss(net(**x), y).sum() / (y >= 0).sum()
        assert_close(loss, model(**batch, labels=wanted).loss, rtol=1e-6)


def test_padding_has_no_part_in_the_statistics() -> None:
    net, batch = fl.hf(gpt2()), text()
    longer = {
        name: torch.cat([t, t.new_full((3, 1), fill)], 1)
        for (name, t), fill in zip(batch.items(), (7, 0), strict=True)
    }
    layers = ["model.transformer.h.0.attn", "model.transformer.h.0.mlp"]
    one, other = (
        fl.collect(net, data, fl.Categorical(), layers=layers) for data in (batch, longer)
    )
    for name in one:
        for method in (fl.ExactBlock(), fl.KFAC(), fl.EKFAC()):
            dense = method(one[name]).to_dense()
            assert_close(method(other[name]).to_dense(), dense, rtol=1e-8)


def test_adapters_have_blocks_of_their_own_in_their_own_precision() -> None:
    model = with_adapters(gpt2(torch.bfloat16))
    assert model.get_base_model().transformer.wte.weight.dtype == torch.bfloat16
    net, batch = fl.hf(model), text()
    stats = fl.collect(net, batch, fl.Categorical())
    assert [name.split(".")[-2] for name in stats] == ["lora_A", "lora_B"]
    assert {layer.dtype for layer in stats.values()} == {torch.float32}
    assert all(layer.is_shared for layer in stats.values())
    double = fl.collect(net, batch, fl.Categorical(), dtype=torch.float64)
    for name, layer in stats.items():
        dense = fl.ExactBlock()(double[name]).to_dense()
        assert_close(fl.ExactBlock()(layer).to_dense(), dense, rtol=1e-4)
    x, y = net.as_pair({**batch, "labels": batch["input_ids"]})
    case = Case(Small(fl.hf(model.double())), x, y % 3, fl.Categorical())
    blocks = fl.blocks(case.model)
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    for name, layer in fl.collect(case.model, (x, y % 3), fl.Categorical()).items():
        assert_close(fl.ExactBlock()(layer).to_dense(), full[at[name], at[name]])


def test_training_takes_batches_of_a_collator_as_they_come() -> None:
    net = fl.hf(with_adapters(gpt2()))
    # So short a step follows the slope, whatever the random weights are.
    optimiser = fl.NaturalGradient(net, fl.Categorical(), "kfac", lr=1e-4, damping=0.1)
    losses = [float(optimiser.step(batch=text())) for _ in range(3)]
    assert losses[2] < losses[0]
    streamed = fl.approximate(net, [text(), text()], fl.Categorical(), ["kfac"])
    assert len(streamed["kfac"]) == 2
    assert fl.coverage(net, text()).complete
    assert fl.estimate(net, text(), fl.Categorical(), ["kfac"]).peak_bytes > 0


def test_regressions_and_what_is_refused() -> None:
    config = transformers.BertConfig(**{**BERT, "num_labels": 1})
    net = fl.hf(transformers.BertForSequenceClassification(config).double().eval())
    batch = {**text(), "labels": torch.tensor([0.5, -1.0, 2.0]).double()}
    assert fl.collect(net, batch, fl.Gaussian(), fl.Empirical())
    with pytest.raises(fl.UnsupportedModelError, match="Linear does not tell"):
        fl.hf(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'causal-lm', 'masked-lm'"):
        fl.hf(nn.Linear(2, 2), task="translation")
    with pytest.raises(ValueError, match="return_tensors"):
        fl.collect(fl.hf(gpt2()), {"input_ids": [[1, 2], [3]]}, fl.Categorical())
    with pytest.raises(ValueError, match="labels are needed"):
        fl.collect(fl.hf(bert("BertForTokenClassification")), text(), fl.Categorical())
    plain = fl.hf(gpt2().transformer, task="causal-lm")
    with pytest.raises(fl.UnsupportedModelError, match="last_hidden_state"):
        fl.collect(plain, text(), fl.Categorical())


@pytest.mark.parametrize("batched", [False, True])
def test_a_comparison_straight_from_the_model_takes_batches_as_they_come(batched) -> None:
    net, data, likelihood = fl.hf(gpt2()), text(), fl.Categorical()
    few = ["model.transformer.h.0.mlp.c_fc"]
    expected = fl.compare(fl.collect(net, data, likelihood, layers=few), ["kfac"])
    given = [data] if batched else data
    found = fl.compare(net, given, likelihood, ["kfac"], layers=few)
    for name in ("frobenius_error", "fisher_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-12)


def test_mappings_in_another_order_are_noticed_where_labels_are_sampled() -> None:
    first, second = ({"input_ids": text()["input_ids"][at]} for at in ([0], [1]))

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([first, second] if self.passes % 2 else [second, first])

    sampled = fl.MonteCarlo(1)
    with pytest.raises(ValueError, match="gave other examples than the pass before"):
        fl.compare(fl.hf(gpt2()), Shuffled(), fl.Categorical(), ["kfac"], fisher=sampled)
