"""The problems by name, and what each is: data, network, likelihood and files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from fisherlab.errors import meant
from fisherlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherlab.problems import data, files
from fisherlab.problems.data import (
    CIFAR10_AUGMENTATION,
    CIFAR100_AUGMENTATION,
    SVHN_AUGMENTATION,
    cifar10,
    cifar10_subset,
    cifar100,
    colour_digits,
    curves,
    curves_surrogate,
    digit_images,
    digit_reconstructions,
    digits,
    faces,
    faces_surrogate,
    images,
    reconstructions,
    small_images,
    svhn,
)
from fisherlab.problems.files import DataFile, fetch
from fisherlab.problems.networks import (
    gpt,
    perceptron,
    resnet,
    resnet18,
    settle,
    simple_cnn,
    sparse_normal,
    vgg,
    vit,
)
from fisherlab.problems.problem import Augment, Data, Problem, thinned, validation
from fisherlab.settings import numeric


@dataclass(frozen=True, kw_only=True)
class Description:
    """Describe a problem without loading it.

    Attributes
    ----------
    name
        The name to load it by.
    summary
        The data, in one line.
    network
        The network, in one line.
    source
        Who used or published it.
    files
        The data files it reads; empty if it needs none.
    likelihood
        What the network's output means.
    data
        Gives the training and the test pair from (data_dir, dtype).
    build
        Gives the network from the keywords seed and dtype.
    augment
        Changes the inputs of a training minibatch at random, if anything does.

    Examples
    --------
    >>> import fisherlab as fl
    >>> found = fl.problems.describe("digits")
    >>> found.name, found.files
    ('digits', ())
    """

    name: str
    summary: str
    network: str
    source: str
    files: tuple[DataFile, ...] = ()
    likelihood: Likelihood = field(default_factory=Categorical)
    data: Data
    build: Callable[..., nn.Module]
    augment: Augment | None = None


_CLASSIFIER: Final = partial(perceptron, (256, 20, 20, 20, 20, 20, 10), "tanh")
_CLASSIFIER_LINE: Final = "256-20-20-20-20-20-10, tanh"


def _classifier(
    name: str, summary: str, source: str, files: tuple[DataFile, ...], data: Data
) -> Description:
    return Description(
        name=name,
        summary=summary,
        network=_CLASSIFIER_LINE,
        source=f"network of Martens & Grosse 2015; data of {source}",
        files=files,
        data=data,
        build=_CLASSIFIER,
    )


@dataclass(frozen=True)
class _Reconstruction:
    """A data set that autoencoders learn to reconstruct."""

    name: str
    summary: str
    files: tuple[DataFile, ...]
    data: Data
    widths: tuple[int, ...]
    # How many of the training images Koroko et al. keep for training.
    kept: int
    likelihood: Likelihood


_MNIST_WIDTHS: Final = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
_FACES_WIDTHS: Final = (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
_CURVES_WIDTHS: Final = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)

_DIGITS: Final = _Reconstruction(
    "digits",
    "1,797 handwritten digits of scikit-learn, 16 x 16",
    (),
    digit_reconstructions,
    (256, 50, 25, 6, 25, 50, 256),
    1_150,
    Bernoulli(),
)
_RECONSTRUCTIONS: Final = (
    _Reconstruction(
        "mnist",
        "70,000 handwritten digits, 28 x 28",
        files.MNIST,
        partial(reconstructions, files.MNIST),
        _MNIST_WIDTHS,
        50_000,
        Bernoulli(),
    ),
    _Reconstruction(
        "faces",
        "144,900 patches of faces, 25 x 25",
        (files.FACES,),
        faces,
        _FACES_WIDTHS,
        82_800,
        Gaussian(),
    ),
    _Reconstruction(
        "faces-surrogate",
        "SURROGATE of FACES, 144,900 new patches of the photos",
        (files.OLIVETTI,),
        faces_surrogate,
        _FACES_WIDTHS,
        82_800,
        Gaussian(),
    ),
    _Reconstruction(
        "curves",
        "30,000 images of curves, 28 x 28",
        (files.CURVES,),
        curves,
        _CURVES_WIDTHS,
        16_000,
        Bernoulli(),
    ),
    _Reconstruction(
        "curves-surrogate",
        "SURROGATE of CURVES, 30,000 random curves",
        (),
        curves_surrogate,
        _CURVES_WIDTHS,
        16_000,
        Bernoulli(),
    ),
)


def _shape(widths: tuple[int, ...]) -> str:
    code = widths.index(min(widths))
    return f"{'-'.join(map(str, widths[: code + 1]))} and back"


def _autoencoder(of: _Reconstruction) -> Description:
    """Return the form of Bahamou et al.: linear code, all training images."""
    code = of.widths.index(min(of.widths))
    return Description(
        name=f"{of.name}-autoencoder",
        summary=of.summary,
        network=f"{_shape(of.widths)}, ReLU, linear code",
        source="Hinton & Salakhutdinov 2006; ReLU form of Bahamou et al. 2022",
        files=of.files,
        likelihood=of.likelihood,
        data=of.data,
        build=partial(perceptron, of.widths, "relu", linear=(code,)),
    )


def _autoencoder_martens(of: _Reconstruction) -> Description:
    """Return the form of Martens & Grosse: logistic units, linear code, sparse weights."""
    code = of.widths.index(min(of.widths))
    return Description(
        name=f"{of.name}-autoencoder-martens",
        summary=of.summary,
        network=f"{_shape(of.widths)}, logistic, linear code",
        source="Hinton & Salakhutdinov 2006; first weights of Martens 2010",
        files=of.files,
        likelihood=of.likelihood,
        data=of.data,
        build=partial(
            perceptron, of.widths, "sigmoid", linear=(code,), draw=sparse_normal(15)
        ),
    )


def _autoencoder_koroko(of: _Reconstruction) -> Description:
    """Return the form of Koroko et al.: ReLU also on the code, biases begin at 0.01.

    The training images that are not kept validate, in place of the test images.
    """
    return Description(
        name=f"{of.name}-autoencoder-koroko",
        summary=f"{of.summary}; {of.kept:,} to train",
        network=f"{_shape(of.widths)}, ReLU",
        source="Hinton & Salakhutdinov 2006; ReLU form of Koroko et al. 2023",
        files=of.files,
        likelihood=of.likelihood,
        data=partial(validation, of.data, of.kept),
        build=partial(perceptron, of.widths, "relu", gain=1.0, bias=0.01),
    )


_CLASSIFIERS: Final = (
    _classifier(
        "digits",
        "1,797 handwritten digits of scikit-learn, 16 x 16",
        "Alpaydin & Kaynak 1998",
        (),
        digits,
    ),
    _classifier(
        "mnist",
        "70,000 handwritten digits reduced to 16 x 16",
        "LeCun et al. 1998",
        files.MNIST,
        partial(small_images, files.MNIST),
    ),
    _classifier(
        "fashion-mnist",
        "70,000 images of clothing reduced to 16 x 16",
        "Xiao et al. 2017",
        files.FASHION_MNIST,
        partial(small_images, files.FASHION_MNIST),
    ),
    Description(
        name="fashion-mnist-cnn",
        summary="70,000 images of clothing, 1 x 28 x 28",
        network="Simple CNN: conv 5x5 32, 64; 1024-10, ReLU, max-pool",
        source="network of Shallue et al. 2019; data of Xiao et al. 2017",
        files=files.FASHION_MNIST,
        data=partial(images, files.FASHION_MNIST),
        build=simple_cnn,
    ),
    Description(
        name="cifar10-resnet32",
        summary="60,000 colour images of 10 classes, 3 x 32 x 32; crop, flip",
        network="ResNet-32, batch norm, shortcuts A",
        source="He et al. 2016; data of Krizhevsky 2009",
        files=(files.CIFAR10,),
        data=cifar10,
        build=resnet,
        augment=CIFAR10_AUGMENTATION,
    ),
    Description(
        name="cifar10-subset-resnet32",
        summary="the first 2,000 and 1,000 images of CIFAR-10; crop, flip",
        network="ResNet-32, batch norm, shortcuts A",
        source="He et al. 2016; data of Krizhevsky 2009",
        files=(files.CIFAR10_SUBSET,),
        data=cifar10_subset,
        build=resnet,
        augment=CIFAR10_AUGMENTATION,
    ),
    Description(
        name="cifar10-subset-resnet8",
        summary="the first 2,000 and 1,000 images of CIFAR-10; crop, flip",
        network="ResNet-8, batch norm, shortcuts A",
        source="He et al. 2016, small; data of Krizhevsky 2009",
        files=(files.CIFAR10_SUBSET,),
        data=cifar10_subset,
        build=partial(resnet, 8),
        augment=CIFAR10_AUGMENTATION,
    ),
    Description(
        name="cifar100-vgg16",
        summary="60,000 colour images of 100 classes, 3 x 32 x 32; crop, flip",
        network="VGG-16, batch norm, 4096-4096-100",
        source="Simonyan & Zisserman 2015 as in Bahamou et al. 2022; Krizhevsky 2009",
        files=(files.CIFAR100,),
        data=cifar100,
        build=partial(vgg, 16, classes=100),
        augment=CIFAR100_AUGMENTATION,
    ),
    Description(
        name="svhn-vgg11",
        summary="99,289 colour images of house numbers, 3 x 32 x 32; crop",
        network="VGG-11, batch norm, 4096-4096-10",
        source="Simonyan & Zisserman 2015 as in Bahamou et al. 2022; Netzer et al. 2011",
        files=files.SVHN,
        data=svhn,
        build=partial(vgg, 11),
        augment=SVHN_AUGMENTATION,
    ),
)

_TRANSFORMERS: Final = (
    Description(
        name="digits-vit",
        summary="1,797 handwritten digits of scikit-learn, 1 x 16 x 16",
        network="ViT: 16 patches, width 32, 4 heads, 2 blocks",
        source="Dosovitskiy et al. 2021, small; data of Alpaydin & Kaynak 1998",
        data=digit_images,
        build=vit,
    ),
    Description(
        name="cifar10-vit",
        summary="60,000 colour images of 10 classes, 3 x 32 x 32; crop, flip",
        network="ViT: 64 patches, width 64, 4 heads, 4 blocks",
        source="Dosovitskiy et al. 2021, small; data of Krizhevsky 2009",
        files=(files.CIFAR10,),
        data=cifar10,
        build=partial(vit, channels=3, size=32, width=64, depth=4),
        augment=CIFAR10_AUGMENTATION,
    ),
    Description(
        name="prose-gpt",
        summary="45 kB of English in scikit-learn, 32 characters each",
        network=f"GPT: {len(data.ALPHABET)} characters, width 64, 4 heads, 2 blocks",
        source="Radford et al. 2019, small; data-set descriptions of scikit-learn",
        data=data.prose,
        build=partial(gpt, vocabulary=len(data.ALPHABET)),
    ),
    Description(
        name="shakespeare-gpt",
        summary="1.1 MB of Shakespeare, 32 characters each",
        network="GPT: 65 characters, width 64, 4 heads, 2 blocks",
        source="Radford et al. 2019, small; text of Karpathy 2015",
        files=(files.SHAKESPEARE,),
        data=data.shakespeare,
        build=partial(gpt, vocabulary=len(data.SHAKESPEARE_ALPHABET)),
    ),
)

_LARGE: Final = (
    Description(
        name="resnet18",
        summary="the first 2,000 and 1,000 images of CIFAR-10; crop, flip",
        network="ResNet-18 of 11.0 M parameters, untrained; batch norm, shortcuts A",
        source="He et al. 2016; data of Krizhevsky 2009",
        files=(files.CIFAR10_SUBSET,),
        data=cifar10_subset,
        build=resnet18,
        augment=CIFAR10_AUGMENTATION,
    ),
    Description(
        name="vit-tiny",
        summary="1,797 handwritten digits of scikit-learn, 3 x 32 x 32",
        network="ViT-Tiny of 5.4 M parameters, untrained: width 192, 3 heads, 12 blocks",
        source="Touvron et al. 2021 (DeiT-Ti); data of Alpaydin & Kaynak 1998",
        data=colour_digits,
        build=partial(vit, channels=3, size=32, width=192, heads=3, depth=12),
    ),
    Description(
        name="gpt2-small-random",
        summary="45 kB of English in scikit-learn, 64 words each",
        network="GPT-2 small of 124 M parameters, untrained, head tied to the embedding",
        source="Radford et al. 2019; data-set descriptions of scikit-learn",
        data=data.prose_words,
        build=partial(
            gpt,
            vocabulary=50257,
            context=1024,
            width=768,
            heads=12,
            depth=12,
            tied=True,
        ),
    ),
)

DESCRIPTIONS: Final = (
    *_CLASSIFIERS,
    *map(_autoencoder, (_DIGITS, *_RECONSTRUCTIONS)),
    *map(_autoencoder_martens, (_DIGITS, *_RECONSTRUCTIONS)),
    *map(_autoencoder_koroko, _RECONSTRUCTIONS),
    *_TRANSFORMERS,
    *_LARGE,
)


# Training examples that give batch norm its first running statistics.
_SETTLING: Final = 64

_PROBLEMS: Final = {description.name: description for description in DESCRIPTIONS}


def names() -> tuple[str, ...]:
    """Return the names of the problems.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.names()[:4]
    ('digits', 'mnist', 'fashion-mnist', 'fashion-mnist-cnn')
    """
    return tuple(_PROBLEMS)


def describe(name: str) -> Description:
    """Return the description of a problem.

    Raises
    ------
    ValueError
        If no problem has that name.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.describe("digits").network
    '256-20-20-20-20-20-10, tanh'
    """
    if name not in _PROBLEMS:
        raise ValueError(
            f"There is no problem {name!r}. The problems are {', '.join(_PROBLEMS)}."
            + meant(name, _PROBLEMS)
        )
    return _PROBLEMS[name]


@numeric
def load(
    name: str,
    data_dir: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    examples: int | None = None,
) -> Problem:
    """Load the data of a problem and build its network.

    Batch norm starts with the statistics of 64 training examples, so that the untrained
    network can be analysed in evaluation mode.

    The largest data sets take memory: in float64, FACES 0.7 GB, CIFAR 1.5 GB and SVHN
    2.4 GB, in float32 half of it. With `examples`, that much is needed while loading
    only.

    Parameters
    ----------
    name
        One of `names()`.
    data_dir
        The folder that holds the problem's folder (such as `mnist`), or that folder
        itself. If given, files are looked for nowhere else; without it they are looked
        for in `$FISHERLAB_DATA`, then in the cache folder of the platform.
    seed
        Decides the initial weights; the global random generator is left alone.
    dtype
        Of data and weights. Analysis is done best in float64.
    examples
        At most so many training and so many test examples, spaced evenly over the
        data set; None means all.

    Raises
    ------
    ValueError
        If no problem has that name, or `examples` is not positive.
    DataError
        If a data file is missing or is not the published one.

    Examples
    --------
    >>> import fisherlab as fl
    >>> x, y = fl.problems.load("digits", examples=100).train
    >>> x.shape, y.shape
    (torch.Size([100, 256]), torch.Size([100]))
    """
    description = describe(name)
    if examples is not None and examples < 1:
        raise ValueError(f"examples={examples} is given; a positive number is expected.")
    with torch.device("cpu"):  # whatever the default device: `Problem.to` moves it
        train, test = description.data(None if data_dir is None else Path(data_dir), dtype)
        if examples is not None:
            train, test = thinned(train, examples), thinned(test, examples)
        model = description.build(seed=seed, dtype=dtype)
        settle(model, thinned(train, _SETTLING)[0])
    return Problem(name, model, description.likelihood, train, test, description.augment)


def download(name: str, data_dir: str | Path | None = None) -> tuple[Path, ...]:
    """Download the data files of a problem that are missing, and verify all of them.

    Needs pooch (`pip install 'fisherlab[data]'`). No other function of fisherlab uses
    the network.

    Parameters
    ----------
    name
        One of `names()`.
    data_dir
        Where `load` shall find them; None means the cache folder of the platform.

    Returns
    -------
    Where each file lies.

    Raises
    ------
    ValueError
        If no problem has that name.
    DataError
        If pooch is not installed, or a file has no public address, cannot be fetched or
        is not the published one.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.download("digits")  # needs no files
    ()
    """
    return tuple(fetch(describe(name).files, data_dir))
