"""The numbers in the files beside this one: what the published programs compute from the small cases of the tests.

``python -m tests.distill.published.make FOLDER`` writes them anew. FOLDER holds a clone of each program at the commit
that :data:`PROGRAMS` names, as ``owner+name``. The programs run as they are: their functions get a batch and two models
that return the case's rows, and modules they import and do not need here are empty. No part of them is kept.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycloud.distill.objectives import OBJECTIVES
from tests.distill.cases import Case
from tests.distill.published.programs import WRITTEN_PARTNER, Found, Programs, transport_problem

HERE = Path(__file__).parent
PROGRAMS = {
    "songmzhang/DSKD": "077337ac989045ccf11a6dd927418e3cf4f40971",
    "songmzhang/DSKDv2": "5025279382e21be18e642698d99e0120fc26667b",
    "2018cx/Multi-Level-OT": "712cfb49aeae64045961bce641ca5d913f5fcf35",
    "HoangTran223/MCW-KD": "70ceb2d03bd0d97d8b7f22aaed582b147fddfc57",
    "Nicolas-BZRD/llm-recipes": "ab6e79800d28a1820348d72fc43ad964bb51ac29",
    "jongwooko/distillm": "d47e77ff9d27721783b32213be38c1204230cc0a",
    "wutaiqiang/LLM_KD_AKL": "ff278be603df44b10afc07da3c7962ec8218aca7",
    "huggingface/trl": "f2cd57710ae345ea6428ae95363267fcf38a3dc8",
}


@dataclass(frozen=True)
class Run:
    """One case of one program, and the objective that must give the same numbers."""

    program: str
    source: str
    """Files and lines."""
    objective: dict[str, Any]
    run: Callable[[Case, Any], Found]
    """The program on a case, with the objective's extras."""
    case: dict[str, Any] = field(default_factory=lambda: {"same": True})
    text: int | None = None
    """One text of the case only."""
    times: Callable[[Case], float] = lambda case: 1.0
    """Ours is a sum over tokens: the program's value times this."""
    less: dict[str, Any] | None = None
    """Options: what the objective gives with them is taken off."""
    unlike: str | None = None
    """Quantities that this program computes differently from ours, and that are not compared."""
    note: str = ""


def made(run: Run) -> dict[str, Any]:
    """Compute the numbers of one run."""
    options = dict(run.objective)
    objective = OBJECTIVES[options.pop("name")](**options)
    case = Case(**run.case)
    if run.text is not None:
        case = case.alone(run.text)
    extras = case.extras(objective)
    value, terms, trained = run.run(case, extras)
    gradient, *others = torch.autograd.grad(value, [case.h, *trained.values()], allow_unused=True)
    found: dict[str, Any] = {
        "source": run.source,
        "objective": run.objective,
        "case": run.case,
        "text": run.text,
        "inputs": checksum(case, extras),
        "times": run.times(case),
        "less": run.less,
        "unlike": run.unlike,
        "value": float(value.detach()),
        "terms": {name: float(term.detach()) for name, term in terms.items()},
        "gradient": [[float(f"{x:.7g}") for x in row] for row in gradient.tolist()],
        "trained": {
            name: [float(one.norm()), float(one.sum())]
            for name, one in zip(trained, others, strict=True)
            if one is not None
        },
    }
    return found | ({"note": run.note} if run.note else {})


def checksum(case: Case, extras: nn.Module | None) -> list[float]:
    """Compute sums that identify the case on which a program was run."""
    mine, its = case.ids
    tensors = [case.h, case.g, case.head.weight, case.teacher_weight, mine.labels.double(), its.labels.double()]
    tensors += [] if extras is None else [torch.cat([one.flatten() for one in extras.parameters()])]
    return [round(float(one.detach().abs().sum()), 4) for one in tensors]


TOKENS: dict[str, Any] = {"lengths": [[5, 7], [6, 4]], "partner": WRITTEN_PARTNER}
UNNAMED: dict[str, Any] = TOKENS | {"seed": 43}
"""One choice of the teacher's is no word of the student."""
EVEN: dict[str, Any] = {"lengths": [[6, 6], [5, 5]], "seed": 51}
"""Without padding, which has a part in the programs' deviations; two tokens are right before anything is learned."""
LEVEL: dict[str, Any] = {"lengths": [[5, 7], [7, 4]]}
"""Equal padded lengths on both sides, as the program requires."""
TOGETHER: dict[str, Any] = {"same_bytes": True}
"""The program's bytes, which are edit distances along a warping path, cost nothing."""


def tokens(case: Case) -> float:
    return len(case.h)


def shorter(case: Case) -> float:
    (both,) = case.texts
    return min(at.stop - at.start for at in both)


