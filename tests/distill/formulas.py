"""Every objective as its formula, in float64, text by text, from a case, the objective and its extras to the loss.

Each docstring names what the formula was read beside: the paper, or file and lines of the program at a commit. The
programs' own numbers for such cases are in ``published/``, see ``test_published.py``. DSKD is songmzhang/DSKD 077337a,
DSKDv2 songmzhang/DSKDv2 5025279, MCW-KD HoangTran223/MCW-KD 70ceb2d. What no program has is marked as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.distill.cases import Case, Map

Formula = Callable[[Case, Any, Any], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) over tokens of the vocabulary, of each token: DSKD ``various_divergence.py``:96-105."""
    return (torch.xlogy(p, p) - p * q.log()).sum(-1)


def kl_of_logits(u: Tensor, z: Tensor, tau: float) -> Tensor:
    return kl((u / tau).softmax(-1), (z / tau).softmax(-1)).sum()


def adaptive(p: Tensor, q: Tensor, mass: float = 0.5) -> Tensor:
    """DSKD ``various_divergence.py``:156-179, whose alpha is the tail's mass, 1 − ``mass``; the paper's head.

    The authors' own program ends the head one word before, see ``test_published.py``.
    """
    values = []
    for pi, qi in zip(p, q, strict=True):
        head, held = [], 0.0
        for index in pi.argsort(descending=True).tolist():
            head.append(index)
            held += float(pi[index])
            if held >= mass:
                break
        gap = (pi - qi).abs().detach()
        share = gap[head].sum() / gap.sum()
        values.append(share * kl(pi, qi) + (1 - share) * kl(qi, pi))
    return torch.stack(values)


def mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence: huggingface/trl f2cd577 ``gkd_trainer.py``:279-298."""
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def divergence(between: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """A divergence of the student's distribution from the teacher's at every token of one tokenizer."""

    def formula(case: Case, objective: Any, extras: Any) -> Tensor:
        p, q = ((one / objective.temperature).softmax(-1) for one in (case.u, case.z))
        return between(p, q).sum()

    return formula


def uld(case: Case, objective: Any, extras: Any) -> Tensor:
    """Σ |sorted − sorted| at tokens of the same bytes, or at the same position; the whole vocabulary, or the k largest
    and a rest.

    The same position and the whole vocabulary: DSKD ``universal_logit_distillation.py``:75-118. Same bytes and a rest
    are ours.
    """
    pairs, ranks = case.pairs, objective.k
    if objective.compat == "published":
        pairs, ranks = [(i, j) for a, b in case.texts for i, j in zip(_each(a), _each(b), strict=False)], None
    total = case.h.new_zeros(())
    for i, j in pairs:
        q, p = (one.softmax(-1).sort(descending=True).values for one in (case.z[i], case.u[j]))
        if ranks:
            q, p = (torch.cat([one[:ranks], one[ranks:].sum()[None]]) for one in (q, p))
        size = max(len(p), len(q))
        q, p = (torch.cat([one, one.new_zeros(size - len(one))]) for one in (q, p))
        total = total + (q - p).abs().sum()
    return total


def _each(at: slice) -> range:
    return range(at.start, at.stop)


def mined(case: Case, objective: Any, extras: Any) -> Tensor:
    """KL over the 31 tokens that the teacher can name. Ours."""
    total = case.h.new_zeros(())
    for i, j in case.pairs:
        p = (case.u[j] / objective.temperature).softmax(-1)
        if objective.k:
            p = p * (p >= p.sort(descending=True).values[objective.k - 1])
        named = torch.cat([p[:30], p[30:40].sum()[None]])
        total = total + kl(named / named.sum(), (case.z[i, :31] / objective.temperature).softmax(-1))
    return total


def mined_published(case: Case, objective: Any, extras: Any) -> Tensor:
    """One token of the teacher for each of the student's, KL over the vocabulary, and the label where there is no pair.

    DSKD ``min_edit_dis_kld.py``:176-209, and ``distiller.py`` for the one token, the first of the map.
    """
    total, pairs = case.h.new_zeros(()), dict(case.pairs)
    mine, theirs, _ = (one.tolist() for one in Map().entries)
    for i, label in enumerate(case.student.labels.tolist()):
        log_q = (case.z[i] / objective.temperature).log_softmax(-1)
        if i not in pairs:
            total = total - log_q[label]
            continue
        logits = torch.full_like(case.z[i].detach(), -1e5)
        for word in set(mine):
            logits[word] = case.u[pairs[i], min(t for m, t in zip(mine, theirs, strict=True) if m == word)]
        p = (logits / objective.temperature).softmax(-1)
        total = total + (torch.xlogy(p, p) - p * log_q).sum()
    return total


def dskd(case: Case, objective: Any, extras: Any) -> Tensor:
    """Under the student's head, under the teacher's, and what the projector learns itself.

    Version 1: DSKD ``dual_space_kd.py``:64-87. Version 2, published: DSKDv2 ``dual_space_kd_v2.py``:65-116, with two
    tokenizers ``dual_space_kd_v2_with_exact_token_alignment.py``:104-232, projectors ``distiller.py``:119-154. Sums in
    place of the means of version 2 are ours.
    """
    i, j = (torch.tensor(side) for side in zip(*case.pairs, strict=True))
    head, tau = case.head.weight.detach(), objective.temperature
    aim, weights = extras.t2s(case.g[j]) @ head.T, [1.0, 1.0]
    far = torch.ones_like(i, dtype=torch.bool)
    if objective.version == 1:
        entropy = nn.functional.cross_entropy(aim, case.student.labels[i], reduction="sum")
        back, right = extras.s2t(case.h[i]), far
    else:
        shared = len(head) if case.same else 30
        best = case.u[j].argmax(-1)
        known = best < shared
        entropy = nn.functional.cross_entropy(aim[known], best[known], reduction="sum")
        right = known & (aim.argmax(-1) == best)
        assert 0 < int(right.sum()) < int(known.sum())
        back = case.h[i] @ head[:shared].T @ torch.linalg.pinv(case.teacher_weight[:shared].T)
        if objective.compat == "published":
            weights[0] = len(case.h) / int(right.sum())
            if not case.same:
                far, weights[1] = known, len(case.h) / int(known.sum())
    near = kl_of_logits(aim.detach()[right], case.z[i][right], tau)
    return weights[0] * near + weights[1] * (
        entropy + kl_of_logits(case.u[j][far], back[far] @ case.teacher_weight.T, tau)
    )


def dskd_cma(case: Case, objective: Any, extras: Any) -> Tensor:
    """The same with rows that a softmax over the other side's tokens of the text picks.

    DSKD ``dual_space_kd_with_cross_model_attention.py``:105-156. One deviation for all rows is published (lines 108 to
    110); each row by its own, and the prior, are ours.
    """
    (mine, its), e_s, e_t = case.ids, case.student.embedding, case.teacher.embedding
    assert e_s is not None and e_t is not None
    seen = torch.cat([e_t[its.inputs], e_t[its.labels]], -1)
    if objective.compat == "published":
        key, g, labels = (one / one.std() for one in (seen, case.g, e_t[its.labels]))
    else:
        key, g, labels = (one / (one**2).mean(-1, keepdim=True).sqrt() for one in (seen, case.g, e_t[its.labels]))
    tau, total = objective.temperature, case.h.new_zeros(())
    for a, b in case.texts:
        query = extras.query(torch.cat([e_s[mine.inputs[a]], e_s[mine.labels[a]]], -1))
        scores = query @ key[b].T / key.shape[-1] ** 0.5
        if objective.prior:
            scores = scores + objective.prior * (1 - byte_costs(case, a, b).T).clamp_min(1e-3).log()
        aim = scores.softmax(-1) @ extras.t2s(g[b] + labels[b]) @ case.head.weight.detach().T
        back = scores.T.softmax(-1) @ extras.s2t(case.h[a]) @ case.teacher_weight.T
        y = mine.labels[a]
        right = aim.argmax(-1) == y
        p = (aim.detach()[right] / tau / objective.teacher_temperature).softmax(-1)
        total = total + kl(p, (case.z[a][right] / tau).softmax(-1)).sum()
        total = total + nn.functional.cross_entropy(aim, y, reduction="sum") + kl_of_logits(case.u[b], back, tau)
    return total


def byte_costs(case: Case, ours: slice, theirs: slice) -> Tensor:
    """One minus intersection over union of the bytes, (M, N). Ours."""
    assert case.teacher.spans is not None
    mine, its = (side[at].tolist() for side, at in zip(case.teacher.spans, (ours, theirs), strict=True))
    share = [[max(0, min(b, d) - max(a, c)) / (max(b, d) - min(a, c)) for c, d in mine] for a, b in its]
    return 1 - torch.tensor(share, dtype=torch.float64)


def plan(cost: Tensor, mu: Tensor, epsilon: float, sweeps: int) -> Tensor:
    """Sinkhorn's matrix scaling, as a constant; columns have equal mass: MCW-KD ``ETP.py``:39-54, without its 1e-9."""
    kernel = (-cost.detach() / epsilon).exp()
    n = cost.shape[1]
    v = torch.full((n,), 1 / n, dtype=cost.dtype)
    for _ in range(sweeps):
        u = mu / (kernel @ v)
        v = (1 / n) / (kernel.T @ u)
    return u[:, None] * kernel * v


