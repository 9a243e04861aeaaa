"""The optimizers: Optax's signatures and defaults, and keyword-only extras."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flashoptim_jax import rules
from flashoptim_jax.storage.options import Storage
from flashoptim_jax.storage.state import Format
from flashoptim_jax.update.transform import flash_transformation

ScalarOrSchedule: TypeAlias = float | jax.Array | Callable[[Any], Any]
Mask: TypeAlias = Any | Callable[[Any], Any] | None

_DEFAULT_STORAGE = Storage()
# Keeps what limits quantised moments away from exact ones and float32's errors.
_BOUND_SLACK = 1.05


def adamw(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: ScalarOrSchedule = 1e-4,
  mask: Mask = None,
  *,
  nesterov: bool = False,
  decouple_lr: bool = False,
  storage: Storage = _DEFAULT_STORAGE,
  implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""AdamW with companded 8-bit moments and split master weights.

  A drop-in for :func:`optax.adamw`. For 16-bit parameters the state takes about
  3.13 bytes per parameter, where Optax's takes 8 beside 4 of float32 master
  weights. With :math:`\theta` the master weight, in float32,

  .. math::

    \begin{align*}
      m_t &\leftarrow \beta_1 m_{t-1} + (1-\beta_1) g_t \\
      v_t &\leftarrow \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t \left(
        \frac{m_t / (1-\beta_1^t)}
        {\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}
        + \lambda \theta_{t-1} \right)
    \end{align*}

  and what is kept of :math:`m`, :math:`v` and :math:`\theta` between steps is
  what ``storage`` says (:mod:`flashoptim_jax.storage.codec` has the format). It must be
  the last transformation of a chain: later ones would change the update that
  the stored correction was computed for.

  Args:
    learning_rate: The step size α, a number or a schedule.
    b1: Decay rate β₁ of the first moment.
    b2: Decay rate β₂ of the second moment.
    eps: ε, added outside the square root.
    eps_root: ε̄, added inside the square root.
    mu_dtype: For drop-in calls; anything but None is an error.
    weight_decay: λ, a number or a schedule.
    mask: Where weight decay applies: a prefix of the params with bool leaves, or
      a function that makes one from the params.
    nesterov: Whether to use Nesterov momentum (NAdamW).
    decouple_lr: Whether weight decay ignores the learning rate but for its
      schedule: λ·α_t/α_0 per step instead of λ·α_t, α_0 being the schedule's
      value at step 0.
    storage: How the state is stored.
    implementation: ``"xla"``, ``"mosaic_tpu"``, ``"triton"``, or None for the
      best that is available for each leaf.

  Returns:
    A transformation whose ``update`` needs ``params`` and returns updates of the
    dtype to which those of a gradient and its parameter promote.

  Raises:
    ValueError: For ``mu_dtype``, unknown options, parameters that are not
      real floating-point arrays, and states or gradients that do not match the
      parameters.

  Examples:
    >>> import flashoptim_jax as fo, jax, jax.numpy as jnp
    >>> tx = fo.adamw(1e-1)
    >>> params, state = fo.from_fp32(tx, jnp.linspace(-2.0, 3.0, 4096))
    >>> for _ in range(5):
    ...   grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    ...   params, state = fo.step(tx, grads, state, params)
    >>> params.dtype.name, state.mu.dtype.name
    ('bfloat16', 'int8')

  References:
    Loshchilov et al, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019; `FlashOptim
    <https://arxiv.org/abs/2602.23349>`_, 2026
  """
  _refuse_dtype("mu_dtype", mu_dtype)
  return _transformation(
    rules.NADAM if nesterov else rules.ADAM,
    lambda count: _adam_scalars(count, b1, b2, eps, eps_root, nesterov),
    learning_rate,
    weight_decay,
    plain=lambda: optax.adamw(
      learning_rate,
      b1,
      b2,
      eps,
      eps_root,
      weight_decay=weight_decay,
      mask=mask,
      nesterov=nesterov,
    ),
    default_weight_decay=1e-4,
    mask=mask,
    decouple_lr=decouple_lr,
    storage=storage,
    implementation=implementation,
  )


