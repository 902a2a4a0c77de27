"""A small stream of reinforcement learning: what should Adam remember of units that are replaced?

    python examples/benchmarks/dqn_catch.py

Catch: a ball falls through a board of 10 by 5 fields, and a paddle in the last row has to be where it lands; the return
of an episode is 1 or -1. What is seen are the 50 fields, in an order that changes every 5,000 steps, and with it what
the three actions mean: a new game to learn each time, as hard as the last. DQN with a target network and Adam, which
learns from 32 remembered steps after every second step. A row of `dqn_catch.csv` is written after each game. A second
call runs what is missing, and begins runs that were interrupted anew; several calls at once may share the file with
different `--arm` or `--seed`. Every call writes the table from all rows that are there.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import get_args

import torch
from study_rows import Curves, mean_and_std, write_row
from torch import Tensor, nn

from lightning_plasticity import ActivationReset, ContinualBackprop, ReDo
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional import dead_units, effective_rank, weight_magnitude

ROWS, COLUMNS = 10, 5
FIELDS, ACTIONS, HIDDEN = ROWS * COLUMNS, 3, 64
GAME = 5_000  # steps, and how many of them are remembered
BATCH, LEARN_EVERY, RENEW_TARGET_EVERY = 32, 2, 200
DISCOUNT, EXPLORE, LEARNING_RATE = 0.95, 0.05, 1e-3
FIRST = LAST = 3  # games that count as the first and the last ones
METHODS: dict[str, Callable[[int, OptimizerState], PlasticityCallback]] = {
    "ContinualBackprop": lambda seed, memory: ContinualBackprop(optimizer_state=memory, seed=seed),
    "ActivationReset": lambda seed, memory: ActivationReset("relu", optimizer_state=memory, seed=seed),
    "ReDo": lambda seed, memory: ReDo(optimizer_state=memory, seed=seed),
}
# The name of an arm: what makes its method from a seed, and what the optimizer remembers.
ARMS: dict[str, tuple[str, OptimizerState] | None] = {"plain": None} | {
    f"{method}, {memory}": (method, memory) for method in METHODS for memory in get_args(OptimizerState)
}
KEY = ("arm", "seed", "game")
MEASURES = ("mean_return", "dead_units", "effective_rank", "weight_magnitude")


class Catch:
    """The game; what is seen of it are the places of ball and paddle among the fields, in this game's order."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.change()

    def _draw(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._generator))

    def change(self) -> None:
        """Begin a new game, with another order of the fields and other meanings of the actions."""
        self._order = torch.randperm(FIELDS, generator=self._generator).tolist()
        self._moves = (torch.randperm(ACTIONS, generator=self._generator) - 1).tolist()
        self._begin()

    def _begin(self) -> None:
        self._row, self._column, self._paddle = 0, self._draw(COLUMNS), self._draw(COLUMNS)

    def seen(self) -> tuple[int, int]:
        """Which two fields are on."""
        ball, paddle = self._row * COLUMNS + self._column, (ROWS - 1) * COLUMNS + self._paddle
        return self._order[ball], self._order[paddle]

    def step(self, action: int) -> tuple[float, bool]:
        """Move; returns the reward and whether the episode is over."""
        self._paddle = min(max(self._paddle + self._moves[action], 0), COLUMNS - 1)
        self._row += 1
        if self._row < ROWS - 1:
            return 0.0, False
        reward = 1.0 if self._column == self._paddle else -1.0
        self._begin()
        return reward, True


