"""How much of which prompt should each of the next steps compute? The (mixed-integer) linear program of prefill.

f[r,k] is the part of prompt r's remaining work that step k does: n = f x tokens of every layer (axis "tokens"), or all
its tokens through m = f x layers (axis "layers"). z_k: step k has prompts; D_k: sequences that decode in it.

    finish   sum over k of f[r,k]  = 1                            (<= 1 where the horizon may end before)
    time     T_k >= host + prompt z + base_i + reload_i z + token_i sum n + decode_i D + attention + context K  every i
             T_k >= host + prompt z + blocks(0, D) + R u + sum f h_r + attention + context K  layers; f[r,k] <= u_k
    TBT      T_k <= tbt                        budget   sum of n <= tau z_k  (layers: tokens of those that take part)
    KV       sum over j <= k of n[r,j]  + what the decodes have written      <= kv_tokens

Layers: u_k is the part of the layers that prompts pass, R = blocks(0+, D) - blocks(0, D) what reloading all of them
costs and h_r = blocks(L_r, D) - blocks(0+, D) >= 0. blocks is convex in the tokens, so prompts that share layers cost
at least R u + sum f h_r; with one prompt or one piece, exactly that. Prompts at different layers reload the layers of
each, more than u says: there the program is a lower bound.

Objectives. "proxy": mean_step_s sum of w_r sum over k of (1 - sum over j <= k of f[r,j]), plus `reload` per step with
prompts: every step is taken to last as long as the mean one, a finished half counts as half. It is linear, and what is
solved for 64 prompts and 64 steps. "exact": sum of w_r (end of the step in which f[r] is complete - release), steps of
any length, with y[r,k] = 1 once r is complete and q[r,k] >= T_k + idle_k - M y[r,k-1] the wait of r in step k.

Attention. "mean" charges every token the prompt's mean position, before + L/2: the sum over a prompt is exact, its
first chunk is overcharged and its last undercharged. "tangent" has cumulative attention >= tangents of L^2 F^2 / 2 at
the cumulative fraction F: at no time more than the truth, and equal to it at the end, so that the optimum is a lower
bound. On the layer axis both are the same, and exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal

import numpy as np
import pulp

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillhorizon import Horizon
from planner.prefillsolution import Found, run

Objective = Literal["proxy", "exact"]
Attention = Literal["mean", "tangent"]
#: Fractions of a prompt at which tangents of its attention touch.
TOUCH = (0.0, 0.25, 0.5, 0.75, 1.0)


class Program:
    """The program of the module: variables, then one method for each family of rows."""

    def __init__(
        self,
        horizon: Horizon,
        objective: Objective = "proxy",
        mean_step_s: float = 1.0,
        attention: Attention = "mean",
        relaxed: bool = False,
    ) -> None:
        """Build it.

        mean_step_s   of the proxy; relaxed: z and y may be fractions, which leaves a linear program
        """
        self.h, self.exact, self.attention = horizon, objective == "exact", attention
        self.cat = pulp.LpContinuous if relaxed else pulp.LpBinary
        self.relaxed = relaxed
        self.problem = pulp.LpProblem("prefill", pulp.LpMinimize)
        self.R, self.K = range(len(horizon.prompts)), range(horizon.steps)
        self.most_s = self._longest()
        self._variables()
        self._finish()
        for k in self.K:
            self._time(k)
            self._budget(k)
        self._kv()
        if self.attention == "tangent" and horizon.axis == "tokens":
            self._tangents()
        if self.exact:
            self._order()
            self._releases()
            cost = [(p.weight, q) for r, p in enumerate(horizon.prompts) for q in self.q[r]]
            released = sum(p.weight * p.release_s for p in horizon.prompts)
            self.problem += pulp.LpAffineExpression([(q, w) for w, q in cost]) - released
        else:
            self._proxy(mean_step_s)

    def _longest(self) -> float:
        """Seconds that no step of interest exceeds."""
        if self.h.tbt_s < inf:
            return self.h.tbt_s
        step, prompts = self.h.step, self.h.prompts
        decodes, context = self.h.decodes(0)
        decodes += len(prompts)
        tokens = sum(p.tokens for p in prompts)
        attended = context + len(self.K) * decodes + sum(p.tokens + p.before for p in prompts)
        return (
            step.step_s(decodes, attended, ())
            + step.prompt_s
            + sum(p.reload_s + p.token_s * tokens for p in step.pieces)
            + step.attention_s * sum(p.tokens * (p.before + p.tokens) for p in prompts)
        )

    def _variables(self) -> None:
        add, h = self.problem.add_variable, self.h
        self.T: list[Any] = [
            add(f"T_{k}", 0.0, max(self.most_s, h.limit_s(k) if h.tbt_s < inf else 0.0)) for k in self.K
        ]
        self.z: list[Any] = [add(f"z_{k}", 0.0, 1.0, self.cat) for k in self.K]
        self.G: list[Any] = []
        self.n: list[list[Any]] = []  # f[r,k] = n[r,k] / parts[r]
        self.parts: list[int] = []
        for r, prompt in enumerate(h.prompts):
            whole = h.grain is not None and not self.relaxed
            left = prompt.tokens if h.axis == "tokens" else h.step.layers - prompt.layers
            self.parts.append(left // h.grain if whole and h.grain else 1)
            kind = pulp.LpInteger if whole else pulp.LpContinuous
            self.n.append([add(f"n_{r}_{k}", 0, self.parts[r], kind) for k in self.K])
        self.u: list[Any] = [add(f"u_{k}", 0.0, 1.0) for k in self.K] if h.axis == "layers" else []
        self.y: list[list[Any]] = []
        self.q: list[list[Any]] = []
        self.idle: list[Any] = []
        if self.exact:
            self.y = [[add(f"y_{r}_{k}", 0.0, 1.0, self.cat) for k in self.K] for r in self.R]
            self.q = [[add(f"q_{r}_{k}", 0.0) for k in self.K] for r in self.R]
            latest = max((p.release_s for p in h.prompts), default=0.0)
            self.idle = [add(f"idle_{k}", 0.0, latest) for k in self.K]

    def _work(self, k: int, each: Sequence[float]) -> Any:
        """Sum over the prompts of a coefficient times f[r,k]."""
        return pulp.LpAffineExpression([(self.n[r][k], each[r] / self.parts[r]) for r in self.R if each[r]])

    def _so_far(self, r: int, k: int) -> Any:
        """Sum over j <= k of f[r,j]."""
        return pulp.LpAffineExpression([(n, 1.0 / self.parts[r]) for n in self.n[r][: k + 1]])

    def _part(self, r: int) -> float:
        """Part of all layers that f[r] = 1 stands for."""
        if self.h.axis == "tokens":
            return 1.0
        return (self.h.step.layers - self.h.prompts[r].layers) / self.h.step.layers

    def _finish(self) -> None:
        """Every prompt's work adds up to one, or to less where the horizon may end before."""
        for r in self.R:
            done = self._so_far(r, len(self.K) - 1)
            self.problem += done == 1 if self.h.finish else done <= 1

    def _alive(self, k: int) -> list[tuple[int, Any]]:
        """(prompt, 1 if it decodes in step k) of prompts that this horizon completes."""
        found = []
        for r, prompt in enumerate(self.h.prompts):
            if k == 0 or prompt.outputs == 1:
                continue
            gone = k - prompt.outputs
            if self.exact:
                found.append((r, self.y[r][k - 1] - (self.y[r][gone] if gone >= 0 else 0)))
        return found

    def _time(self, k: int) -> None:
        """Steps last at least as long as each piece of the step model says."""
        h, step, z = self.h, self.h.step, self.z[k]
        count, context = h.decodes(k)
        alive = self._alive(k)
        active: Any = 1.0 if count else z
        if alive and not count:
            active = self.problem.add_variable(f"s_{k}", 0.0, 1.0)
            self.problem += active >= z
            for _, decodes in alive:
                self.problem += active >= decodes
        attended = [(h.prompts[r].tokens + h.prompts[r].before, d) for r, d in alive]
        common = pulp.lpSum([step.context_s * tokens * d for tokens, d in attended])
        common += step.context_s * context + step.host_s * active + step.prompt_s * z + self._attended(k)
        work = self._work(k, [p.tokens * self._part(r) for r, p in enumerate(h.prompts)])
        more = pulp.lpSum([d for _, d in alive])
        through: Any = z if h.axis == "tokens" else self.u[k]
        passed = active  # part of the layers whose weights are read
        if h.axis == "layers" and not count:
            passed = self.u[k]
            if alive:
                passed = self.problem.add_variable(f"l_{k}", 0.0, 1.0)
                self.problem += passed >= self.u[k]
                for _, decodes in alive:
                    self.problem += passed >= decodes
        for piece in step.pieces:
            row = common + piece.base_s * passed + piece.reload_s * through + piece.token_s * work
            self.problem += self.T[k] >= row + piece.decode_s * (count + more)
        if h.axis == "layers":
            least = min(p.decode_s for p in step.pieces)
            blocks = step.blocks_s(0.0, count)
            seen = max(p.base_s + p.reload_s + p.decode_s * count for p in step.pieces)
            heights = [(step.blocks_s(p.tokens, count) - seen) * self._part(r) for r, p in enumerate(h.prompts)]
            gain = self._work(k, heights)
            row = common + blocks * passed + (seen - blocks) * self.u[k] + gain + least * more
            self.problem += self.T[k] >= row
            for r in self.R:
                self.problem += self.n[r][k] * (self._part(r) / self.parts[r]) - self.u[k] <= 0

    def _attended(self, k: int) -> Any:
        """Seconds of the step's attention between prompt tokens."""
        if not self.h.step.attention_s:
            return 0.0
        if self.attention == "tangent" and self.h.axis == "tokens":
            self.G.append(self.problem.add_variable(f"G_{k}", 0.0))
            return self.G[k]
        whole = [self.h.step.attention_s * p.tokens * (p.before + p.tokens / 2) for p in self.h.prompts]
        return self._work(k, [s * self._part(r) for r, s in enumerate(whole)])

    def _tangents(self) -> None:
        """Attention of all steps so far is at least what tangents say of each prompt's tokens so far."""
        if not self.G:
            return
        each = self.h.step.attention_s
        for k in self.K:
            so_far = []
            for r, p in enumerate(self.h.prompts):
                a = self.problem.add_variable(f"A_{r}_{k}", 0.0)
                done = self._so_far(r, k)
                for x in TOUCH:
                    # p.tokens F (before + tokens F / 2) at F = x, and its slope there
                    value = each * p.tokens * x * (p.before + p.tokens * x / 2)
                    slope = each * p.tokens * (p.before + p.tokens * x)
                    self.problem += a >= slope * done + (value - slope * x)
                so_far.append(a)
            self.problem += pulp.lpSum(self.G[: k + 1]) >= pulp.lpSum(so_far)

    def _budget(self, k: int) -> None:
        """Prompt tokens of a step are within the budget, and there are none without z."""
        h = self.h
        tokens = self._work(k, [float(p.tokens) for p in h.prompts])
        most = min(h.budget_tokens, float(sum(p.tokens for p in h.prompts)) or 1.0)
        if h.axis == "tokens":
            self.problem += tokens * (1.0 / most) <= self.z[k]
            return
        self.problem += self.u[k] <= self.z[k]
        if self.relaxed:  # fractions take part as far as they go
            self.problem += tokens * (1.0 / most) <= 1
        elif h.budget_tokens < sum(p.tokens for p in h.prompts):
            took = [self.problem.add_variable(f"in_{r}_{k}", 0.0, 1.0, self.cat) for r in self.R]
            for r in self.R:
                self.problem += self.n[r][k] * (1.0 / self.parts[r]) <= took[r]
            self.problem += pulp.lpSum([p.tokens * took[r] for r, p in enumerate(h.prompts)]) <= h.budget_tokens

    def _kv(self) -> None:
        """Prompts computed so far and what decodes have written fit in the free KV."""
        h = self.h
        if h.kv_tokens == inf:
            return
        so_far: Any = 0.0
        for k in self.K:
            held = self.problem.add_variable(f"kv_{k}", 0.0, h.kv_tokens)
            new = self._work(k, [p.tokens * self._part(r) for r, p in enumerate(h.prompts)])
            new += h.decodes(k)[0] + pulp.lpSum([d for _, d in self._alive(k)])
            self.problem += held == so_far + new
            so_far = held

    def _order(self) -> None:
        """A prompt is complete once its fractions add up to one; it waits through every step until then."""
        for r in self.R:
            for k in self.K:
                self.problem += self.y[r][k] <= self._so_far(r, k)
                step = self.T[k] + self.idle[k]
                if k == 0:
                    self.problem += self.q[r][k] >= step
                else:
                    self.problem += self.y[r][k - 1] <= self.y[r][k]
                    most = self.T[k].upBound + (self.idle[k].upBound or 0.0)
                    self.problem += self.q[r][k] >= step - most * self.y[r][k - 1]

    def _releases(self) -> None:
        """A prompt that has yet to come is in no step that begins before; the machine may wait for it."""
        for r, prompt in enumerate(self.h.prompts):
            if prompt.release_s == 0:
                continue
            for k in self.K:
                there = self.problem.add_variable(f"v_{r}_{k}", 0.0, 1.0, self.cat)
                begins = pulp.lpSum(self.idle[: k + 1]) + pulp.lpSum(self.T[:k])
                self.problem += self.n[r][k] * (1.0 / self.parts[r]) <= there
                self.problem += begins >= prompt.release_s * there

    def _proxy(self, mean_step_s: float) -> None:
        """The objective of equal steps, as coefficients of f: the part done in step j is not waiting in j .. K-1."""
        if any(p.release_s > 0 for p in self.h.prompts):
            raise PlanError("prompts that have yet to come: expected the exact objective, the proxy has no clock")
        K, total = len(self.K), sum(p.weight for p in self.h.prompts) * len(self.K)
        saved = pulp.LpAffineExpression(
            [
                (self.n[r][k], -mean_step_s * p.weight * (K - k) / self.parts[r])
                for r, p in enumerate(self.h.prompts)
                for k in self.K
            ]
        )
        reload = self.h.step.prompt_s + max(p.reload_s for p in self.h.step.pieces)
        self.problem += saved + mean_step_s * total + reload * pulp.lpSum(self.z)

    def solve(self, seconds: float = 60.0, gap: float = 1e-6, start: Mapping[str, float] | None = None) -> Found | None:
        """The best solution found in the time; None where none was found.

        start   values of variables by name, such as those of the last solution

        Raises NoFeasiblePlanError where there is none to find.
        """
        if not self.h.prompts:
            raise PlanError("no prompts: expected at least one to schedule")
        found = run(self.problem, seconds, gap, start)
        if found is None:
            return None
        status, bound, optimal = found
        if status == "Infeasible":
            raise NoFeasiblePlanError(
                f"{len(self.R)} prompts in {len(self.K)} steps: no schedule keeps the TBT, budget and KV limits; "
                "expected more steps, a longer limit, or fewer prompts"
            )
        fractions = np.array([[n.value() / self.parts[r] for n in row] for r, row in enumerate(self.n)])
        return Found(
            np.clip(fractions, 0.0, 1.0),
            np.array([float(t.value()) for t in self.T]),
            float(pulp.value(self.problem.objective)),
            bound,
            optimal,
            {v.name: float(v.value() or 0.0) for v in self.problem.variables()},
        )
