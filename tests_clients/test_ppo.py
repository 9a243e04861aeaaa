"""PPO as purejaxrl writes it: all of it in one ``jit``, ``vmap`` over seeds."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax.training.train_state import TrainState

import flashoptim_jax as fo

SEEDS, UPDATES, ENVIRONMENTS, ROLLOUT, EPOCHS, MINIBATCHES = 8, 24, 16, 16, 2, 2
LENGTH, DISCOUNT, LAMBDA, CLIP = 16, 0.97, 0.95, 0.2


def reset(key):
  """A place on a ring, and a goal."""
  return jax.random.randint(key, (2,), 0, LENGTH)


def observe(env):
  return jax.nn.one_hot(env, LENGTH).reshape(-1)


def act(key, env, action):
  """Moves; one for the goal, which then is elsewhere."""
  place, goal = (env[0] + action - 1) % LENGTH, env[1]
  reward = (place == goal).astype(jnp.float32)
  goal = jnp.where(reward, jax.random.randint(key, (), 0, LENGTH), goal)
  return jnp.stack([place, goal]), reward


class ActorCritic(linen.Module):
  @linen.compact
  def __call__(self, x):
    hidden = linen.tanh(linen.Dense(64)(linen.tanh(linen.Dense(128)(x))))
    return linen.Dense(3)(hidden), linen.Dense(1)(hidden)[..., 0]


class Transition(NamedTuple):
  observation: jax.Array
  action: jax.Array
  value: jax.Array
  reward: jax.Array
  log_prob: jax.Array


def log_prob(logits, action):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[..., 0]


def advantages(steps, last_value):
  def backwards(carry, step):
    advantage, next_value = carry
    delta = step.reward + DISCOUNT * next_value - step.value
    advantage = delta + DISCOUNT * LAMBDA * advantage
    return (advantage, step.value), advantage

  carry = jnp.zeros_like(last_value), last_value
  return jax.lax.scan(backwards, carry, steps, reverse=True)[1]


def ppo_loss(params, apply_fn, steps, advantage, target):
  logits, value = apply_fn(params, steps.observation)
  ratio = jnp.exp(log_prob(logits, steps.action) - steps.log_prob)
  advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
  clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage
  actor = -jnp.minimum(ratio * advantage, clipped).mean()
  clipped = steps.value + jnp.clip(value - steps.value, -CLIP, CLIP)
  critic = jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean() / 2
  probabilities = jax.nn.softmax(logits)
  entropy = -(probabilities * jax.nn.log_softmax(logits)).sum(-1).mean()
  return actor + 0.5 * critic - 0.01 * entropy


def train(make, weights, key):
  """Mean rewards of one seed, update by update."""
  schedule = optax.linear_schedule(3e-3, 0.0, UPDATES * EPOCHS * MINIBATCHES)
  # The line that differs between runs.
  tx = optax.chain(optax.clip_by_global_norm(0.5), make(schedule, eps=1e-5))

  network = ActorCritic()
  key, init_key, env_key = jax.random.split(key, 3)
  params = network.init(init_key, jnp.zeros(2 * LENGTH))
  if weights != "float32":
    params = fo.cast_params(params, jnp.bfloat16)
  state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
  env = jax.vmap(reset)(jax.random.split(env_key, ENVIRONMENTS))

  def env_step(carry, key):
    state, env = carry
    observation = jax.vmap(observe)(env)
    logits, value = state.apply_fn(state.params, observation)
    keys = jax.random.split(key, ENVIRONMENTS + 1)
    action = jax.random.categorical(keys[0], logits)
    env, reward = jax.vmap(act)(keys[1:], env, action)
    step = Transition(observation, action, value, reward, log_prob(logits, action))
    return (state, env), step

  def minibatch(state, batch):
    grads = jax.grad(ppo_loss)(state.params, state.apply_fn, *batch)
    return state.apply_gradients(grads=grads), None

  def update(carry, key):
    state, env = carry
    keys = jax.random.split(key, ROLLOUT + EPOCHS)
    (state, env), steps = jax.lax.scan(env_step, (state, env), keys[:ROLLOUT])
    _, last_value = state.apply_fn(state.params, jax.vmap(observe)(env))
    advantage = advantages(steps, last_value)
    batch = steps, advantage, advantage + steps.value

    def epoch(state, key):
      order = jax.random.permutation(key, ROLLOUT * ENVIRONMENTS)
      batches = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[order].reshape(
          MINIBATCHES, -1, *x.shape[2:]
        ),
        batch,
      )
      return jax.lax.scan(minibatch, state, batches)

    state, _ = jax.lax.scan(epoch, state, keys[ROLLOUT:])
    return (state, env), steps.reward.mean()

  keys = jax.random.split(key, UPDATES)
  return jax.lax.scan(update, (state, env), keys)[1]


@functools.cache
def rewards(make, weights):
  """Of shape (updates,), the seeds' means."""
  keys = jax.random.split(jax.random.key(0), SEEDS)
  run = jax.jit(jax.vmap(functools.partial(train, make, weights)))
  return np.asarray(run(keys)).mean(0)


@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_rewards_beside_optax(weights):
  theirs, ours = rewards(optax.adam, "float32"), rewards(fo.adam, weights)
  last = UPDATES // 4
  assert theirs[-last:].mean() > 2 * theirs[0]
  np.testing.assert_allclose(ours[-last:].mean(), theirs[-last:].mean(), rtol=0.05)
