"""The interpreter of jaxprs, on every kind of equation that it may come by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend import core
from jax.extend.core import primitives

from flashoptim_jax.jaxprs import interpret

X = jnp.arange(1.0, 5.0)
Y = jnp.asarray([3.0, 1.0, 2.0, 5.0])


@jax.custom_jvp
def halved(x):
  return x / 2


halved.defjvp(lambda args, tangents: (halved(*args), 3 * tangents[0]))


@jax.custom_vjp
def doubled(x):
  return x * 2


doubled.defvjp(lambda x: (doubled(x), ()), lambda _, g: (5 * g,))


@jax.jit
def nested(x):
  return jax.jit(lambda y: jnp.sin(y) + 1)(x) * 2


def scanned(x):
  return lax.scan(lambda c, each: (nested(c) + each, c), x[0], x)


def looped(x):
  return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, nested(c[1])), (0, x))


def chosen(x):
  return lax.cond(x[0] > 0, nested, lambda x: x, x)


def with_reference(x):
  ref = jax.new_ref(x)
  before = ref[...]
  ref[...] = x * 2
  ref[1:] += before[1:]
  return before, jax.freeze(ref)


unknown_p = core.Primitive("known_to_nobody")
unknown_p.multiple_results = True
unknown_p.def_impl(lambda x, *, by: [x * by, x])
unknown_p.def_abstract_eval(lambda x, *, by: [x, x])

# Functions of X, and the primitives that are left of them when calls are gone.
FUNCTIONS = {
  "no_equations": (lambda x: x, []),
  "literal_result": (lambda x: 2.0, []),
  "no_results": (lambda x: (), []),
  "literals": (lambda x: x * 2 + 1, ["mul", "add"]),
  "constants": (lambda x: x * np.arange(4.0, dtype=np.float32) + Y, ["mul", "add"]),
  "repeated": (lambda x: (x, x + x, x), ["add"]),
  "several_results": (lambda x: lax.sort((x, -x), num_keys=1), ["neg", "sort"]),
  "unused_result": (lambda x: lax.top_k(x, 2)[1], ["top_k"]),
  "jit": (nested, ["sin", "add", "mul"]),
  "jit_of_constants": (jax.jit(lambda x: x + Y), ["add"]),
  "custom_jvp": (halved, ["div"]),
  "custom_vjp": (doubled, ["mul"]),
  "custom_within_jit": (jax.jit(lambda x: halved(doubled(x))), ["mul", "div"]),
  "checkpoint": (jax.checkpoint(nested), [primitives.remat_p.name]),
  "scan": (scanned, ["scan"]),
  "while": (looped, ["while"]),
  "cond": (chosen, ["cond"]),
  "unknown": (lambda x: unknown_p.bind(x, by=3), ["known_to_nobody"]),
}
# Primitives that only make other forms of the same values.
_FORMS = ("squeeze", "slice", "dynamic_slice", "gt", "convert_element_type", "copy")


def names(closed):
  return [eqn.primitive.name for eqn in closed.jaxpr.eqns]


@pytest.fixture(params=FUNCTIONS)
def case(request):
  f, left = FUNCTIONS[request.param]
  return f, jax.make_jaxpr(f)(X), left


@pytest.mark.parametrize("rule", [interpret.bind, interpret.enter_calls])
def test_same_values(case, rule):
  f, closed, _ = case
  found = interpret.evaluate(closed, [X], rule)
  expected = jax.tree.leaves(f(X))
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", [interpret.bind, interpret.enter_calls])
def test_tracers(rule):
  """Values may be of any transformation; derivatives are of what was bound."""

  def f(x):
    return jax.jit(lambda x: halved(doubled(x)))(x).sum()

  closed = jax.make_jaxpr(f)(X)
  found = jax.jit(jax.grad(lambda x: interpret.evaluate(closed, [x], rule)[0]))(X)
  custom = rule is interpret.bind
  np.testing.assert_array_equal(found, jnp.full(4, 15.0 if custom else 1.0))
  batch = jnp.stack([X, Y])
  np.testing.assert_array_equal(
    jax.vmap(lambda x: interpret.evaluate(closed, [x], rule)[0])(batch),
    jax.vmap(f)(batch),
  )


def test_inline_leaves_no_calls(case):
  """Loops, conditionals and jax.checkpoint stay as they are, with what is in them."""
  f, closed, left = case
  inlined = interpret.inline(closed)
  assert inlined.in_avals == closed.in_avals
  assert inlined.out_avals == closed.out_avals
  assert [name for name in names(inlined) if name not in _FORMS] == left
  for a, b in zip(core.jaxpr_as_fun(inlined)(X), jax.tree.leaves(f(X)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("custom", [halved, doubled])
def test_custom_call_as_it_stands(custom):
  """It is bound with its derivatives, which its parameters hold in another form."""
  closed = jax.make_jaxpr(custom)(X)
  (eqn,) = closed.jaxpr.eqns
  (result,) = interpret.bind(eqn, [X])
  np.testing.assert_array_equal(result, custom(X))
  again = jax.make_jaxpr(lambda x: interpret.bind(eqn, [x]))(X)
  assert names(again) == names(closed)


@pytest.mark.parametrize("f", [nested, halved, doubled, jax.checkpoint(nested)])
def test_called_program_is_closed(f):
  (eqn,) = jax.make_jaxpr(f)(X).jaxpr.eqns
  closed = interpret.called(eqn)
  assert isinstance(closed, core.ClosedJaxpr)
  (found,) = interpret.evaluate(closed, [X], interpret.enter_calls)
  np.testing.assert_array_equal(found, f(X))


@pytest.mark.parametrize("primitive", [primitives.closed_call_p, primitives.call_p])
def test_calls_of_every_name(primitive):
  """JAX makes these where it differentiates; one takes a program without constants."""
  (eqn,) = jax.make_jaxpr(nested)(X).jaxpr.eqns
  closed = eqn.params["jaxpr"]
  program = closed if primitive is primitives.closed_call_p else closed.jaxpr
  call = eqn.replace(primitive=primitive, params={"call_jaxpr": program})
  for rule in (interpret.bind, interpret.enter_calls):
    np.testing.assert_array_equal(rule(call, [X])[0], nested(X))
  entered = jax.make_jaxpr(lambda x: interpret.enter_calls(call, [x]))(X)
  assert names(entered) == ["sin", "add", "mul"]


@pytest.mark.parametrize("inline", [False, True])
def test_effects_in_order(inline):
  seen = []

  def note(x, what):
    io_callback(lambda x: seen.append((what, float(x))), None, x, ordered=True)

  @jax.jit
  def inner(x):
    note(x, "b")
    return x + 1

  def f(x):
    note(x, "a")
    x = inner(x)
    note(x, "c")
    note(inner(x), "d")

  closed = jax.make_jaxpr(f)(1.0)
  if inline:
    closed = interpret.inline(closed)
    assert closed.effects
    assert "jit" not in names(closed)
  interpret.evaluate(closed, [1.0])
  jax.effects_barrier()
  expected = [("a", 1.0), ("b", 1.0), ("c", 2.0), ("b", 2.0), ("d", 3.0)]
  assert seen == expected


def test_prune_keeps_results_and_effects():
  said = []

  def f(x):
    unused = jnp.sin(x)
    jnp.cos(unused)
    jax.debug.callback(said.append, x * 3)
    return x + 1, 2.0, x

  closed = interpret.prune(jax.make_jaxpr(f)(1.0))
  assert sorted(names(closed)) == ["add", "debug_callback", "mul"]
  assert interpret.evaluate(closed, [1.0]) == [2.0, 2.0, 1.0]
  jax.effects_barrier()
  assert said == [3.0]


def test_references():
  expected = with_reference(X)
  closed = jax.make_jaxpr(with_reference)(X)
  for program in (closed, interpret.inline(closed)):
    for run in (interpret.evaluate, jax.jit(interpret.evaluate, static_argnums=0)):
      for a, b in zip(run(program, [X]), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_references_as_arguments():
  @jax.jit
  def add(ref, x):
    ref[...] += x

  def f(ref, x):
    add(ref, x)
    ref[...] *= 2

  ref = jax.new_ref(X)
  closed = jax.make_jaxpr(f)(ref, Y)
  interpret.evaluate(closed, [ref, Y], interpret.enter_calls)
  np.testing.assert_array_equal(ref[...], 2 * (X + Y))


def test_dropped_results_are_not_kept():
  closed = jax.make_jaxpr(lambda x: lax.top_k(x, 2))(X)
  (eqn,) = closed.jaxpr.eqns
  values, indices = eqn.outvars
  dropped = core.DropVar(values.aval)
  env = interpret.environment(closed, [X])
  interpret.walk([eqn.replace(outvars=[dropped, indices])], env)
  assert env.keys() == {*closed.jaxpr.invars, indices}
  np.testing.assert_array_equal(env[indices], [3, 2])


def test_rule_gets_each_equation_in_order():
  """What a value is, is the rule's choice; constants and literals get theirs."""

  def f(x, y):
    z = nested(x) * Y
    return z + 1.0, y, 2.0, unknown_p.bind(y, by=2)[0]

  closed = jax.make_jaxpr(f)(X, X)
  seen = []

  def rule(eqn, values):
    seen.append((eqn.primitive.name, values))
    return [frozenset().union(*values)] * len(eqn.outvars)

  results = interpret.evaluate(
    closed,
    [frozenset("x"), frozenset("y")],
    rule,
    lambda value: frozenset(["const" if np.ndim(value) else "literal"]),
  )
  z = frozenset(["x", "const"])
  y, literal = frozenset("y"), frozenset(["literal"])
  assert results == [z | literal, y, literal, y]
  assert [name for name, _ in seen] == ["jit", "mul", "add", "known_to_nobody"]
  assert seen[1][1] == [frozenset("x"), frozenset(["const"])]