def a_share_of_the_median(cost: Tensor, share: float) -> float:
    return share * float(cost.detach().flatten().sort().values[(cost.numel() - 1) // 2])


def multi_level_ot(case: Case, objective: Any, extras: Any) -> Tensor:
    """Words ranked by their mass over a text, among the likeliest of each token; three comparisons. Ours.

    The teacher is the target of the cross-entropy, as in MCW-KD's port and not as in the authors' program.
    """
    pairs, total = dict(case.pairs), case.h.new_zeros(())
    for a, b in case.texts:
        sides = []
        for logits in (case.z[a], case.u[b]):
            p = (logits / objective.temperature).softmax(-1)
            p = p * (p >= p.sort(descending=True).values[:, objective.k - 1, None])
            sides.append(p[:, p.detach().sum(0).argsort(descending=True)[: objective.keep]])
        q, p = sides
        n = len(q)
        for i in range(n):
            if a.start + i not in pairs:
                continue
            t, s = p[pairs[a.start + i] - b.start], q[i]
            total = total + objective.absolute * (t - s).abs().sum()
            rest = (1 - t.sum()).clamp_min(0.0), (1 - s.sum()).clamp_min(0.0)
            entropy = -(t * (s + 1e-7).log()).sum() - rest[0] * (rest[1] + 1e-7).log()
            total = total + objective.logarithmic * entropy
        cost = (p[:, None] - q[None]).abs().sum(-1)
        mu = torch.full((len(p),), 1 / len(p), dtype=cost.dtype)
        carried = plan(cost, mu, a_share_of_the_median(cost, objective.share), objective.sweeps)
        total = total + objective.transport * n * (carried * cost).sum()
    return total


def multi_level_ot_published(case: Case, objective: Any, extras: Any) -> Tensor:
    """Words ranked by their mass over the batch, vectors through further softmaxes, Sinkhorn unrolled.

    2018cx/Multi-Level-OT 712cfb4 ``models/distillation_model.py``:17-57 and 237-338, called with the teacher first;
    MCW-KD ``MultiLevelOT.py``:7-49 and 149-201, called with the student first.
    """
    official = objective.compat == "official"
    longest = max(at.stop - at.start for both in case.texts for at in both)
    sides = []
    for side, logits in enumerate((case.z, case.u)):
        vocab_size, texts = logits.shape[-1], []
        scaled = (logits / (logits.std(-1, keepdim=True) + 1e-4) / (1 if official else 2)).softmax(-1)
        # Behind a text: nothing, or what a signal says of padding in the port, which is nothing in particular.
        longest_here = max(both[side].stop - both[side].start for both in case.texts)
        for both in case.texts:
            own = scaled[both[side]]
            behind = torch.full(
                (longest_here - len(own), vocab_size), 0.0 if official else 1 / vocab_size, dtype=own.dtype
            )
            end = torch.zeros(longest - longest_here, vocab_size, dtype=own.dtype)
            texts.append(torch.cat([own, behind, end]))
        batch = torch.stack(texts)
        sides.append(batch[..., batch.detach().sum((0, 1)).argsort(descending=True)[: objective.keep]])
    count, total = len(case.h), case.h.new_zeros(())
    if not official:
        count = sum(min(at.stop - at.start for at in both) for both in case.texts)
    for (a, b), s, t in zip(case.texts, *sides, strict=True):
        shorter = min(a.stop - a.start, b.stop - b.start)
        gaps = (t - s).abs().sum(-1)
        absolute = gaps[:shorter].mean() if official else gaps.mean()
        aim, own = (s, t) if official else (t, s)
        entropy = -(aim.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()
        first, second = ((one / 2).softmax(-1) for one in ((t, s) if official else (s, t)))
        cost = (first[:, None] - second[None]).abs().sum(-1)
        carried = (-cost / 0.1).exp()
        for _ in range(10):
            carried = carried / carried.sum(1, keepdim=True)
            carried = carried / carried.sum(0, keepdim=True)
        total = total + objective.absolute * absolute * count / 2 + objective.logarithmic * entropy * count / 2
        total = total + objective.transport * 0.001 * (carried * cost).sum() * count
    return total


def mcw_kd(case: Case, objective: Any, extras: Any) -> Tensor:
    """Cross-model attention and two transports.

    Published: MCW-KD ``MCW_KD.py``:129-172, when the teacher's logits are no longer blended, and 222-252. Bytes in
    place of edit distances, shares of the whole vocabulary, ε from the median and the semi-dual's gradient are ours.
    """
    total = dskd_cma(case, objective, extras)
    state, published = extras.ot(case.g), objective.compat == "published"
    for a, b in case.texts:
        q, p = (
            (one / objective.rank_temperature).softmax(-1).sort(descending=True).values[:, : objective.k]
            for one in (case.z[a], case.u[b])
        )
        h, g = case.h[a], state[b]
        if published:
            q, p = (one / one.sum(-1, keepdim=True) for one in (q, p))
            divergences = [[(x * (x / (y + 1e-7)).log()).sum() for y in q] for x in p]
        else:
            divergences = [[((x + 1e-7) * ((x + 1e-7) / (y + 1e-7)).log() - x + y).sum() for y in q] for x in p]
        predicted = [torch.cdist(p, q), torch.stack([torch.stack(row) for row in divergences])]
        mu = torch.full((len(p),), 1 / len(p), dtype=p.dtype)
        if objective.importance == "salience":
            predicted.append((extras.salience(g).sigmoid() - extras.salience(h).sigmoid().T).abs())
        else:
            surprise = -case.u[b].log_softmax(-1).gather(1, case.ids[1].labels[b][:, None])[:, 0]
            mu = surprise / surprise.sum()
        mine, its = (torch.stack([one[max(0, i - 4) : i + 5].mean(0) for i in range(len(one))]) for one in (h, g))
        distance = torch.cdist(its, mine)
        if published:
            distance = distance / (distance.max() + 1e-7)
        cosine = 1 - nn.functional.cosine_similarity(its[:, None], mine[None], dim=-1)
        stands = [byte_costs(case, a, b), distance, cosine]
        first = objective.logit_weights[: len(predicted)]
        potentials = (extras.logit_potential, p), (extras.state_potential, its)
        for costs, begin, (potential, seen) in zip(
            (predicted, stands), (first, objective.state_weights), potentials, strict=True
        ):
            # The parameters, for their gradient; they begin as what the options say.
            how = extras.logit_costs if costs is predicted else extras.state_costs
            wanted = torch.tensor(begin, dtype=p.dtype) / sum(begin)
            assert (how.weights.detach() - wanted).abs().max() < 1e-7
            cost = sum(weight * one for weight, one in zip(how.weights, costs, strict=True))
            assert isinstance(cost, Tensor)
            epsilon = 1 / objective.sinkhorn_alpha if published else a_share_of_the_median(cost, objective.share)
            if objective.solver == "sinkhorn":
                carried = (plan(cost, mu, epsilon, objective.sweeps) * cost).sum()
            else:
                phi = potential(seen.detach()[None], torch.ones(1, len(seen), dtype=torch.bool))[0]
                bound = _bound(phi.detach(), costs, how.weights, mu, epsilon)
                fixed = [one.detach() for one in costs]
                climbing = _bound(phi, fixed, how.weights.detach(), mu, epsilon)
                carried = bound + climbing.detach() - climbing
            total = total + objective.transport * len(h) * carried
    return total


def _bound(phi: Tensor, costs: list[Tensor], weights: Tensor, mu: Tensor, epsilon: float) -> Tensor:
    """⟨φ, μ⟩ + Σ w ⟨φᶜ, ν⟩: MCW-KD ``ETP_Dual.py``:209-237 and 301-303."""
    total = (phi * mu).sum()
    for weight, cost in zip(weights, costs, strict=True):
        soft = (mu[:, None] * ((phi[:, None] - cost) / epsilon).exp()).sum(0)
        total = total + weight * (-epsilon * soft.log()).mean()
    return total
