"""Every optimizer that ``optax`` and ``optax.contrib`` export.

With the settings and learning rates that Optax's own tests of convergence use
(``alias_test.py``, ``contrib/_common_test.py``, ``contrib/_sam_test.py``), and
learning rates for the small language model.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from optax import contrib
from optax._src import alias

# Exports of optax.contrib in lower case that make no optimizer.
NOT_OPTIMIZERS = {
  "differentially_private_aggregate",
  "hutchinson_estimator_diag_hessian",
  "normalize",
  "schedule_free_eval_params",
}


class Optimizer(NamedTuple):
  """An optimizer.

  Attributes:
    make: Makes it, given a learning rate.
    rate: The learning rate of Optax's tests.
    lm_rate: That for the language model; None if it can't train one.
    steps: Steps that Optax's tests take.
    seeds: Seeds for the language model.
    needs: Extra arguments of ``update``: ``"value"``, ``"value_fn"`` (with value
      and grad), ``"obj_fn"``, or nothing. ``"examples"``: takes gradients of
      examples, along a first axis.
    note: Why something is left out.
  """

  make: Callable[[float], Any]
  rate: float
  lm_rate: float | None
  steps: int = 10_000
  seeds: int = 1
  needs: str = ""
  note: str = ""


def _alias(name: str, rate: float, lm_rate: float | None, seeds: int = 1, **kwargs):
  needs, note = kwargs.pop("needs", ""), kwargs.pop("note", "")
  factory = getattr(optax, name)
  make = functools.partial(factory, **kwargs)
  return Optimizer(make, rate, lm_rate, seeds=seeds, needs=needs, note=note)


def _contrib(name: str, rate: float, lm_rate: float | None, seeds: int = 1, **kwargs):
  needs, note = kwargs.pop("needs", ""), kwargs.pop("note", "")
  factory = getattr(contrib, name)
  make = functools.partial(factory, **kwargs)
  return Optimizer(make, rate, lm_rate, 30_000, seeds, needs, note)


def _schedule_free(rate: float):
  return contrib.schedule_free(optax.sgd(rate), learning_rate=rate)


def _sam(rate: float):
  return contrib.sam(optax.sgd(rate), optax.sgd(1e-2 * rate), sync_period=2)


OPTIMIZERS: dict[str, Optimizer] = {
  "adabelief": _alias("adabelief", 1e-2, 1e-3, 3),
  "adadelta": _alias("adadelta", 0.1, 1.0),
  "adafactor": _alias("adafactor", 5e-3, 1e-2),
  "adagrad": _alias("adagrad", 1.0, 2e-2),
  "adam": _alias("adam", 1e-1, 2e-3, 3),
  "adamax": _alias("adamax", 1e-1, 2e-3, 3),
  "adamaxw": _alias("adamaxw", 1e-1, 2e-3, 3),
  "adamw": _alias("adamw", 1e-1, 2e-3, 3),
  "adan": _alias("adan", 1e-1, 2e-3, 3),
  "amsgrad": _alias("amsgrad", 1e-1, 2e-3, 3),
  "fromage": _alias("fromage", 5e-3, 1e-2),
  "lamb": _alias("lamb", 1e-3, 5e-3, 3),
  "lars": _alias("lars", 1.0, 1.0),
  "lbfgs": Optimizer(
    lambda rate: optax.lbfgs(),
    1.0,
    None,
    needs="value_fn",
    note="(its line search needs one loss function, not one per batch)",
  ),
  "lion": _alias("lion", 1e-2, 3e-4, 3, weight_decay=1e-4),
  "nadam": _alias("nadam", 1e-2, 2e-3, 3),
  "nadamw": _alias("nadamw", 1e-2, 2e-3, 3),
  "noisy_sgd": _alias("noisy_sgd", 1e-3, 0.1, eta=1e-4, key=0),
  "novograd": _alias("novograd", 1e-3, 1e-2),
  "optimistic_adam": _alias("optimistic_adam", 2e-3, 2e-3),
  "optimistic_adam_v2": _alias("optimistic_adam_v2", 2e-3, 2e-3),
  "optimistic_gradient_descent": _alias(
    "optimistic_gradient_descent", 2e-3, 0.1, alpha=0.7, beta=0.1
  ),
  "polyak_sgd": Optimizer(
    lambda rate: optax.polyak_sgd(max_learning_rate=rate), 1.0, 0.1, needs="value"
  ),
  "radam": _alias("radam", 5e-3, 2e-3, 3),
  "rmsprop": _alias("rmsprop", 5e-3, 1e-3),
  "rmsprop, centered, momentum": _alias(
    "rmsprop", 5e-3, 2e-4, centered=True, momentum=0.9
  ),
  "rprop": _alias("rprop", 1e-1, 1e-4),
  "sgd": _alias("sgd", 1e-3, 0.1, 3, momentum=0.9),
  "sign_sgd": _alias("sign_sgd", 1e-1, 2e-4),
  "signum": _alias("signum", 1e-2, 2e-4),
  "sm3": _alias("sm3", 1.0, 0.1),
  "yogi": _alias("yogi", 1e-1, 2e-3, 3),
  "acprop": _contrib("acprop", 1e-3, 1e-3),
  "ademamix": _contrib("ademamix", 1e-3, 1e-3, 3),
  "adopt": _contrib("adopt", 1e-2, 1e-3),
  "cocob": _contrib("cocob", 1.0, 1.0),
  "dadapt_adamw": _contrib("dadapt_adamw", 1e-1, 1.0),
  "dog": _contrib("dog", 1.0, 1.0),
  "dowg": _contrib("dowg", 1.0, 1.0),
  "dpsgd": _contrib(
    "dpsgd",
    1e-3,
    None,
    l2_norm_clip=1.0,
    noise_multiplier=0.0,
    seed=0,
    needs="examples",
    note="(it takes one gradient per example)",
  ),
  "galore": _contrib("galore", 1e-2, 2e-3, rank=8),
  "madgrad": _contrib("madgrad", 1e-2, 2e-3),
  "mechanize": Optimizer(
    lambda rate: contrib.mechanize(optax.sgd(rate), weight_decay=0.0),
    1e-1,
    1.0,
    30_000,
  ),
  "momo": _contrib("momo", 1e-1, 0.3, needs="value"),
  "momo_adam": _contrib("momo_adam", 1e-1, 1e-2, needs="value"),
  "muon": _contrib("muon", 1e-2, 1e-2, 3),
  "prodigy": _contrib("prodigy", 1e-1, 1.0),
  "reduce_on_plateau": Optimizer(
    lambda rate: optax.chain(optax.sgd(rate), contrib.reduce_on_plateau()),
    1e-3,
    0.3,
    30_000,
    needs="value",
  ),
  "sam": Optimizer(_sam, 1e-3, 0.3, 50_000),
  "schedule_free": Optimizer(_schedule_free, 1e-2, 1.0, 30_000),
  "schedule_free_adamw": _contrib("schedule_free_adamw", 1e-2, 3e-3, warmup_steps=5000),
  "schedule_free_sgd": _contrib("schedule_free_sgd", 1e-2, 1.0, warmup_steps=5000),
  "simplified_ademamix": _contrib("simplified_ademamix", 1e-3, 1e-3),
  "sophia": _contrib("sophia", 1e-2, 1e-3, needs="obj_fn"),
  "split_real_and_imaginary": Optimizer(
    lambda rate: contrib.split_real_and_imaginary(optax.adam(rate)), 1e-1, 2e-3
  ),
}


def exported() -> set[str]:
  """The names of the optimizers that this version of Optax exports."""
  names = {
    name
    for name in dir(optax)
    if _is_function(getattr(optax, name))
    and hasattr(alias, name)
    and inspect.getmodule(_unwrap(getattr(optax, name))) is alias
  }
  return names | {
    name
    for name in dir(contrib)
    if _is_function(getattr(contrib, name))
    and not name.startswith(("_", "scale_by_"))
    and name not in NOT_OPTIMIZERS
  }


def _is_function(value: Any) -> bool:
  return inspect.isfunction(_unwrap(value))


def _unwrap(value: Any) -> Any:
  return value.func if isinstance(value, functools.partial) else value
