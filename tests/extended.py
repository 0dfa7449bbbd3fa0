"""Metrics of dense matrices from their definitions, in extended precision (longdouble).

F has shape (p, p), approximations come as a batch (b, p, p).
"""

import numpy as np

WIDE = np.longdouble


def eigh(matrices):
    """Two Jacobi sweeps from float64's eigenvectors, made orthonormal by a Newton step."""
    m = np.asarray(matrices, WIDE)
    n = m.shape[-1]
    v = np.linalg.eigh(m.astype(float))[1].astype(WIDE)
    v = v @ (3 * np.eye(n, dtype=WIDE) - v.mT @ v) / 2
    a = v.mT @ m @ v
    for _ in range(2):
        for p, q in zip(*np.triu_indices(n, 1), strict=True):
            rotation = _rotation(a[..., p, p], a[..., q, q], a[..., p, q])
            a[..., [p, q]] = a[..., [p, q]] @ rotation
            a[..., [p, q], :] = rotation.mT @ a[..., [p, q], :]
            v[..., [p, q]] = v[..., [p, q]] @ rotation
    values = np.diagonal(a, axis1=-2, axis2=-1)
    order = np.argsort(values, -1)
    vectors = np.take_along_axis(v, order[..., None, :], -1)
    return np.take_along_axis(values, order, -1), vectors


def _rotation(p, q, off):
    zero = off == 0
    t = (q - p) / (2 * np.where(zero, 1, off))
    t = np.where(t >= 0, 1, -1) / (np.abs(t) + np.hypot(t, 1))
    t = np.where(zero, 0, t)
    c = 1 / np.hypot(t, 1)
    return np.stack([np.stack([c, t * c], -1), np.stack([-t * c, c], -1)], -2)


def norm(m):
    return np.sqrt((m * m).sum((-2, -1)))


def power(values, vectors, exponent):
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def plain(f, g):
    """Return the metrics without damping."""
    inner, sizes = (f * g).sum((-2, -1)), (norm(f), norm(g))
    scale = inner / sizes[1] ** 2
    mine, other = eigh(f)[0], eigh(g)[0]
    spectra = [np.sort(np.abs(one), -1) for one in (mine, other)]
    trace = np.trace(g, axis1=-2, axis2=-1)
    diagonals = [np.diagonal(one, axis1=-2, axis2=-1) for one in (f, g)]
    first, second = (one - one.mean(-1, keepdims=True) for one in diagonals)
    lengths = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return {
        "frobenius_error": norm(f - g) / sizes[0],
        "cosine_similarity": inner / (sizes[0] * sizes[1]),
        "trace_ratio": trace / np.trace(f),
        "optimal_scale": scale,
        "scale_optimal_error": norm(f - scale[:, None, None] * g) / sizes[0],
        "diagonal_correlation": (first * second).sum(-1) / lengths,
        "spectral_error": np.abs(eigh(f - g)[0]).max(-1) / np.abs(mine).max(),
        "spectrum_error": np.sqrt(((spectra[0] - spectra[1]) ** 2).sum(-1)) / sizes[0],
        "effective_rank": trace**2 / sizes[1] ** 2,
    }


def damped(f, g, damping, gradient):
    """Return the metrics of P = F + λI and Q = F̂ + λI; NaN where Q is indefinite."""
    eye = np.eye(len(f), dtype=WIDE)
    (mine, u), (other, v) = eigh(f), eigh(g)
    mine, other = mine + damping, other + damping
    other = np.where(other[:, :1] > 0, other, np.nan)
    inverses = power(mine, u, -1), power(other, v, -1)
    root = power(mine, u, 0.5)
    halves = power(mine, u, -0.5), np.nan_to_num(power(other, v, -0.5))
    ahead, back = (eigh(h @ d @ h)[0] for h, d in zip(halves, (g - f, f - g), strict=True))
    forward, backward = (
        (x - np.log1p(np.maximum(x, -1 + 1e-15))).sum(-1) / 2 for x in (back, ahead)
    )
    ratio = np.log(mine) - np.log(other)
    residual = root @ inverses[1] @ root - eye
    found = {
        "inverse_error": norm(inverses[0] - inverses[1]) / norm(inverses[0]),
        "inverse_cosine": (inverses[0] * inverses[1]).sum((-2, -1))
        / (norm(inverses[0]) * norm(inverses[1])),
        "whitened_error": norm(residual) / np.sqrt(WIDE(len(f))),
        "gaussian_kl": forward,
        "reverse_gaussian_kl": backward,
        "stein_divergence": 2 * forward,
        "log_spectrum_distance": np.sqrt((ratio**2).mean(-1)),
    }
    found |= _along(f + damping * eye, *inverses, np.asarray(gradient, WIDE).ravel())
    defined = ~np.isnan(other[:, 0])
    return {name: np.where(defined, value, np.nan) for name, value in found.items()}


def _along(p, first, second, v):
    best, taken = first @ v, second @ v
    curvature = np.einsum("bi,ij,bj->b", taken, p, taken)
    lengths = np.sqrt((best @ best) * (taken**2).sum(-1))
    gamma = np.sqrt(curvature) / np.abs(taken @ v)
    return {
        "direction_cosine": taken @ best / lengths,
        "f_cosine_squared": (taken @ v) ** 2 / (curvature * (v @ best)),
        "model_decrease_ratio": (taken @ v - curvature / 2) / (v @ best / 2),
        "gamma_ratio": gamma / (np.sqrt(v @ p @ v) / (v @ v)),
    }
