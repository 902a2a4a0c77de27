"""The study of slowly-changing regression, with few examples."""

import csv
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from lightning_plasticity import find_units


@pytest.fixture
def study(monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "slowly_changing_regression.py"
    spec = importlib.util.spec_from_file_location("slowly_changing_regression", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FLIP_EVERY", 20)
    monkeypatch.setattr(module, "BLOCK", 40)
    return module


def rows(results):
    return list(csv.DictReader(results.with_suffix(".csv").read_text().splitlines()))


def call(study, results, *options):
    study.main(["--examples", "160", "--results", str(results), "--seeds", "0", "1", *options])


def test_one_slow_bit_flips_at_a_time_and_the_target_stays(study):
    data = study.stream(3)
    parts = [next(data) for _ in range(6)]
    slow = [bits[:, : study.FLIPPING] for bits, _ in parts]
    assert all((x == x[0]).all() for x in slow)
    assert [int((a[0] != b[0]).sum()) for a, b in itertools.pairwise(slow)] == [1] * 5
    fast = torch.cat([bits[:, study.FLIPPING :] for bits, _ in parts])
    assert fast.shape[1] == 5
    assert len(fast.unique(dim=0)) > 16
    by_bits = {}
    for bits, target in parts:
        for x, y in zip(bits.tolist(), target.tolist(), strict=True):
            assert by_bits.setdefault(tuple(x), y) == y
    assert len(set(by_bits.values())) > 1


def test_a_unit_of_the_target_is_on_where_70_percent_of_its_inputs_are_as_it_wants_them(study):
    target = study.Target(torch.Generator().manual_seed(0))
    bits = torch.randint(2, (50, study.INPUTS), generator=torch.Generator().manual_seed(1)).float()
    with_constant = torch.cat([bits, torch.ones(50, 1)], 1)
    agreeing = (with_constant[:, :, None] == (target.incoming > 0).float()).float().mean(1)
    expected = ((agreeing > 0.7).float() * target.outgoing[:, 0]).sum(1)
    assert torch.equal(target.of(bits), expected)


@pytest.mark.parametrize("arm", ["SGD", "Adam 0.001"])
def test_learners_side_by_side_learn_what_each_would_alone(study, arm):
    def trained(seeds):
        learners = study.Learners(seeds)
        inputs, targets = (torch.stack(x, 1) for x in zip(*(next(study.stream(seed)) for seed in seeds), strict=True))
        error = study.learn(learners, study.ARMS[arm].optimizer(learners.parameters()), None, inputs, targets)
        return learners, error

    together, errors = trained([0, 1])
    for i in range(2):
        alone, error = trained([i])
        assert torch.equal(errors[i], error[0])
        for a, b in zip(together.learners[i].parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b)


def test_continual_backprop_works_on_each_learner(study):
    found = find_units(study.Learners([0, 1, 2]), torch.zeros(1, 3, study.INPUTS))
    assert {units.name: units.size for units in found} == {f"learners.{i}.0": study.HIDDEN for i in range(3)}


def test_rows_table_and_picture_and_a_second_call_runs_nothing(study, tmp_path):
    results = tmp_path / "found"
    call(study, results)
    written = rows(results)
    assert [(r["arm"], r["seed"], r["examples"]) for r in written] == [
        (arm, str(seed), str(seen)) for arm in study.ARMS for seen in (40, 80, 120, 160) for seed in (0, 1)
    ]
    errors = torch.tensor([float(r["squared_error"]) for r in written if r["arm"] == "Adam 0.001"]).view(4, 2)
    last = errors[2:].mean(0)
    line = next(x for x in results.with_suffix(".md").read_text().splitlines() if x.startswith("| Adam 0.001 |"))
    assert line.split(" | ")[3] == f"{last.mean():.3f} ± {last.std():.3f}"
    assert results.with_suffix(".png").stat().st_size > 0
    call(study, results)
    assert rows(results) == written


def test_an_interrupted_run_is_begun_anew(study, tmp_path, monkeypatch):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    call(study, whole, "--arm", "SGD, ContinualBackprop")

    write, written = study.write_row, []

    def write_three(file, columns, row):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(row)
        write(file, columns, row)

    with monkeypatch.context() as patch:
        patch.setattr(study, "write_row", write_three)
        with pytest.raises(KeyboardInterrupt):
            call(study, interrupted, "--arm", "SGD, ContinualBackprop")
    assert len(rows(interrupted)) == 3
    call(study, interrupted, "--arm", "SGD, ContinualBackprop")
    assert rows(interrupted)[3:] == rows(whole)
    assert interrupted.with_suffix(".md").read_text() == whole.with_suffix(".md").read_text()


def test_only_whole_blocks(study, capsys):
    with pytest.raises(SystemExit):
        study.main(["--examples", "50"])
    assert "--examples must be a multiple of 40, got 50" in capsys.readouterr().err
