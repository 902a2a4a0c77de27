"""ReDo: replace dormant units every so many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.distributed import sum_over_ranks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, check_init
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.engine.unit_sets import UnitSet, weights_of_producers
from lightning_plasticity.functional.redo import dormancy_scores, gradient_scores
from lightning_plasticity.units.find import HiddenUnits

Score: TypeAlias = Literal["activation", "gradient"]


class ReDo(UnitCallback):
    r"""ReDo: every so many steps, replaces all dormant units.

    A unit is dormant if its mean size of activation, over the examples of the last steps and relative to the mean of
    its layer, is at most ``threshold``: :math:`s_i = \overline{|h_i|} / \overline{\overline{|h|}} \le \tau`. A
    replaced unit gets incoming weights from their initial distribution, a bias of 0 and outgoing weights of 0. Where a
    whole layer is silent, all of it is dormant.

    Scores come from the forward passes of training, before the last step has changed the weights, where the authors run
    the new weights on a batch from the replay buffer.

    With ``score="gradient"`` (GraMa, ReGraMa) the size of the gradient of a unit's incoming weights takes the place of
    its activation: :math:`s_i = G_i / (\overline{G} + 10^{-9})` with :math:`G_i = \mathrm{mean}_j |\partial L /
    \partial W_{ij}|`. No activations are read, and it makes sense with any activation function. The gradients are those
    of the step just made, clipped and unscaled, and equal on all ranks: in a plain loop, call ``step()`` before
    ``zero_grad()``. A unit without gradient may also be one that has finished learning: where a whole layer has, all of
    it is replaced, and one batch is noisy, which ``score_steps`` helps against. The authors' code also redraws the last
    layer and leaves outgoing weights as they are; here, as in their paper (unconfirmed), hidden units only are
    replaced, and outgoing weights become 0.

    *Dormant* is also used for other measures: of how rarely a unit is active, or of its gradient.

    Args:
        threshold: :math:`\tau`; 0.1 and 0.025 have been published, and 0.01 for gradients (unconfirmed).
        every_n_train_steps: act after every so many optimizer steps.
        score_steps: the number of steps, the last ones before it acts, whose examples tell which units are dormant. One
            is enough for batches of some dozens; on a single example many ReLU units are idle that others need.
        score: what tells which units are dormant, ``"activation"`` or ``"gradient"``.
        init: where new incoming weights come from, as in ``ContinualBackprop``.
        module: the name of the module inside the model to work on; None for all of it.
        units: the sets of units, given by hand; None to find them.
        exclude: patterns of names of sets of units to leave alone.
        optimizer_state: what the optimizer remembers of weights that are written: ``"survivors"``, ``"reset"`` or
            ``"keep"``, as in ``ContinualBackprop``.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> _ = model[0].bias.data[:3].fill_(-100.0)  # three dead units
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> method = ReDo(threshold=0.0, every_n_train_steps=5)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(64, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     method.step()
        >>> method.replaced
        3

    References:
        Sokar et al., "The dormant neuron phenomenon in deep reinforcement learning", ICML 2023; arXiv 2302.12902. Liu
        et al., NeurIPS 2025; arXiv 2505.24061 (gradients).
    """

    def __init__(
        self,
        threshold: float = 0.025,
        every_n_train_steps: int = 1000,
        *,
        score_steps: int = 1,
        score: Score = "activation",
        init: Init = "empirical",
        module: str | None = None,
        units: Sequence[HiddenUnits] | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "survivors",
        seed: int | None = None,
    ) -> None:
        super().__init__(units=units, exclude=exclude, module=module, optimizer_state=optimizer_state, seed=seed)
        self.threshold = checks.number("threshold", threshold, least=0)
        self.every_n_train_steps = checks.count("every_n_train_steps", every_n_train_steps, least=1)
        self.score_steps = checks.count("score_steps", score_steps, least=1)
        if self.score_steps > self.every_n_train_steps:
            raise ValueError(
                f"score_steps must be at most every_n_train_steps, which is {every_n_train_steps}, got {score_steps}. "
                "Lower the one, or raise the other."
            )
        self.score: Score = checks.choice("score", score, get_args(Score))
        self.init = check_init(init)
        self.replaced = 0

    @override
    def _reset(self) -> None:
        self._initial = InitialDistribution(self.model, (), self.init)
        self._sizes: dict[int, Tensor] = {}  # of the units of sets that are due in this step
        self._gradients = self._population.zeros(0)  # of units, added up
        self._gradient_steps: list[int] = []  # of each set, over how many steps
        self.replaced = 0

    @override
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        self._initial.add(weights_of_producers(sets))
        more = self._population.zeros(sum(unit_set.units.size for unit_set in sets))
        self._gradients = torch.cat([self._gradients.to(more), more])
        self._gradient_steps += [0] * len(sets)
        self._listen()

    def _listen(self) -> None:
        """Only the forward passes of the steps whose examples decide need to be read."""
        is_near = any(self._decides(done + 1) for done in self._maturity.steps)
        self._population.activations.listening = is_near and self.score == "activation"

    def _decides(self, step: int) -> bool:
        """Whether the examples of this step of a set tell which of its units are dormant."""
        return -step % self.every_n_train_steps < self.score_steps

    def _is_due(self, index: int) -> bool:
        return self._maturity.steps[index] % self.every_n_train_steps == 0

    @override
    def _earn(self, index: int, eligible: int) -> bool | None:
        return True if self._is_due(index) else None

    @override
    def _take_gradients(self, sets: Sequence[int]) -> None:
        if self.score != "gradient":
            return
        deciding = [i for i in sets if self._decides(self._maturity.steps[i])]
        seen, sizes = self._population.gradient_sizes(deciding)
        if seen:
            self._gradients[self._population.places(seen)[0]] += sizes
            for i in seen:
                self._gradient_steps[i] += 1
        for i in sets:
            if self._is_due(i) and self._gradient_steps[i]:
                total = self._gradients[self._population.sets[i].span]
                self._sizes[i] = total / self._gradient_steps[i]
                total.zero_()
                self._gradient_steps[i] = 0

    @override
    def _measure(self, sets: Sequence[int]) -> None:
        # What others heard goes on adding up until their turn comes.
        taken = [i for i in sets if self._is_due(i) or not self._decides(self._maturity.steps[i])]
        if self.score == "gradient":
            self._population.take_means(sets)  # the first call was heard before it was known that none is wanted
        elif taken:
            sizes = self._population.mean_over_consumers(self._population.take_means(taken)[1], taken)
            of_each = torch.split(sizes, [self._population.sets[i].units.size for i in taken])
            self._sizes = dict(zip(taken, of_each, strict=True))

    @override
    def _act(self, due: Mapping[int, bool]) -> None:
        population = self._population
        sizes = [self._sizes.get(i, population.zeros(population.sets[i].units.size)) for i in due]
        heard = torch.tensor([i in self._sizes for i in due], dtype=torch.float64, device=population.device)
        *totals, ranks = sum_over_ranks([*sizes, heard])
        chosen = {}
        for i, total, count in zip(due, totals, ranks.tolist(), strict=True):
            # how many are dormant is only known on the device: this step waits for it
            if not total.isfinite().all():
                kind = "gradients" if self.score == "gradient" else "activations"
                self.leave_alone(population.sets[i].name, f"the {kind} of its units")
                continue
            scores = gradient_scores if self.score == "gradient" else dormancy_scores
            dormant = (scores(total / count) <= self.threshold).nonzero().squeeze(1)  # none is, if no rank heard any
            if len(dormant):
                chosen[i] = dormant
                self.replaced += len(dormant)
        population.replace(chosen, self._initial)
        self._sizes = {}

    @override
    def _finish(self, sets: Sequence[int]) -> None:
        self._listen()

    @override
    def _state_of_all(self) -> dict[str, Any]:
        return {"initial": self._initial.state_dict(), "replaced": self.replaced}

    @override
    def _restore_all(self, state: dict[str, Any]) -> None:
        self._initial.load_state_dict(state["initial"], partial=True)
        self.replaced = state["replaced"]

    @override
    def _state_of_set(self, index: int) -> dict[str, Any]:
        steps = self._gradient_steps[index]
        total = self._gradients[self._population.sets[index].span]
        return {"gradient": total.clone(), "gradient_steps": steps} if steps else {}

    @override
    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        self._gradients[self._population.sets[index].span] = state.get("gradient", 0.0)
        self._gradient_steps[index] = state.get("gradient_steps", 0)
        self._listen()

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        return {"replaced": self.replaced}
