"""Runs of each published program on the small cases of the tests; see :mod:`tests.distill.published.make`."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from tests.distill.cases import Case

IGNORE = -100
FLAGS: dict[str, Any] = {
    "label_smoothing": 0.0,
    "kd_rate": 0.5,
    "kd_temperature": 2.0,
    "teacher_temperature": 1.0,
    "kd_objective": "forward_kl",
    "adaptive_kl_alpha": 0.5,
    "skew_lambda": 0.1,
    "t2s_agreement": 1.0,
    "init_t2s_projector": True,
    "init_s2t_projector": True,
    "topk_vocab": -1,
    "only_stu_kd": False,
    "only_tea_kd": False,
    "only_save_projector": False,
    "precision": "fp32",
    "top_k_vocab": 9,
    "total_iters": 1,
    "hidden_dim_student": 8,
    "hidden_dim_teacher": 12,
}
"""Arguments of the programs; those of the scripts, and defaults where scripts do not set them."""
FAMILY = "other"
"""Name of the teacher's model family in the programs."""

Found = tuple[Tensor, dict[str, Tensor], dict[str, nn.Parameter]]
"""A program's value, its terms by our names, and what it trains beside the student."""


def load(folder: Path, program: str, path: str, module: str) -> types.ModuleType:
    """Import a module of a program, with ``path`` first among the import paths."""
    root = str(folder / program.replace("/", "+") / path)
    for name in [one for one in sys.modules if one.split(".")[0] in ("criterions", "utils", "models", "distiller")]:
        del sys.modules[name]
    editdistance = types.ModuleType("editdistance")
    editdistance.eval = Levenshtein.distance  # type: ignore[attr-defined]
    utils = types.ModuleType("utils")
    utils.print_rank = utils.log_rank = lambda *_: None  # type: ignore[attr-defined]
    sys.modules |= {"editdistance": editdistance, "utils": utils, "cvxpy": types.ModuleType("cvxpy")}
    if module.startswith("criterions."):
        # Its __init__ imports every criterion, of MCW-KD one by a file name that is not there.
        package = types.ModuleType("criterions")
        package.__path__ = [str(Path(root) / "criterions")]
        sys.modules["criterions"] = package
    sys.path.insert(0, root)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(root)


