"""Diagnostics of a distillation on hand-made cases, and their warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from raycloud.data.batches import Batch, RowCounts, Sample, collate, encode_counted
from raycloud.distill.alignment.pairs import AlignedSamples, DeviceVocabularyMap
from raycloud.distill.diagnostics import (
    DataDiagnostics,
    DiagnosticsMonitor,
    StepDiagnostics,
    StudentDiagnostics,
    entropies,
    find_warnings,
    gradient_shares,
    teacher_entropy,
)
from raycloud.distill.objective import ModelSizes, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import OBJECTIVES, CrossEntropy, build_objective
from raycloud.distill.recipe import ObjectiveRecipe
from raycloud.distill.signals import Signal, SignalKind, SignalRecipe, Targets, compute_signal, frozen_head
from raycloud.distill.student import DistillMicroBatch, distillation_loss
from raycloud.models.segments import Segment
from raycloud.training.loop import Trainer
from raycloud.training.recipe import TrainingRecipe
from tests.distill.cases import Case
from tests.distill.test_objectives import V, said, student, teacher_logits
from tests.models.families import tiny

SAME = DataDiagnostics.of(RowCounts(10, 0, 0, 0), range(49_152))  # type: ignore[arg-type]


def bpe(merge: str, eos: str, template: str = "") -> PreTrainedTokenizerFast:
    """Tokenizer of all bytes, two special tokens and one merge."""
    vocabulary = [eos, "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), merge]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, [(merge[0], merge[1])]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token="<pad>")
    found.chat_template = template or None
    return found


def test_shares_are_those_of_each_terms_own_gradient() -> None:
    output, teacher = student(), said(teacher_logits())
    terms = [(0.7, OBJECTIVES["forward_kl"]()), (0.2, CrossEntropy())]
    norms = [
        float(torch.autograd.grad(weighted_sum([term], output, teacher).sum, output.hidden)[0].norm()) for term in terms
    ]
    shares = gradient_shares(terms, output, teacher, chunk=8)
    assert shares == pytest.approx({"forward_kl": norms[0] / sum(norms), "cross_entropy": norms[1] / sum(norms)})
    assert sum(shares.values()) == pytest.approx(1.0)
    assert output.hidden.grad is None and output.head.weight.grad is None


def test_a_weight_scales_its_terms_share() -> None:
    output, teacher = student(), said(teacher_logits())

    def odds(weight: float) -> float:
        shares = gradient_shares([(weight, OBJECTIVES["forward_kl"]()), (1.0, CrossEntropy())], output, teacher)
        return shares["forward_kl"] / shares["cross_entropy"]

    assert odds(0.03) == pytest.approx(0.01 * odds(3.0))


def test_terms_without_any_pull_have_no_shares() -> None:
    output = student()
    assert gradient_shares([(0.0, CrossEntropy())], output) == {}
    broken = replace(output, hidden=output.hidden.detach() * float("nan"))
    assert gradient_shares([(1.0, CrossEntropy())], broken) == {}


@pytest.mark.parametrize("name", ["dskd", "dskd_cma", "mcw_kd"])
def test_what_extras_remember_stays_as_it_is(name: str) -> None:
    case, objective = Case(same=True), OBJECTIVES[name]()
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double()
    before = {key: one.clone() for key, one in extras.state_dict().items()}
    shares = gradient_shares([(1.0, objective), (1.0, CrossEntropy())], case.student, case.teacher, {name: extras})
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0
    assert all(torch.equal(one, before[key]) for key, one in extras.state_dict().items())
    assert all(one.grad is None for one in extras.parameters())


@pytest.mark.parametrize("kind", ["hidden", "logits", "sampled", "hybrid", "topk", "scalars"])
def test_entropy_is_that_of_the_targets(kind: SignalKind) -> None:
    teacher = Segment(tiny("llama").float())
    batch = collate([Sample(tuple(range(5, 17)), 2)], 0)
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind=kind, codec="float32", k=96), [2.0])
    found = teacher_entropy(TeacherOutput(signal, frozen_head(teacher, "float32")), 2.0, 97, chunk=4)
    if kind == "scalars":
        assert found is None
        return
    hidden = teacher.hidden(batch.ids)[batch.labels != -100]
    log_p = (teacher.logits(hidden).detach() / 2.0).log_softmax(dim=-1)
    assert found == pytest.approx(float(-(log_p.exp() * log_p).sum(dim=-1).mean()), rel=1e-3)


def test_a_tail_counts_as_spread_evenly() -> None:
    p = torch.full((5, 8), 1 / 97)
    p[:, -1] = 90 / 97
    for kind in ("topk", "sorted"):
        assert entropies(Targets(p.log(), kind=kind), 97).tolist() == pytest.approx([math.log(97)] * 5)


def test_coverage_of_two_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path))
    ours, theirs = bpe("ab", "</s>", "<u>{{messages[0].content}}"), bpe("bc", "<end>", "{{messages[0].content}}")
    rows = [{"instruction": "x", "output": "abcd"}, {"instruction": "y" * 40, "output": "abcd"}]
    pairs = AlignedSamples(rows, ours, theirs, "chat", max_length=99, max_prompt_length=19)
    found = DataDiagnostics.of(pairs.counts, theirs, ours, pairs)
    # The student has ab|c|d|EOS, the teacher a|bc|d|EOS.
    assert found.exact_partners == 0.5 and found.shared_boundaries == 0.75
    assert found.student_vocabulary == found.teacher_vocabulary == 258 / 259
    assert found.shared_vocabulary == 258 and found.eos_mapped and found.teacher_vocabulary_size == 259
    assert (found.student_specials, found.teacher_specials) == (("</s>",), ("<end>",))
    assert (found.samples, found.unlike_prompts, found.shortened_prompts) == (2, 1.0, 0.5)
    alike = DataDiagnostics.of(pairs.counts, theirs)
    assert alike.exact_partners == alike.student_vocabulary == 1.0 and alike.eos_mapped


def test_one_tokenizers_data_is_counted_too() -> None:
    tokenizer = bpe("ab", "</s>")
    rows = [{"text": "abc"}, {"text": "a"}]
    found = DataDiagnostics.of(
        encode_counted(rows, tokenizer, "plain", max_length=9, max_prompt_length=9)[1], tokenizer
    )
    assert (found.samples, found.dropped_empty, found.dropped_long, found.shared_vocabulary) == (1, 1, 0, 259)


def steps(shares: dict[str, float] | None = None, entropy: float | None = 3.0) -> list[StepDiagnostics]:
    return [StepDiagnostics(number, shares or {}, entropy) for number in (0, 10)]


@pytest.mark.parametrize(
    ("about", "sentence", "ill", "well"),
    [
        ("prompts", "6.3 % of the prompts are shortened", {"shortened_prompts": 0.063}, {"shortened_prompts": 0.04}),
        ("templates", "writes 100 % of the prompts in other words", {"unlike_prompts": 1.0}, {"unlike_prompts": 0.0}),
        ("alignment", "poor: 29 % of the student's tokens", {"exact_partners": 0.294}, {"exact_partners": 0.71}),
        ("vocabulary", "covers 40 % of the student's", {"student_vocabulary": 0.4}, {"student_vocabulary": 0.77}),
        ("eos", "no end of text is mapped", {"eos_mapped": False}, {"eos_mapped": True}),
    ],
)
def test_data_warns(about: str, sentence: str, ill: dict[str, float], well: dict[str, float]) -> None:
    objective = ObjectiveRecipe.model_validate({"kd": {"name": "mined"}})
    found = find_warnings(objective, replace(SAME, **ill))
    assert list(found) == [about] and sentence in found[about]
    assert find_warnings(objective, replace(SAME, **well)) == {}


@pytest.mark.parametrize(
    ("about", "sentence", "ill", "well"),
    [
        (
            "weak/forward_kl",
            "objective 'forward_kl' contributes only 0.2 % of the gradient; raise objective.kd_weight",
            steps({"forward_kl": 0.002, "cross_entropy": 0.998}),
            steps({"forward_kl": 0.02, "cross_entropy": 0.98}),
        ),
        (
            "weak/cross_entropy",
            "raise objective.ce_weight",
            steps({"forward_kl": 1.0, "cross_entropy": 0.0}),
            steps({"forward_kl": 0.9, "cross_entropy": 0.1}),
        ),
        ("entropy", "0.010 nats a token: raise objective.kd.temperature 2", steps(entropy=0.01), steps(entropy=0.1)),
        ("entropy", "10.70 nats a token of 10.80 at most: lower", steps(entropy=10.7), steps(entropy=10.4)),
    ],
)
def test_steps_warn(about: str, sentence: str, ill: Sequence[StepDiagnostics], well: Sequence[StepDiagnostics]) -> None:
    objective = ObjectiveRecipe.model_validate({"kd": {"name": "forward_kl", "temperature": 2.0}})
    found = find_warnings(objective, SAME, ill)
    assert list(found) == [about] and sentence in found[about]
    assert find_warnings(objective, SAME, well) == {}


def test_steps_are_averaged_and_those_without_numbers_left_out() -> None:
    mixed = [*steps({"a": 0.001, "b": 0.999}), *steps({"a": 0.1, "b": 0.9}), *steps(None, None)]
    assert find_warnings(ObjectiveRecipe(), SAME, mixed) == {}


def test_without_a_teacher_only_the_data_itself_counts() -> None:
    poor = replace(SAME, exact_partners=0.1, unlike_prompts=1.0, eos_mapped=False, student_vocabulary=0.1)
    assert find_warnings(ObjectiveRecipe(ce_weight=1.0, kd_weight=0.0), poor) == {}
    # And what no objective maps need not be mapped.
    well = replace(poor, exact_partners=0.9, unlike_prompts=0.0)
    assert find_warnings(ObjectiveRecipe.model_validate({"kd": {"name": "uld"}}), well) == {}


def test_a_monitor_measures_every_so_many_steps_once() -> None:
    objective = ObjectiveRecipe.model_validate({"ce_weight": 1.0, "diagnostics_every": 3})
    monitor, output, teacher = DiagnosticsMonitor(objective, V), student(), said(teacher_logits())
    for step in range(7):
        monitor.begin(step)
        for _ in range(2):  # micro-batches
            monitor.observe(output, teacher, {})
    assert [one.step for one in monitor.steps] == [0, 3, 6]
    assert monitor.steps[0].shares.keys() == {"forward_kl", "cross_entropy"} and monitor.steps[0].entropy > 0
    never = DiagnosticsMonitor(objective.model_copy(update={"diagnostics_every": 0}), V)
    never.begin(0)
    never.observe(output, teacher, {})
    assert never.steps == []


def test_a_report_keeps_the_newest_numbers_and_the_first_warnings() -> None:
    first = StudentDiagnostics(SAME, tuple(steps({"a": 0.3, "b": 0.7})), {"prompts": "early", "entropy": "flat"}).after(
        {}
    )
    second = StudentDiagnostics(SAME, (), {"prompts": "late"}).after(first)
    assert second == first
    assert first["data"] == asdict(SAME) and first["shares"] == {"a": 0.3, "b": 0.7} and first["entropy"] == 3.0
    assert first["warnings"] == {"prompts": "early", "entropy": "flat"}


def test_two_tokenizers_terms_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path))
    ours, theirs = bpe("ab", "</s>"), bpe("bc", "<end>")
    pairs = AlignedSamples([{"text": "abcd, abc and so on"}], ours, theirs, "plain", max_length=40, max_prompt_length=9)
    mine, its = (Segment(tiny("llama", vocab_size=259, seed=seed).float()) for seed in (0, 1))
    batch, asked = pairs.batches([0])
    signal = compute_signal(its, "t", asked, SignalRecipe(codec="float32"), [2.0])
    head, vocabulary_map = frozen_head(its, "float32"), DeviceVocabularyMap(pairs.map, torch.device("cpu"))
    monitor = DiagnosticsMonitor(
        ObjectiveRecipe.model_validate({"kd": {"name": "mined"}, "ce_weight": 1.0}), len(theirs)
    )
    monitor.begin(0)
    monitor.observe(StudentOutput.of(mine, batch), pairs.output([0], signal, head, vocabulary_map), {})
    (found,) = monitor.steps
    assert sum(found.shares.values()) == pytest.approx(1.0) and 0 < (found.entropy or 0) < math.log(259)


class Told:
    """Store of one teacher's signals, which are computed on request."""

    def __init__(self, teacher: Segment) -> None:
        self.teacher = teacher

    def signal(self, batch: Batch) -> Signal:
        return compute_signal(self.teacher, "t", batch, SignalRecipe(codec="float32"), [2.0])