def test_rule_that_enters_calls_by_itself():
  def count(eqn, values, found):
    if eqn.primitive in interpret.CALLS:
      rule = functools.partial(count, found=found)
      return interpret.evaluate(interpret.called(eqn), values, rule)
    found.append(eqn.primitive)
    return [None] * len(eqn.outvars)

  closed = jax.make_jaxpr(lambda x: nested(nested(x)))(X)
  found = []
  interpret.evaluate(closed, [None], functools.partial(count, found=found))
  assert found == 2 * [primitives.sin_p, primitives.add_p, primitives.mul_p]


def test_some_equations_on_a_mapping_with_a_default():
  closed = jax.make_jaxpr(lambda x, i: (jnp.sin(x), (i + 1) * 2))(X, 3)

  class Unknown(dict):
    def __missing__(self, var):
      return None

  env = Unknown(interpret.environment(closed, [None, 3]))
  of_integers = [
    eqn
    for eqn in closed.jaxpr.eqns
    if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)
  ]
  interpret.walk(of_integers, env)
  unknown, known = interpret.read(closed.jaxpr.outvars, env)
  assert unknown is None
  assert known == 8


@pytest.mark.parametrize("results", [0, 2])
def test_rule_gives_a_value_for_each_result(results):
  closed = jax.make_jaxpr(jnp.sin)(X)
  with pytest.raises(ValueError, match="zip"):
    interpret.evaluate(closed, [X], lambda eqn, values: [X] * results)


def test_arguments_are_counted():
  with pytest.raises(ValueError, match="zip"):
    interpret.evaluate(jax.make_jaxpr(jnp.sin)(X), [X, X])


def test_rewrite():
  def rule(eqn, values):
    if eqn.primitive is primitives.sin_p:
      return [lax.cos(*values)]
    return interpret.enter_calls(eqn, values)

  closed = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(X)
  rewritten = interpret.rewrite(closed, rule)
  assert names(rewritten) == ["cos", "mul"]


def test_variables_and_sizes():
  closed = jax.make_jaxpr(lambda x: x * 2.0)(X)
  (eqn,) = closed.jaxpr.eqns
  assert interpret.variables(eqn) == closed.jaxpr.invars
  assert [interpret.shape(atom) for atom in eqn.invars] == [(4,), ()]
  assert [interpret.size(atom) for atom in eqn.invars] == [4, 1]