class Memory:
    """The last steps: fields seen, action, reward, fields seen next, whether the episode went on."""

    def __init__(self) -> None:
        self._fields, self._rest = torch.zeros(GAME, 4, dtype=torch.long), torch.zeros(GAME, 3)
        self.steps = 0

    def add(self, seen: tuple[int, int], action: int, reward: float, then: tuple[int, int], is_over: bool) -> None:
        """Remember a step, in place of the oldest."""
        place = self.steps % GAME
        self._fields[place] = torch.tensor([*seen, *then])
        self._rest[place] = torch.tensor([action, reward, 0.0 if is_over else 1.0])
        self.steps += 1

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A batch of steps: what was seen, actions, rewards, what was seen next, 1 where the episode went on."""
        chosen = torch.randint(min(self.steps, GAME), (BATCH,), generator=generator)
        fields, (actions, rewards, goes_on) = self._fields[chosen], self._rest[chosen].unbind(1)
        return boards(fields[:, :2]), actions.long(), rewards, boards(fields[:, 2:]), goes_on

    def some_boards(self) -> Tensor:
        """Those of the last 1,000 steps, or of all that are remembered."""
        return boards(self._fields[torch.arange(self.steps - min(GAME, 1000), self.steps) % GAME][:, :2])


def boards(fields: Tensor) -> Tensor:
    """From the numbers of the fields that are on to inputs."""
    return torch.zeros(len(fields), FIELDS).scatter_(1, fields, 1.0)


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FIELDS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, ACTIONS)
    )


class Agent:
    """DQN, and what looks after its network."""

    def __init__(self, arm: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = make_network()
        self.target = deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        self.method: PlasticityCallback | None = None
        if made := ARMS[arm]:
            method, memory = made
            self.method = METHODS[method](seed, memory)
            self.method.attach(self.network, self.optimizer, example_inputs=(torch.zeros(1, FIELDS),))
        self.memory, self._generator, self._updates = Memory(), torch.Generator().manual_seed(seed), 0

    @torch.no_grad()
    def act(self, seen: tuple[int, int]) -> int:
        """Take the action of the highest value, or now and then any."""
        if float(torch.rand((), generator=self._generator)) < EXPLORE:
            return int(torch.randint(ACTIONS, (), generator=self._generator))
        return int(self.network(boards(torch.tensor([seen]))).argmax())

    def learn(self) -> None:
        """One update, from a batch of remembered steps."""
        seen, actions, rewards, then, goes_on = self.memory.draw(self._generator)
        with torch.no_grad():
            wanted = rewards + DISCOUNT * goes_on * self.target(then).amax(1)
        values = self.network(seen).gather(1, actions[:, None]).squeeze(1)
        self.optimizer.zero_grad()
        nn.functional.smooth_l1_loss(values, wanted).backward()
        self.optimizer.step()
        if self.method is not None:
            self.method.step()
        self._updates += 1
        if self._updates % RENEW_TARGET_EVERY == 0:
            self.target.load_state_dict(self.network.state_dict())


def play(agent: Agent, catch: Catch) -> float:
    """One game; returns the mean return of its episodes."""
    returns = []
    for _ in range(GAME):
        seen = catch.seen()
        action = agent.act(seen)
        reward, is_over = catch.step(action)
        # Where an episode is over the next fields do not count.
        agent.memory.add(seen, action, reward, catch.seen(), is_over)
        if is_over:
            returns.append(reward)
        if agent.memory.steps >= BATCH and agent.memory.steps % LEARN_EVERY == 0:
            agent.learn()
    return sum(returns) / len(returns)


@torch.no_grad()
def measure(network: nn.Sequential, inputs: Tensor) -> dict[str, float]:
    """The state of the hidden layers, as means over them, and the size of all weights."""
    first = network[:2](inputs)
    hidden = [first, network[2:4](first)]
    return {
        "dead_units": sum(float(dead_units(x)) for x in hidden) / 2,
        "effective_rank": sum(float(effective_rank(x)) for x in hidden) / 2,
        "weight_magnitude": float(weight_magnitude(network)),
    }


def run(arm: str, seed: int, games: int, results: Path) -> None:
    agent, catch = Agent(arm, seed), Catch(torch.Generator().manual_seed(seed))
    for game in range(1, games + 1):
        if game > 1:
            catch.change()
        row = {"arm": arm, "seed": seed, "game": game, "mean_return": play(agent, catch)}
        row |= measure(agent.network, agent.memory.some_boards())
        write_row(results.with_suffix(".csv"), [*KEY, *MEASURES], row)
    print(f"{arm}, seed {seed}: mean return {row['mean_return']:.2f} in game {games}", flush=True)


# ---- what came out


EXPLANATION = """Written by `dqn_catch.py`. {games} games of {game:,} steps, DQN with two layers of {hidden} ReLU units,
Adam {lr}, batch {batch}, one update every {every} steps. Returns are means over all episodes of a game, from -1 to 1.
Dead units, effective rank (on the last 1,000 steps of a game) and the mean size of the weights are means over the last
{last} games. ± is the standard deviation over seeds."""


def report(results: Curves, games: int) -> str:
    first, last = f"games 1 to {FIRST}", f"games {max(1, games - LAST + 1)} to {games}"
    lines = [
        f"| arm | seeds | return, {first} | {last} | all games | dead units, % | effective rank | weight magnitude |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        seeds = results.seeds(arm, last=games)
        if not seeds:
            continue
        curves = {m: results.of(arm, times=range(1, games + 1), measure=m) for m in MEASURES}
        returns, ends = curves["mean_return"], {m: curve[:, -LAST:].mean(1) for m, curve in curves.items()}
        cells = [arm, str(len(seeds)), mean_and_std(returns[:, :FIRST].mean(1), 3)]
        cells += [mean_and_std(ends["mean_return"], 3), mean_and_std(returns.mean(1), 3)]
        cells += [mean_and_std(100 * ends["dead_units"], 1), mean_and_std(ends["effective_rank"], 1)]
        cells.append(mean_and_std(ends["weight_magnitude"], 3))
        lines.append(f"| {' | '.join(cells)} |")
    explanation = EXPLANATION.format(
        games=games, game=GAME, hidden=HIDDEN, lr=LEARNING_RATE, batch=BATCH, every=LEARN_EVERY, last=LAST
    )
    return f"# DQN on Catch that changes\n\n{explanation}\n\n" + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--games", type=int, default=6)
    parser.add_argument(
        "--results", type=Path, default=Path("dqn_catch"), help="where to write .csv and .md, without the ending"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is too small to gain from more
    csv_file = options.results.with_suffix(".csv")
    for seed in options.seed:
        for arm in options.arm:
            if seed not in Curves(csv_file, KEY).seeds(arm, last=options.games):
                run(arm, seed, options.games, options.results)
    options.results.with_suffix(".md").write_text(report(Curves(csv_file, KEY), options.games))


if __name__ == "__main__":
    main()
