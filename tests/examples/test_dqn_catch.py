"""The study of DQN on Catch, with few steps: the game is the one described, and the agent learns it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples/benchmarks/dqn_catch.py"


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("dqn_catch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def follow(catch, study):
    """The action that brings the paddle under the ball, from what the game keeps to itself."""
    way = np.sign(catch._column - catch._paddle)
    return catch._moves.index(way)


def test_whoever_follows_the_ball_wins_and_whoever_stands_still_mostly_does_not(study):
    catch = study.Catch(torch.Generator().manual_seed(0))
    for _ in range(2):
        for player, expected in ((follow, 1.0), (lambda catch, _: catch._moves.index(0), -0.6)):
            rewards = []
            for _ in range(200 * (study.ROWS - 1)):
                reward, is_over = catch.step(player(catch, study))
                rewards += [reward] if is_over else []
                assert is_over or reward == 0.0
            assert len(rewards) == 200
            assert np.mean(rewards) == pytest.approx(expected, abs=0.2 if expected < 0 else 0.0)
        catch.change()


def test_a_change_reorders_what_is_seen_and_what_actions_do(study):
    catch = study.Catch(torch.Generator().manual_seed(1))
    fields = set()
    for _ in range(300):
        fields |= set(catch.seen())
        catch.step(0)
    assert len(fields) > 30
    before = list(catch._order), list(catch._moves)
    catch.change()
    assert sorted(catch._order) == list(range(study.FIELDS)) != catch._order != before[0]
    assert sorted(catch._moves) == [-1, 0, 1]


def test_memory_gives_back_what_was_added_and_forgets_the_oldest(study, monkeypatch):
    monkeypatch.setattr(study, "GAME", 8)
    memory = study.Memory()
    for i in range(11):
        memory.add((i, 20 + i), i % 3, float(i), (i + 1, 21 + i), i % 2 == 0)
    seen, actions, rewards, then, goes_on = memory.draw(torch.Generator().manual_seed(0))
    assert set(rewards.tolist()) == {float(i) for i in range(3, 11)}
    for k, i in enumerate(rewards.int().tolist()):
        assert seen[k].nonzero().flatten().tolist() == [i, 20 + i]
        assert then[k].nonzero().flatten().tolist() == [i + 1, 21 + i]
        assert (actions[k], goes_on[k]) == (i % 3, float(i % 2))


def test_the_agent_learns_the_first_game(study):
    agent, catch = study.Agent("ContinualBackprop, survivors", 0), study.Catch(torch.Generator().manual_seed(0))
    catch_steps, study.GAME = study.GAME, 1500
    try:
        first = study.play(agent, catch)
        second = study.play(agent, catch)
    finally:
        study.GAME = catch_steps
    assert second > max(first, 0.3)


def test_rows_and_table_and_a_second_call_runs_nothing(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "GAME", 100)
    monkeypatch.setattr(study, "LEARN_EVERY", 10)

    def call():
        study.main(["--games", "2", "--seed", "0", "1", "--results", str(tmp_path / "found")])
        return (tmp_path / "found.csv").read_text().splitlines(), (tmp_path / "found.md").read_text()

    rows, table = call()
    assert len(rows) == 1 + 2 * 2 * len(study.ARMS)
    assert call() == (rows, table)
    plain = np.array([float(row.split(",")[3]) for row in rows if row.startswith("plain")]).reshape(2, 2)
    line = next(line for line in table.splitlines() if line.startswith("| plain"))
    assert line.split(" | ")[4] == f"{plain.mean():.3f} ± {plain.mean(1).std(ddof=1):.3f}"