def test_a_student_that_is_watched_learns_the_same() -> None:
    teacher = Segment(tiny("llama", seed=1).float())
    head = frozen_head(teacher, "float32")

    def trained(every: int) -> dict[str, Tensor]:
        model = tiny("llama", attention="eager", attention_dropout=0.3).float().train()
        student = Segment(model)
        kd = {"name": "dskd", "refresh": 2, "compat": "ours"}
        objective = ObjectiveRecipe.model_validate({"kd": kd, "ce_weight": 0.5, "diagnostics_every": every})
        torch.manual_seed(0)
        extras = build_objective(objective.kd).extras(ModelSizes(32, 32, student.head.weight.detach(), head.weight))
        monitor = DiagnosticsMonitor(objective, 97)
        loss = distillation_loss(student, objective, Told(teacher), head, extras=extras, monitor=monitor)
        trainer = Trainer({"student": model, "extras": extras}, TrainingRecipe(), total_steps=3, seed=1)
        batch = collate([Sample(tuple(range(5, 17)), 2), Sample(tuple(range(40, 50)), 3)], 0)
        for step in range(3):
            monitor.begin(step)
            trainer.step([DistillMicroBatch(batch, batch, (0, 1))] * 2, loss)
        assert len(monitor.steps) == (3 if every else 0)
        return {**model.state_dict(), **extras.state_dict()}

    plain, watched = trained(0), trained(1)
    assert all(torch.equal(one, watched[name]) for name, one in plain.items())
