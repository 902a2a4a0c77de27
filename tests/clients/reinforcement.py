"""Reinforcement learning: the data come from the network that is trained, called in training mode without gradients."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from .harness import OF_A_TRAINING_STEP, Client, Config, Refusal, Run, fit, instantiate


class Corridor:
    """A point that is pushed to the left or the right and is to stay in the middle; it starts somewhere near it."""

    def reset(self) -> Tensor:
        self.state = torch.empty(4).uniform_(-0.05, 0.05)
        return self.state.clone()

    def step(self, action: int) -> tuple[Tensor, float, bool]:
        position, speed, angle, spin = self.state.tolist()
        push = 1.0 if action == 1 else -1.0
        position, speed = position + 0.1 * speed, speed + 0.1 * push
        angle, spin = angle + 0.1 * spin, spin + 0.1 * (angle - push)
        self.state = torch.tensor([position, speed, angle, spin])
        return self.state.clone(), 1.0, abs(position) > 1 or abs(angle) > 0.5


def mlp(inputs: int, outputs: int, hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Generated(IterableDataset):
    """What a function generates, anew in each epoch."""

    def __init__(self, generate: Callable[[], Iterator[Any]]) -> None:
        self.generate = generate

    def __iter__(self) -> Iterator[Any]:
        return self.generate()


class ActorCategorical(nn.Module):
    """A policy whose forward draws the action."""

    def __init__(self, actor_net: nn.Module) -> None:
        super().__init__()
        self.actor_net = actor_net

    def forward(self, states: Tensor) -> tuple[Categorical, Tensor]:
        pi = Categorical(logits=self.actor_net(states))
        return pi, pi.sample()


class PPO(pl.LightningModule):
    """Plays by calling itself as a whole, with one state without a batch dimension; trains actor and critic in turn."""

    def __init__(self, steps_per_epoch: int = 24, batch_size: int = 8, clip_ratio: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.env = Corridor()
        self.actor = ActorCategorical(mlp(4, 2))
        self.critic = mlp(4, 1)
        self.state = self.env.reset()

    def forward(self, x: Tensor) -> tuple[Categorical, Tensor, Tensor]:
        pi, action = self.actor(x)
        return pi, action, self.critic(x)

    def trajectories(self) -> Iterator[tuple[Tensor, ...]]:
        states, actions, logps, rewards, values = [], [], [], [], []
        for _ in range(self.hparams.steps_per_epoch):
            with torch.no_grad():
                pi, action, value = self(self.state)
                logps.append(pi.log_prob(action))
            states.append(self.state)
            actions.append(action)
            values.append(value.squeeze(-1))
            self.state, reward, done = self.env.step(int(action))
            rewards.append(reward)
            if done:
                self.state = self.env.reset()
        returns, total = [], 0.0
        for reward in reversed(rewards):
            total = reward + 0.9 * total
            returns.insert(0, total)
        for state, action, logp, value, target in zip(states, actions, logps, values, returns, strict=True):
            yield state, action, logp, torch.tensor(target), target - value

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        state, action, old_logp, target, advantage = batch
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        optimizer_actor, optimizer_critic = self.optimizers()

        pi, _ = self.actor(state)
        ratio = torch.exp(pi.log_prob(action) - old_logp)
        clipped = torch.clamp(ratio, 1 - self.hparams.clip_ratio, 1 + self.hparams.clip_ratio) * advantage
        loss_actor = -torch.min(ratio * advantage, clipped).mean()
        optimizer_actor.zero_grad()
        self.manual_backward(loss_actor)
        optimizer_actor.step()

        loss_critic = mse_loss(self.critic(state).squeeze(-1), target)
        optimizer_critic.zero_grad()
        self.manual_backward(loss_critic)
        optimizer_critic.step()
        self.log_dict({"loss_actor": loss_actor, "loss_critic": loss_critic})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.actor.parameters(), 0.01), torch.optim.Adam(self.critic.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Generated(self.trajectories), batch_size=self.hparams.batch_size)


class DQN(pl.LightningModule):
    """Plays a step inside `training_step`; a target network, which nobody trains, is copied every so often."""

    def __init__(self, sync_rate: int = 3, batch_size: int = 8, epsilon: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.env = Corridor()
        self.net = mlp(4, 2)
        self.target_net = copy.deepcopy(self.net)
        self.buffer: deque[tuple[Tensor, int, float, bool, Tensor]] = deque(maxlen=50)
        self.state = self.env.reset()
        for _ in range(20):
            self.play_step(epsilon=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @torch.no_grad()
    def play_step(self, epsilon: float) -> None:
        action = random.randrange(2) if random.random() < epsilon else int(self.net(self.state[None]).argmax(1))
        state, reward, done = self.env.step(action)
        self.buffer.append((self.state, action, reward, done, state))
        self.state = self.env.reset() if done else state

    def sample(self) -> Iterator[tuple[Tensor, int, float, bool, Tensor]]:
        yield from random.sample(self.buffer, 3 * self.hparams.batch_size - 4)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self.play_step(self.hparams.epsilon)
        states, actions, rewards, dones, next_states = batch
        values = self.net(states).gather(1, actions.long().unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            next_values = self.target_net(next_states).max(1)[0]
            next_values[dones] = 0.0
        loss = nn.MSELoss()(values, next_values.detach() * 0.9 + rewards.float())
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Generated(self.sample), batch_size=self.hparams.batch_size)


def train_ppo(callbacks: list[Config]) -> Run:
    return fit(PPO(), None, instantiate(callbacks))


def train_dqn(callbacks: list[Config]) -> Run:
    return fit(DQN(), None, instantiate(callbacks))


CLIENTS = [
    Client(
        "PPO, an actor that samples in `forward`",
        train_ppo,
        ("actor", "critic"),
        refused={"DirectionAwareShrink": OF_A_TRAINING_STEP},
    ),
    Client(
        "DQN with a target network",
        train_dqn,
        ("net",),
        refused={
            "DirectionAwareShrink": Refusal(
                "The training data must come from one DataLoader with a batch_size, over a dataset with a length",
                "What is drawn from a replay buffer has no end: which batches to pass over is to be said.",
            )
        },
    ),
]
