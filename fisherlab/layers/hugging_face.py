"""Models of Hugging Face as modules that return logits, with their batches as pairs."""

import inspect
from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError

TASKS = ("causal-lm", "masked-lm", "sequence-classification", "token-classification")
IGNORED = -100
_ENDINGS: Mapping[str, str] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}
_OF_TOKENIZERS = (
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "length",
)


def hf(model: nn.Module, task: str | None = None) -> "HuggingFace":
    """Return a model of `transformers` as a module that gives logits alone.

    What a tokenizer or a collator returns is data for it, as it comes: ``labels`` are
    taken out of it, moved by one position for a causal language model, and padding is
    left out of loss and Fisher. Without labels a language model is asked for its own
    inputs. The likelihood is `Categorical`; `Gaussian` for a regression, `Bernoulli` for
    several labels.

    Parameters
    ----------
    model
        A causal or masked language model, a sequence or token classifier, also with
        adapters of `peft` in it. Blocks are made of what is trainable: with adapters on a
        frozen base, of the adapters alone, in their precision.
    task
        One of "causal-lm", "masked-lm", "sequence-classification",
        "token-classification"; read off the name of the class by default.

    Returns
    -------
    HuggingFace
        A module whose blocks have the names of the model, after ``model.``.

    Raises
    ------
    ValueError
        For an unknown task.
    UnsupportedModelError
        If the class does not tell the task.

    Notes
    -----
    Costs nothing: parameters are shared. Dropout must be off, ``model.eval()``, which
    `from_pretrained` does.

    Examples
    --------
    >>> class TinyForCausalLM(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return {"logits": self.head(self.table(input_ids))}
    >>> net = hf(TinyForCausalLM())
    >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    >>> net.as_pair({"input_ids": ids, "attention_mask": (ids > 0).long()})[1]
    tensor([[   2,    3, -100],
            [   5, -100, -100]])
    >>> import fisherlab as fl
    >>> list(fl.collect(net, {"input_ids": ids}, fl.Categorical()))
    ['model.table', 'model.head']
    """
    if task is not None and task not in TASKS:
        msg = f"hf(task={task!r}): one of {', '.join(map(repr, TASKS))} is expected."
        raise ValueError(msg)
    return HuggingFace(model, task or _task(_base(model)))


def _base(model: nn.Module) -> nn.Module:
    """Return the model that adapters of `peft` are put into."""
    within = getattr(model, "get_base_model", None)
    return cast("nn.Module", within()) if callable(within) else model


def _task(model: nn.Module) -> str:
    name = type(model).__name__
    for ending, task in _ENDINGS.items():
        if name.endswith(ending) and not name.endswith("WithLMHeadModel"):
            return task
    raise UnsupportedModelError(
        f"hf: the class {name} does not tell what it is for; give task=, one of "
        f"{', '.join(map(repr, TASKS))}."
    )


@final
class HuggingFace(nn.Module):
    """Logits of a model of `transformers`; see `hf`.

    Parameters
    ----------
    model, task
        As `hf` has them.
    """

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task
        known = inspect.signature(_base(model).forward).parameters
        chosen = {"use_cache": False, "return_dict": True}
        self._options = {name: value for name, value in chosen.items() if name in known}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits.

        Raises
        ------
        UnsupportedModelError
            If the model gives none.
        """
        output = self.model(**inputs, **self._options)
        named = output if isinstance(output, Mapping) else vars(output)
        logits = named.get("logits")
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"hf: the output of {type(self.model).__name__} holds "
                f"{', '.join(named) or 'nothing'}; logits are expected."
            )
        return logits

    def as_pair(self, item: Any) -> tuple[dict[str, Any], Tensor | None]:
        """Return inputs by name and labels, from what a tokenizer or collator gives.

        Parameters
        ----------
        item
            A mapping, with or without ``labels``; or inputs (``input_ids`` alone too) and
            labels as a pair.

        Raises
        ------
        ValueError
            If inputs are lists, or padding cannot be left out for want of labels.
        """
        paired = isinstance(item, (tuple, list)) and len(item) == 2
        given, y = item if paired else (item, None)
        if isinstance(given, Tensor):
            given = {"input_ids": given}
        if not isinstance(given, Mapping):
            msg = f"hf: a mapping of tensors is expected, {type(given).__name__} was given."
            raise ValueError(msg)
        x = {name: given[name] for name in given if name not in _OF_TOKENIZERS}
        labels = [x.pop(name) for name in ("labels", "label") if name in x]
        lists = [name for name, value in x.items() if isinstance(value, list)]
        if lists:
            raise ValueError(
                f"hf: {', '.join(lists)} came as lists; ask the tokenizer for tensors: "
                "return_tensors='pt', padding=True."
            )
        return x, self._labels(x, y if y is not None or not labels else labels[0])

    def _labels(self, x: Mapping[str, Any], labels: Tensor | None) -> Tensor | None:
        """Return what the logits are asked for, position by position."""
        if self.task == "sequence-classification":
            real = labels is not None and labels.is_floating_point() and labels.dim() == 1
            return labels[:, None] if labels is not None and real else labels
        mask = x.get("attention_mask")
        if labels is None and self.task == "token-classification":
            if mask is not None and bool((mask == 0).any()):
                msg = "hf: labels are needed to leave padding out of a token classifier."
                raise ValueError(msg)
            return None
        if labels is None:
            if "input_ids" not in x:
                msg = "hf: without labels a language model needs input_ids, to ask for."
                raise ValueError(msg)
            labels = x["input_ids"]
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        if self.task == "causal-lm":
            last = torch.full_like(labels[:, :1], IGNORED)
            labels = torch.cat([labels[:, 1:], last], 1)
        return labels