def adam(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = False,
  storage: Storage = _DEFAULT_STORAGE,
  implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam with companded 8-bit moments and split master weights.

  A drop-in for :func:`optax.adam`: :func:`adamw` without weight decay.

  Args:
    learning_rate: The step size, a number or a schedule.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added outside the square root.
    eps_root: Added inside the square root.
    mu_dtype: For drop-in calls; anything but None is an error.
    nesterov: Whether to use Nesterov momentum (NAdam).
    storage: How the state is stored.
    implementation: As for :func:`adamw`.

  Returns:
    As for :func:`adamw`.

  Raises:
    ValueError: As for :func:`adamw`.
  """
  _refuse_dtype("mu_dtype", mu_dtype)
  return _transformation(
    rules.NADAM if nesterov else rules.ADAM,
    lambda count: _adam_scalars(count, b1, b2, eps, eps_root, nesterov),
    learning_rate,
    plain=lambda: optax.adam(learning_rate, b1, b2, eps, eps_root, nesterov=nesterov),
    storage=storage,
    implementation=implementation,
  )


def sgd(
  learning_rate: ScalarOrSchedule,
  momentum: jax.typing.ArrayLike | None = None,
  nesterov: bool = False,
  accumulator_dtype: Any | None = None,
  *,
  dampening: jax.typing.ArrayLike = 0.0,
  weight_decay: ScalarOrSchedule = 0.0,
  mask: Mask = None,
  decouple_lr: bool = False,
  storage: Storage = _DEFAULT_STORAGE,
  implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SGD, with a companded 8-bit momentum and split master weights.

  A drop-in for :func:`optax.sgd`, with two extras:

  .. math::

    \begin{align*}
      m_t &\leftarrow \mu m_{t-1} + (1 - \delta) g_t \\
      d_t &\leftarrow g_t \text{ without momentum},\;
        g_t + \mu m_t \text{ with Nesterov's},\; m_t \text{ otherwise} \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t (d_t + \lambda \theta_{t-1})
    \end{align*}

  Weight decay is decoupled, as in :func:`optax.adamw`; for L2 regularisation,
  put :func:`optax.add_decayed_weights` before this transformation. PyTorch's
  ``SGD`` does not dampen the very first gradient; this does.

  Args:
    learning_rate: The step size α, a number or a schedule.
    momentum: μ, or None for no momentum (and no first moment in the state).
    nesterov: Whether to use Nesterov momentum.
    accumulator_dtype: For drop-in calls; anything but None is an error.
    dampening: δ.
    weight_decay: λ, a number or a schedule.
    mask: Where weight decay applies, as for :func:`adamw`.
    decouple_lr: As for :func:`adamw`.
    storage: How the state is stored.
    implementation: As for :func:`adamw`.

  Returns:
    As for :func:`adamw`.

  Raises:
    ValueError: As for :func:`adamw`, and for dampening without momentum or with
      Nesterov momentum.
  """
  _refuse_dtype("accumulator_dtype", accumulator_dtype)
  plain = momentum is None or nesterov
  if plain and _is_number(dampening) and dampening != 0:
    raise ValueError(
      f"dampening is {dampening!r} with momentum={momentum!r} and"
      f" nesterov={nesterov!r}; expected 0, or momentum without nesterov."
    )

  if momentum is None:
    rule = rules.SGD
  else:
    rule = rules.NESTEROV if nesterov else rules.MOMENTUM

  def momentum_scalars(count):
    del count
    delta = _hyperparameter(dampening, 0.0)
    return {
      "momentum": _hyperparameter(momentum, 0.9),
      "one_minus_dampening": 1 - delta,
    }

  def optax_sgd():
    if not callable(weight_decay) and not (
      _is_number(weight_decay) and weight_decay != 0
    ):
      return optax.sgd(learning_rate, momentum, nesterov)
    return optax.chain(
      optax.identity() if momentum is None else optax.trace(momentum, nesterov),
      optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate),
    )

  return _transformation(
    rule,
    (lambda count: {}) if momentum is None else momentum_scalars,
    learning_rate,
    weight_decay,
    plain=optax_sgd,
    mask=mask,
    decouple_lr=decouple_lr,
    storage=storage,
    implementation=implementation,
  )


