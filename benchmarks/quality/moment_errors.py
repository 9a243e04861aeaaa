"""What 8 bits do to the moments of a trained model, by companding and kind of layer."""

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import Storage, paths
from flashoptim_jax.storage import codec

GROUP = Storage().group_size
_LAYERS = {
  "embed": "embedding",
  "head": "head",
  "qkv": "attention",
  "attention_out": "attention",
  "mlp_in": "MLP",
  "mlp_out": "MLP",
}


def linear(x, kind):
  """Rounds to 8 bits, in equal steps up to the largest of each group."""
  levels = codec.LEVELS[kind]
  axis = codec.group_axis(x.shape, GROUP)
  if axis is None:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % GROUP)
  shape = (*x.shape[:axis], -1, GROUP, *x.shape[axis + 1 :])
  groups = jnp.pad(x, pad).reshape(shape)
  scale = jnp.max(jnp.abs(groups), axis=axis + 1, keepdims=True)
  codes = jnp.round(groups / jnp.where(scale == 0, 1, scale) * levels)
  rounded = (codes * (scale / levels)).reshape(jnp.pad(x, pad).shape)
  return jax.lax.slice_in_dim(rounded, 0, x.shape[axis], axis=axis)


def companded(companding):
  """A moment after an encode and a decode, as an update does them."""
  storage = Storage(companding=companding)

  def roundtrip(x, kind):
    return codec.decode(*codec.encode(x, kind, storage), kind, storage)

  return roundtrip


COMPANDINGS = {
  "root": companded("root"),
  "paper": companded("paper"),
  "linear": linear,
}


def _is_adam(node):
  return isinstance(node, optax.ScaleByAdamState)


def linear_8bit(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Adam whose moments go through 8 bits without companding after each update."""

  def quantized(node):
    if not _is_adam(node):
      return node
    return node._replace(
      mu=jax.tree.map(lambda x: linear(x, "first"), node.mu),
      nu=jax.tree.map(lambda x: linear(x, "second"), node.nu),
    )

  def update(grads, state, params=None):
    updates, state = tx.update(grads, state, params)
    return updates, jax.tree.map(quantized, state, is_leaf=_is_adam)

  return optax.GradientTransformation(tx.init, update)


def kind_of(path) -> str:
  """The kind of layer that a parameter belongs to."""
  keys = paths.name(path).split("/")
  return next((_LAYERS[key] for key in keys if key in _LAYERS), "norm")


@jax.jit
def _sums(mu, nu, count):
  """For each companding: squares of the error and of the direction, dot, zeros."""
  step = count.astype(jnp.float32)
  mu_correction, nu_correction = 1 - 0.9**step, 1 - 0.95**step

  def direction(mu, nu):
    return (mu / mu_correction) / (jnp.sqrt(nu / nu_correction) + 1e-8)

  exact = direction(mu, nu)
  found = {}
  for name, roundtrip in COMPANDINGS.items():
    stored = roundtrip(mu, "first"), roundtrip(nu, "second")
    other = direction(*stored)
    found[name] = {
      "error": jnp.sum((other - exact) ** 2),
      "norm": jnp.sum(exact**2),
      "largest": jnp.max(jnp.abs(other)),
      "collapsed": jnp.sum((stored[1] == 0) & (nu > 0)),
      "elements": jnp.sum(nu > 0),
    }
  return found


def moment_errors(state):
  """Errors of Adam's direction m̂/(sqrt(v̂) + ε), by layer and companding.

  Args:
    state: Of ``optax.adamw`` with b1 = 0.9, b2 = 0.95 and eps = 1e-8, in float32.

  Returns:
    For each kind of layer and companding: ``error``, the norm of the direction's
    error over the direction's; ``largest``, of the direction's elements; and
    ``collapsed``, the share of v that is not zero and becomes zero.
  """
  (adam,) = filter(_is_adam, jax.tree.leaves(state, is_leaf=_is_adam))
  totals: dict[str, dict[str, dict[str, float]]] = {}
  for (path, mu), nu in zip(
    jax.tree.leaves_with_path(adam.mu), jax.tree.leaves(adam.nu), strict=True
  ):
    kind = totals.setdefault(kind_of(path), {})
    for name, sums in jax.device_get(_sums(mu, nu, adam.count)).items():
      cell = kind.setdefault(name, dict.fromkeys(sums, 0.0))
      for key, value in sums.items():
        combine = max if key == "largest" else float.__add__
        cell[key] = combine(cell[key], float(value))
  return {
    "layers": {
      kind: {
        name: {
          "error": (cell["error"] / cell["norm"]) ** 0.5,
          "largest": cell["largest"],
          "collapsed": cell["collapsed"] / max(1.0, cell["elements"]),
        }
        for name, cell in cells.items()
      }
      for kind, cells in totals.items()
    }
  }