def runs(programs: Programs) -> list[Run]:
    """List all runs."""
    dskd, v2, mcw = "songmzhang/DSKD", "songmzhang/DSKDv2", "HoangTran223/MCW-KD"
    lines = {
        "forward_kl": "87-115",
        "reverse_kl": "117-145",
        "adaptive_kl": "147-189",
        "skewed_forward_kl": "191-221",
        "skewed_reverse_kl": "223-254",
        "js_divergence": "256-292",
    }
    made = [
        Run(
            dskd,
            f"code/criterions/various_divergence.py:{at}",
            {"name": name, "temperature": 1.5},
            programs.divergence(name),
        )
        for name, at in lines.items()
    ]
    path = "distillm/losses.py"
    for function, at, objective in (
        ("reverse_kl", "14-24", {"name": "reverse_kl"}),
        ("js_distance", "32-53", {"name": "js_divergence", "beta": 0.1}),
    ):
        made.append(Run("jongwooko/distillm", f"{path}:{at}", objective, programs.distillm(function), times=tokens))
    for function, at in (("forward_kl", "4-12"), ("skewed_forward_kl", "66-78"), ("skewed_reverse_kl", "80-95")):
        unlike = None if function == "skewed_reverse_kl" else "value: without the teacher's entropy"
        made.append(
            Run(
                "jongwooko/distillm",
                f"{path}:{at}",
                {"name": function},
                programs.distillm(function),
                times=tokens,
                unlike=unlike,
            )
        )
    for beta in (0.0, 0.3, 0.5, 1.0):
        made.append(
            Run(
                "huggingface/trl",
                "trl/experimental/gkd/gkd_trainer.py:239-323",
                {"name": "js_divergence", "temperature": 1.5, "beta": beta},
                programs.gkd(beta),
                times=tokens,
            )
        )
    made.append(
        Run(
            "wutaiqiang/LLM_KD_AKL",
            "AKL.py:1-46",
            {"name": "adaptive_kl"},
            programs.akl,
            times=tokens,
            unlike="value and gradient: the word at which the mass is reached is of the tail, unless it is the first",
        )
    )
    published = {"compat": "published"}
    made += [
        Run(
            dskd,
            "code/criterions/universal_logit_distillation.py:67-120",
            {"name": "uld", **published},
            programs.uld,
            {},
        ),
        *(
            Run(
                "Nicolas-BZRD/llm-recipes",
                "models/distillation_model.py:65-175",
                {"name": "uld", **published},
                programs.uld_first,
                {},
                text=text,
                times=shorter,
                note="a mean over a text's tokens",
            )
            for text in (0, 1)
        ),
        Run(
            dskd,
            "code/criterions/min_edit_dis_kld.py:90-209",
            {"name": "mined", **published},
            programs.mined,
            TOKENS,
        ),
        Run(dskd, "code/criterions/dual_space_kd.py:56-98", {"name": "dskd", "version": 1}, programs.dskd),
        Run(
            dskd,
            "code/criterions/dual_space_kd_with_cross_model_attention.py:57-164",
            {"name": "dskd_cma", "teacher_temperature": 1.5, **published},
            programs.dskd_cma,
            EVEN,
        ),
    ]
    for divergence in ("forward_kl", "reverse_kl"):
        options = {"name": "dskd", "divergence": {"name": divergence}, **published}
        made += [
            Run(
                v2,
                "code/criterions/dual_space_kd_v2.py:57-130, code/distiller.py:110-154",
                options,
                programs.dskd_v2(divergence),
                times=tokens,
            ),
            Run(
                v2,
                "code/criterions/dual_space_kd_v2_with_exact_token_alignment.py:8-41 and 97-238",
                options,
                programs.dskd_v2_aligned(divergence),
                UNNAMED,
                times=tokens,
            ),
        ]
    made += [
        Run(
            "2018cx/Multi-Level-OT",
            "models/distillation_model.py:17-57 and 221-349",
            {"name": "multi_level_ot", "compat": "official"},
            programs.official,
            {},
            times=tokens,
        ),
        Run(
            mcw,
            "code/criterions/MultiLevelOT.py:7-49 and 141-204",
            {"name": "multi_level_ot", "compat": "mcwkd"},
            programs.mcwkd,
            LEVEL,
        ),
    ]
    options = {"name": "mcw_kd", "k": 9, "weighting": "projected", **published}
    path, attention = "code/criterions/MCW_KD.py", options | {"transport": 0.0}
    made.append(Run(mcw, f"{path}:331-430", attention, programs.mcw_kd_attention, EVEN))
    made += [
        Run(
            mcw,
            f"{path}:118-257, code/criterions/ETP.py:36-57",
            options,
            programs.mcw_kd_transports,
            TOGETHER,
            text=text,
            less={"transport": 0.0},
            times=tokens,
            note="one text; the plan is held for the gradient",
        )
        for text in (0, 1)
    ]
    return made


def main(folder: Path) -> None:
    """Write the files beside this one."""
    programs = Programs(folder)
    by_program: dict[str, list[dict[str, Any]]] = {}
    for run in runs(programs):
        by_program.setdefault(run.program, []).append(made(run))
    phi, costs = transport_problem()
    bound = programs.semi_dual(phi, costs)
    semi_dual = {
        "source": "code/criterions/ETP_Dual.py:209-313",
        "value": float(bound.detach()),
        "gradient": torch.autograd.grad(bound, costs)[0].tolist(),
    }
    for program, found in by_program.items():
        whole: dict[str, Any] = {
            "program": f"https://github.com/{program}",
            "commit": PROGRAMS[program],
            "made": "python -m tests.distill.published.make FOLDER, from the cases of tests/distill/cases.py, "
            f"torch {torch.__version__}, in float64 where the program itself does not go to float32",
            "runs": found,
        }
        if program == "HoangTran223/MCW-KD":
            whole["semi_dual"] = semi_dual
        name = program.split("/")[1].lower().replace("-", "_")
        # A list of numbers in one line.
        text = json.dumps(whole, indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