def lion(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.99,
  mu_dtype: Any | None = None,
  weight_decay: ScalarOrSchedule = 1e-3,
  mask: Mask = None,
  *,
  decouple_lr: bool = False,
  storage: Storage = _DEFAULT_STORAGE,
  implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Lion with a companded 8-bit moment and split master weights.

  A drop-in for :func:`optax.lion`:

  .. math::

    \begin{align*}
      d_t &\leftarrow \text{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t) \\
      m_t &\leftarrow \beta_2 m_{t-1} + (1-\beta_2) g_t \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t (d_t + \lambda \theta_{t-1})
    \end{align*}

  Args:
    learning_rate: The step size α, a number or a schedule.
    b1: Rate β₁ that combines the moment and the gradient.
    b2: Decay rate β₂ of the moment.
    mu_dtype: For drop-in calls; anything but None is an error.
    weight_decay: λ, a number or a schedule.
    mask: Where weight decay applies, as for :func:`adamw`.
    decouple_lr: As for :func:`adamw`.
    storage: How the state is stored.
    implementation: As for :func:`adamw`.

  Returns:
    As for :func:`adamw`.

  Raises:
    ValueError: As for :func:`adamw`.

  References:
    Chen et al, `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023
  """
  _refuse_dtype("mu_dtype", mu_dtype)

  def scalars(count):
    del count
    beta1 = _hyperparameter(b1, 0.9)
    beta2 = _hyperparameter(b2, 0.99)
    return {
      "b1": beta1,
      "one_minus_b1": 1 - beta1,
      "b2": beta2,
      "one_minus_b2": 1 - beta2,
    }

  return _transformation(
    rules.LION,
    scalars,
    learning_rate,
    weight_decay,
    plain=lambda: optax.lion(
      learning_rate, b1, b2, weight_decay=weight_decay, mask=mask
    ),
    default_weight_decay=1e-3,
    mask=mask,
    decouple_lr=decouple_lr,
    storage=storage,
    implementation=implementation,
  )


def _transformation(
  rule: rules.Rule,
  rule_scalars: Callable[[jax.Array], rules.Scalars],
  learning_rate: ScalarOrSchedule,
  weight_decay: ScalarOrSchedule = 0.0,
  *,
  plain: Callable[[], optax.GradientTransformation],
  default_weight_decay: float = 0.0,
  mask: Mask = None,
  decouple_lr: bool = False,
  storage: Storage,
  implementation: str | None,
) -> optax.GradientTransformationExtraArgs:
  """What the optimizers share: learning rate, weight decay and storage."""
  if not isinstance(storage, Storage):
    raise ValueError(f"storage is {storage!r}; expected a flashoptim_jax.Storage.")
  if decouple_lr and not (callable(learning_rate) or _is_number(learning_rate)):
    raise ValueError(
      "decouple_lr=True needs the learning rate at step 0, and learning_rate"
      f" is a {type(learning_rate).__name__}; expected a number or a schedule"
      " (optax.inject_hyperparams passes arrays: give it"
      " static_args='learning_rate')."
    )

  def scalars(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    decay = weight_decay(count) if callable(weight_decay) else weight_decay
    decay = _hyperparameter(decay, default_weight_decay)
    if decouple_lr:
      decay = decay / _initial_rate(learning_rate)
    return {
      "learning_rate": _hyperparameter(rate, None),
      "weight_decay": decay,
      **rule_scalars(count),
    }

  return flash_transformation(
    rule,
    Format(rule.name, tuple((m.name, m.kind) for m in rule.moments), storage),
    scalars,
    plain=plain,
    mask=mask,
    decay=not (_is_number(weight_decay) and weight_decay == 0),
    implementation=implementation,
  )


def _adam_scalars(count, b1, b2, eps, eps_root, nesterov: bool) -> rules.Scalars:
  """Adam's scalars for the update that follows ``count`` updates."""
  b1 = _hyperparameter(b1, 0.9)
  b2 = _hyperparameter(b2, 0.999)
  scalars = {
    "b1": b1,
    "one_minus_b1": 1 - b1,
    "b2": b2,
    "one_minus_b2": 1 - b2,
    "eps": _hyperparameter(eps, 1e-8),
    "eps_root": _hyperparameter(eps_root, 0.0),
  }
  return scalars | _adam_scalars_of_count(count, b1, b2, nesterov)


# Compiled once, where powers of each count would be compiled for each anew.
@functools.partial(jax.jit, static_argnames="nesterov", inline=True)
def _adam_scalars_of_count(count, b1, b2, nesterov: bool) -> rules.Scalars:
  done = optax.safe_increment(count)

  def correction(decay, count):
    if not jnp.issubdtype(decay.dtype, jnp.floating):
      decay = decay.astype(jnp.float32)
    # As `decay**count`, which strict dtype promotion refuses.
    return (1 - lax.pow(decay, count)).astype(jnp.float32)

  mu_correction = correction(b1, done)
  mu_correction_next = correction(b1, optax.safe_increment(done))
  nu_correction = correction(b2, done)
  # A gradient of n updates ago counts w·b1ⁿ in the direction's numerator, the last one
  # w₀, and (1-b2)·b2ⁿ/nu_correction in the second moment. By Cauchy and Schwarz, the
  # numerator over the root of the second moment is at most
  # sqrt(nu_correction/(1-b2) · (w₀² + w²·Σ (b1²/b2)ⁿ)).
  if nesterov:
    w = b1 * (1 - b1) / mu_correction_next
    w_0 = w + (1 - b1) / mu_correction
  else:
    w = w_0 = (1 - b1) / mu_correction
  updates = done.astype(jnp.float32)
  ratio = jnp.asarray(b1 * b1 / b2, jnp.float32)
  bounded = ratio < 1
  ratio = jnp.where(bounded, ratio, 0.5)
  # Near 1, where the quotient would be of small differences, all are taken for 1.
  sum_of_powers = jnp.where(ratio > 0.999, updates, (1 - ratio**updates) / (1 - ratio))
  square = nu_correction / (1 - b2) * (w_0**2 + w**2 * (sum_of_powers - 1))
  least_root = 1 / (_BOUND_SLACK * jnp.sqrt(square))
  return {
    "mu_correction": mu_correction,
    "mu_correction_next": mu_correction_next,
    "nu_correction": nu_correction,
    rules.LEAST_ROOT: jnp.where(bounded, least_root, 0).astype(jnp.float32),
  }


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hyperparameter(value: Any, default: float | None) -> Any:
  """A number as it is, or an array of at least 32 bits.

  ``optax.inject_hyperparams`` casts hyperparameters to the params' dtype, unless
  it is given ``hyperparam_dtype``. bfloat16 rounds 0.999 to 1, with which Adam
  divides by zero; so a 16-bit value that the default rounds to is taken for the
  default.
  """
  if _is_number(value):
    return value
  value = jnp.asarray(value)
  if value.dtype.itemsize >= 4:
    return value
  wide = value.astype(jnp.float32)
  if default is None:
    return wide
  return jnp.where(value == jnp.asarray(default, value.dtype), default, wide)


def _initial_rate(learning_rate: ScalarOrSchedule) -> Any:
  """The learning rate at step 0, as a number."""
  if callable(learning_rate):
    with jax.ensure_compile_time_eval():
      learning_rate = float(learning_rate(0))
  if learning_rate == 0:
    raise ValueError(
      "decouple_lr=True divides by the learning rate at step 0, which is 0;"
      " expected a schedule that starts above 0."
    )
  return learning_rate


def _refuse_dtype(name: str, value: Any) -> None:
  if value is not None:
    raise ValueError(
      f"{name} is {value!r}; expected None: leave it out. Moments are computed in"
      " float32 and kept in 8 bits; to keep them in float32 give"
      " storage=flashoptim_jax.Storage(moment_bits=32)."
    )