class Model:
    """Fake model that returns given hidden states and their logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, embedding: Tensor | None) -> None:
        self.hidden, self.embedding = hidden, embedding
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        self.lm_head.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.model = SimpleNamespace(embed_tokens=lambda ids: embedding[ids])  # type: ignore[index]

    def outputs(self) -> SimpleNamespace:
        return SimpleNamespace(logits=self.hidden @ self.lm_head.weight.T, hidden_states=[self.hidden], loss=0.0)


@dataclass
class Batched:
    """Case in the form that the programs expect: padded texts without a prompt, and outputs of both models."""

    case: Case
    length: int | None = None

    def __post_init__(self) -> None:
        case = self.case
        mine, its = case.ids
        pairs = list(case.texts)
        sides = [[both[side] for both in pairs] for side in (0, 1)]
        sizes = [self.length or max(at.stop - at.start for at in side) for side in sides]
        self.inputs, self.labels, stacked = [], [], []
        for ids, hidden, side, size in zip((mine, its), (case.h, case.g), sides, sizes, strict=True):
            self.inputs.append(padded(ids.inputs, side, size, 0))
            self.labels.append(padded(ids.labels, side, size, IGNORE))
            stacked.append(
                torch.stack([nn.functional.pad(hidden[at], (0, 0, 0, size - at.stop + at.start)) for at in side])
            )
        self.masks = [labels.ne(IGNORE) for labels in self.labels]
        self.student = Model(stacked[0], case.head.weight, case.student.embedding)
        self.teacher = Model(stacked[1], case.teacher_weight, case.teacher.embedding)
        self.s, self.t = self.student.outputs(), self.teacher.outputs()

    @property
    def input_data(self) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[0], f"teacher_{FAMILY}_input_ids": self.inputs[1]}

    @property
    def output_data(self) -> dict[str, Tensor]:
        return {"label": self.labels[0].clone(), f"teacher_{FAMILY}_label": self.labels[1].clone()}

    def distiller(self, extras: Any = None, **more: Any) -> SimpleNamespace:
        names = ("t2s", "s2t", "query", "ot")
        projectors = {name: getattr(extras, name) for name in names if hasattr(extras, name)}
        return SimpleNamespace(
            student_model=self.student,
            teacher_model=self.teacher,
            teacher_model_type=FAMILY,
            projectors=projectors,
            input_data=self.input_data,
            args=SimpleNamespace(**FLAGS),
            **more,
        )


def padded(values: Tensor, texts: list[slice], size: int, fill: int) -> Tensor:
    return torch.stack([nn.functional.pad(values[at], (0, size - at.stop + at.start), value=fill) for at in texts])


def flags(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**FLAGS, **changed})


def watched(module: types.ModuleType, name: str) -> list[Tensor]:
    """Call a function of a module and return its result."""
    function, seen = getattr(module, name), []

    def kept(*arguments: Any) -> Tensor:
        seen.append(function(*arguments))
        return seen[-1]

    setattr(module, name, kept)
    return seen


class Programs:
    """Runs of each published program on the small cases of the tests; see :mod:`tests.distill.published.make`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def criterion(self, program: str, module: str, name: str, **changed: Any) -> Any:
        return getattr(load(self.folder, program, "code", f"criterions.{module}"), name)(flags(**changed))

    def function(self, program: str, path: str, name: str, **known: Any) -> Any:
        """Load a function from its source text, if its module imports packages that are not installed."""
        tree = ast.parse((self.folder / program.replace("/", "+") / path).read_text())
        found = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
        for one in found:
            one.decorator_list = []
        space: dict[str, Any] = {"torch": torch, "F": nn.functional, **known}
        exec(compile(ast.Module(found, []), path, "exec"), space)
        return space[name]

    # Divergences

    def divergence(self, name: str) -> Callable[[Case, Any], Found]:
        def run(case: Case, extras: Any) -> Found:
            criterion = self.criterion(
                "songmzhang/DSKD", "various_divergence", "VariousDivergence", kd_objective=name, kd_temperature=1.5
            )
            return criterion.dist_func(case.z[None], case.u[None], case.student.labels[None]), {}, {}

        return run

    def distillm(self, name: str, **options: float) -> Callable[[Case, Any], Found]:
        def run(case: Case, extras: Any) -> Found:
            function = self.function("jongwooko/distillm", "distillm/losses.py", name)
            return function(case.z[None], case.u[None], {"label": case.student.labels[None]}, **options), {}, {}

        return run

    def gkd(self, beta: float) -> Callable[[Case, Any], Found]:
        def run(case: Case, extras: Any) -> Found:
            function = self.function("huggingface/trl", "trl/experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")
            return function(case.z[None], case.u[None], case.student.labels[None], beta=beta, temperature=1.5), {}, {}

        return run

    def akl(self, case: Case, extras: Any) -> Found:
        """The last function only adds these terms up, and returns nothing."""
        ratio, kl = (self.function("wutaiqiang/LLM_KD_AKL", "AKL.py", name) for name in ("get_ratio", "get_kl"))
        u, z = case.u[None], case.z[None]
        mask = case.student.labels[None].ne(IGNORE).int()
        head, tail = ratio(u, z)
        return kl(u, z, z.isinf(), mask, head) + kl(z, u, z.isinf(), mask, tail), {}, {}

    # Between tokenizers

    def uld(self, case: Case, extras: Any) -> Found:
        b = Batched(case, 8)
        criterion = self.criterion("songmzhang/DSKD", "universal_logit_distillation", "UniversalLogitDistillation")
        value, _ = criterion.compute_universal_logit_distillation_loss(b.s, b.t, b.output_data, b.distiller(), {})
        return value, {}, {}

    def uld_first(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        module = load(self.folder, "Nicolas-BZRD/llm-recipes", "", "models.distillation_model")
        _, _, value = module.DistillationLoss()(b.s, b.t, *b.labels)
        return value, {}, {}

    def mined(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        module = load(self.folder, "songmzhang/DSKD", "code", "criterions.min_edit_dis_kld")
        criterion = module.MinEditDisForwardKLD(flags())
        module.TOKENIZER_TO_SPECIAL_TOKEN[Spelling] = "_"
        # Tokens count as the same where the map says so of what stands before them. No word is mapped to the 35th.
        b.inputs[0].fill_(35)
        for i, j in case.pairs:
            b.inputs[0].view(-1)[flat(b.masks[0], i)] = i
            b.inputs[1].view(-1)[flat(b.masks[1], j)] = i
        tokenizers = spelled(b)
        mapped = [min(word, 30) for word in range(40)] + [40] * 13
        distiller = b.distiller(
            student_tokenizer=tokenizers[0],
            teacher_tokenizers={FAMILY: tokenizers[1]},
            tea2stu_id_mapping=torch.tensor(mapped),
            stu2tea_id_mapping_tea=torch.arange(31)[:, None],
            stu2tea_id_mapping_stu=torch.arange(31),
        )
        aligned = criterion.get_aligned_teacher_logits(b.s.logits, b.t.logits, b.input_data, b.output_data, distiller)
        kept = [flat(b.masks[0], i) for i, j in enumerate(case.partner) if j >= 0]
        taken = aligned.flatten(0, 1).sort(dim=-1).values[:, -2] > -99_999  # not one-hot
        assert (taken & b.masks[0].flatten()).nonzero()[:, 0].tolist() == kept
        return criterion.compute_forward_kl_divergence(b.s.logits, aligned, b.labels[0]), {}, {}

    def dskd(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        criterion = self.criterion("songmzhang/DSKD", "dual_space_kd", "DualSpaceKD")
        value, log = criterion.compute_dual_space_kd_loss(b.s, b.t, b.output_data, b.distiller(extras), {})
        return value, spaces(log), dict(extras.named_parameters())

    def dskd_cma(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        criterion = self.criterion(
            "songmzhang/DSKD",
            "dual_space_kd_with_cross_model_attention",
            "DualSpaceKDWithCMA",
            teacher_temperature=1.5,
        )
        value, log = criterion.compute_dual_space_kd_loss_with_cma(
            b.s, b.t, b.input_data, b.output_data, b.distiller(extras), {}
        )
        return value, spaces(log), dict(extras.named_parameters())

    def dskd_v2(self, divergence: str) -> Callable[[Case, Any], Found]:
        def run(case: Case, extras: Any) -> Found:
            vocabulary = {f"w{word}": word for word in range(41)}
            b = Batched(case)
            distiller = self.fitted(b, Spelling({}, vocabulary), Spelling({}, vocabulary))
            criterion = self.criterion(
                "songmzhang/DSKDv2", "dual_space_kd_v2", "DualSpaceKDV2", kd_objective=divergence
            )
            value, log = criterion.compute_dual_space_kd_loss(b.s, b.t, labels_of(b), distiller, {})
            return value, spaces(log), {"t2s.weight": distiller.t2s_projector.weight}

        return run

    def dskd_v2_aligned(self, divergence: str) -> Callable[[Case, Any], Found]:
        def run(case: Case, extras: Any) -> Found:
            b = Batched(case, 8)
            distiller = self.fitted(b, *spelled(b))
            criterion = self.criterion(
                "songmzhang/DSKDv2",
                "dual_space_kd_v2_with_exact_token_alignment",
                "DualSpaceKDV2WithETA",
                kd_objective=divergence,
            )
            value, log = criterion.compute_dual_space_kd_loss_with_eta(b.s, b.t, labels_of(b), distiller, {})
            return value, spaces(log), {"t2s.weight": distiller.t2s_projector.weight}

        return run

    def fitted(self, b: Batched, student: Spelling, teacher: Spelling) -> Any:
        """Make the program's own projectors with their initial weights."""
        module = load(self.folder, "songmzhang/DSKDv2", "code", "distiller")
        distiller = b.distiller(student_tokenizer=student, teacher_tokenizer=teacher)
        distiller.t2s_projector = nn.Linear(12, 8, bias=False).double()
        module.Distiller.projector_init(distiller)
        return distiller

    # Transport

    def official(self, case: Case, extras: Any) -> Found:
        b = Batched(case, 8)
        module = load(self.folder, "2018cx/Multi-Level-OT", "", "models.distillation_model")
        seen = watched(module, "KL_wo")
        _, _, value = module.DistillationLoss()(0, b.s, b.t, *b.labels)
        return value, {"logarithmic": seen[0]}, {}

    def mcwkd(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        module = load(self.folder, "HoangTran223/MCW-KD", "code", "criterions.MultiLevelOT")
        seen = watched(module, "KL_wo")
        value, _ = module.MultiLevelOT(flags()).compute_multi_level_ot_loss(b.s, b.t, b.output_data, b.distiller(), {})
        return value, {"logarithmic": seen[0] * (b.masks[0] & b.masks[1]).sum()}, {}

    def mcw_kd(self, case: Case, b: Batched, extras: Any) -> tuple[Any, SimpleNamespace]:
        criterion = self.criterion("HoangTran223/MCW-KD", "MCW_KD", "MCW_KD", kd_temperature=3.0)
        criterion.current_step = 1  # of 1: the teacher's logits are not blended with the student's any more
        criterion.ot_weight_logits = criterion.ot_weight_hidden = 1.0  # read and never set
        criterion.salience_proj_s, criterion.dtype = extras.salience, torch.float64
        same = Spelling({}, {})
        distiller = b.distiller(extras, student_tokenizer=same, teacher_tokenizers={FAMILY: same})
        criterion.distiller = distiller
        return criterion, distiller

    def mcw_kd_attention(self, case: Case, extras: Any) -> Found:
        b = Batched(case)
        criterion, distiller = self.mcw_kd(case, b, extras)
        value, log = criterion.compute_dual_space_kd_loss_with_cma(b.s, b.t, b.input_data, b.output_data, distiller, {})
        trained = {
            name: one for name, one in extras.named_parameters() if name.split(".")[0] in ("t2s", "s2t", "query")
        }
        return value, spaces(log), trained

    def mcw_kd_transports(self, case: Case, extras: Any) -> Found:
        """Compute the loss of one text, with each transport plan constant in the gradient."""
        b = Batched(case, 8)
        criterion, distiller = self.mcw_kd(case, b, extras)
        plan_of = criterion.etp.forward

        def held(cost: Tensor) -> tuple[Tensor, Tensor]:
            plan = plan_of(cost.detach())[1]
            return (plan * cost).sum(), plan

        criterion.etp.forward = held
        hidden = b.s.hidden_states[-1], b.t.hidden_states[-1]
        near, _ = criterion.compute_ot_logits(distiller, b.s.logits, b.t.logits, *b.masks, *hidden, {})
        far, _ = criterion.compute_ot_hidden(distiller, *hidden, *b.masks, {})
        return near + far, {"logit_transport": near, "state_transport": far}, trained(extras, "ot", "salience")

    def semi_dual(self, phi: Tensor, costs: Tensor) -> Tensor:
        """Compute the dual bound of the second program for a potential (M,) and costs (3, M, N) with equal weights."""
        module = load(self.folder, "HoangTran223/MCW-KD", "code", "criterions.ETP_Dual")
        bound = module.MultiCostSemiDualOT(3, 1, 1, num_inner_iters=0).double()
        bound.phi.forward = lambda *_: phi
        rows, columns = (torch.zeros(n, 1, dtype=costs.dtype) for n in costs.shape[1:])
        value: Tensor = bound(rows, columns, list(costs))[0]
        return value


def transport_problem() -> tuple[Tensor, Tensor]:
    """Make a potential (4,) and three costs (3, 4, 5) with gradients."""
    made = torch.Generator().manual_seed(7)
    phi = torch.randn(4, generator=made).double() / 4
    return phi, torch.rand(3, 4, 5, generator=made).double().requires_grad_()


class Spelling:
    """Fake tokenizer: strings of the tokens of some sequences, and otherwise of each vocabulary entry."""

    eos_token, eos_token_id = "</s>", 10_000

    def __init__(self, sequences: dict[tuple[int, ...], list[str]], vocabulary: dict[str, int]) -> None:
        self.sequences, self.vocabulary = sequences, vocabulary

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> list[str]:
        numbers = tuple(int(one) for one in ids)
        return self.sequences.get(numbers, [f"w{one}" if self.vocabulary else "same" for one in numbers])

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [self.vocabulary.get(one) for one in tokens]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


WRITTEN = (
    (["alpha", "betagam", "delta", "eps", "zeta"], ["alpha", "beta", "gam", "delta", "eps", "zeta"]),
    (["one", "two", "six", "ten", "four", "five", "nine"], ["onetwosix", "ten", "fourfive", "nine"]),
)
"""The two texts' tokens in both spellings."""
WRITTEN_PARTNER = [0, -1, 3, 4, 5, -1, -1, -1, 7, -1, -1, 9]
"""Tokens of the same bytes; which ones the programs pair is checked against it."""


def spelled(b: Batched) -> tuple[Spelling, Spelling]:
    """Make both tokenizers of a case with the texts of :data:`WRITTEN`; they share their first 30 tokens."""
    sides = []
    for side, vocab_size in ((0, 41), (1, 53)):
        sequences = {}
        for text, written in enumerate(WRITTEN):
            for ids in (b.inputs, b.labels):
                sequences[tuple(ids[side][text][b.masks[side][text]].tolist())] = written[side]
        names = {f"w{word}" if word < 30 else f"{'st'[side]}{word}": word for word in range(vocab_size)}
        sides.append(Spelling(sequences, names))
    return sides[0], sides[1]


def trained(extras: nn.Module, *modules: str) -> dict[str, nn.Parameter]:
    return {name: one for name, one in extras.named_parameters() if name.split(".")[0] in modules}


def flat(mask: Tensor, index: int) -> int:
    """Find the position of a labelled token, by its index, in the flattened batch."""
    return int(mask.flatten().nonzero()[index, 0])


def spaces(log: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"t2s_kd_loss": "student_space", "t2s_ce_loss": "projected", "s2t_kd_loss": "teacher_space"}
    return {names[name]: value for name, value in log.items() if name in names}


def labels_of(b: Batched) -> dict[str, Any]:
    count = b.masks[0].sum()
    return {"label_batch": {"label": b.labels[0], "loss_denom": count}, "teacher_label_batch": {"label": b.labels[1]}}
