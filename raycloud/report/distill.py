"""Report of a distillation: tables on the console and the page of the result directory.

The summary that they show is made by :mod:`raycloud.jobs.distill_summary`; a new column is added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raycloud.origin import Origin
from raycloud.report.bos import bos_lines, print_bos
from raycloud.report.console import console
from raycloud.report.numbers import plotted, shown
from raycloud.report.page import Page
from raycloud.report.plots import curves, grouped_bars
from raycloud.report.run_files import run_files
from raycloud.report.table import print_table

Summary = dict[str, Any]
_PERPLEXITIES = ("teacher_ppl", "student_ppl_before", "student_ppl_after")


def _share(value: float | None) -> str:
    return shown(value, ".1%").replace("%", " %")


def _gap(of: Summary) -> str:
    """Format how much of the perplexity gap to the teacher a run or a group closed."""
    diverged = any(math.isnan(plotted(of[key])) for key in _PERPLEXITIES)
    return "no gap" if of["gap_closed"] is None and not diverged else _share(of["gap_closed"])


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f} M"


def _objective(options: dict[str, Any]) -> str:
    """Describe the objective of a student, such as ``0.5 cross_entropy + 0.5 dskd (compat ours)``."""
    kd = options["kd"]
    compat = f" (compat {kd['compat']})" if "compat" in kd else ""
    weights = {"cross_entropy": options["ce_weight"], f"{kd['name']}{compat}": options["kd_weight"]}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)


def _models(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Table of one cohort: the teacher, and the student before and after distillation."""
    header = ["", "teacher", "student before", "student after"]
    rows = [
        ["perplexity", *(shown(summary[key], ".1f") for key in _PERPLEXITIES)],
        ["gap closed", "", "", _gap(summary)],
        ["agreement with teacher", "", _share(summary["agreement_before"]), _share(summary["agreement_after"])],
        ["KL from teacher, nats per token", "", shown(summary["kl_before"], ".3f"), shown(summary["kl_after"], ".3f")],
    ]
    if summary["rouge_l_after"] is not None:
        kinds = ("teacher_rouge_l", "rouge_l_before", "rouge_l_after")
        rows.append(["ROUGE-L of answers", *(shown(summary[kind], ".1f") for kind in kinds)])
    rows += [
        ["parameters", _millions(summary["teacher_params"]), *[_millions(summary["student_params"])] * 2],
        ["tokens/s, generating", f"{summary['teacher_tok_s']:.1f}", "", f"{summary['student_tok_s']:.1f}"],
    ]
    if "objective" in summary:  # summaries of earlier versions lack it
        rows.append(["objective", "", "", _objective(summary["objective"])])
    return header, rows


def _compare_students(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Table that compares the students of several cohorts."""
    header = ["student", "parameters", "tokens trained", "perplexity before", "after", "agreement", "KL"]
    return header, [
        [
            name,
            _millions(student["student_params"]),
            str(student["student_tokens"]),
            shown(student["student_ppl_before"], ".1f"),
            shown(student["student_ppl_after"], ".1f"),
            _share(student["agreement_after"]),
            shown(student["kl_after"], ".3f"),
        ]
        for name, student in summary["students"].items()
    ]


def _students(summary: Summary) -> list[tuple[str, Summary]]:
    """Headline numbers of each cohort, merged with those of the run; a single cohort gets an empty name."""
    students = summary["students"]
    return [("" if len(students) == 1 else name, {**summary, **student}) for name, student in students.items()]


def _verdict(name: str, student: Summary) -> str:
    """State in one sentence what distillation did for a student."""
    before, after, teacher = (
        shown(student[key], ".1f") for key in ("student_ppl_before", "student_ppl_after", "teacher_ppl")
    )
    agreement = f"agreement with the teacher from {_share(student['agreement_before'])} to "
    return (
        f"Student{f' {name!r}' if name else ''}: held-out perplexity from {before} to {after} (teacher {teacher}), "
        f"{agreement}{_share(student['agreement_after'])}."
    )


def _groups(summary: Summary) -> tuple[list[str], list[list[str]]]:
    singles = list(next(iter(summary["groups"].values()))["single_ppl"])
    header = [
        "perplexity on",
        "teacher",
        "before",
        "after",
        "gap closed",
        *(f"{name} before averaging" for name in singles),
    ]
    return header, [
        [
            name,
            *(shown(group[key], ".1f") for key in _PERPLEXITIES),
            _gap(group),
            *(shown(group["single_ppl"][single], ".1f") for single in singles),
        ]
        for name, group in summary["groups"].items()
    ]


def _link(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [[kind.replace("_", " "), f"{size / 1e6:.2f} MB"] for kind, size in summary["wire_bytes"].items()]
    return ["traffic on the link", "payload"], [
        *rows,
        ["ids and signals per token", f"{summary['wire_bytes_per_token']:.0f} B"],
    ]


_DATA: dict[str, tuple[str, Callable[[Any], str]]] = {
    "samples": ("samples", str),
    "dropped_empty": ("samples dropped, no token to predict", str),
    "dropped_long": ("samples dropped, prompt too long", str),
    "shortened_prompts": ("prompts shortened", _share),
    "unlike_prompts": ("prompts that the two chat templates format differently", _share),
    "exact_partners": ("student's tokens with an exact match", _share),
    "shared_boundaries": ("student's token boundaries shared", _share),
    "student_vocabulary": ("student's vocabulary covered by the teacher's", _share),
    "teacher_vocabulary": ("teacher's vocabulary mapped to the student's", _share),
    "shared_vocabulary": ("vocabulary entries in common", str),
    "eos_mapped": ("EOS mapped", lambda mapped: "yes" if mapped else "no"),
    "student_specials": ("special tokens of the student only", " ".join),
    "teacher_specials": ("special tokens of the teacher only", " ".join),
}
"""Label and format of each diagnostic figure about an edge's data."""


def _diagnostics(summary: Summary) -> tuple[list[str], list[list[str]]]:
    edges = summary["diagnostics"].values()
    terms = dict.fromkeys(term for edge in edges for term in edge["shares"])

    def cell(value: float | None, written: Callable[[float], str]) -> str:
        return "" if value is None else written(value)

    return ["", *summary["diagnostics"]], [
        *([title, *(write(edge["data"][key]) for edge in edges)] for key, (title, write) in _DATA.items()),
        ["teacher's entropy", *(cell(edge["entropy"], "{:.2f} nats".format) for edge in edges)],
        *([f"gradient share, {term}", *(cell(edge["shares"].get(term), _share) for edge in edges)] for term in terms),
    ]


def _warnings(summary: Summary) -> list[list[str]]:
    return [[name, sentence] for name, edge in summary["diagnostics"].items() for sentence in edge["warnings"]]


def print_summary(summary: Summary) -> None:
    """Print the tables of a finished run, and prompts with the completions of both models."""
    students = _students(summary)
    if len(students) > 1:
        print_table(*_compare_students(summary))
    for name, student in students:
        if name:
            console.print(f"\nstudent '{name}'", style="bold")
        print_table(*_models(student))
        print_table(*_groups(student))
        for one in student["completions"]:
            console.print(f"\n{_plain(one['prompt'])}", style="bold")
            console.print(f"  teacher: {_plain(one['teacher'])}")
            console.print(f"  student: {_plain(one['student'])}")
    print_table(*_link(summary))
    for name, sentence in _warnings(summary):
        console.print(f"warning: {name}: {sentence}", style="yellow")
    print_bos(summary)
    console.print(f"\n{summary['rounds']} rounds, {summary['trained_tokens']} tokens, {summary['seconds']:.0f} s")


def _plain(text: str) -> str:
    return " ".join(text.split())


def write_page(folder: Path, summary: Summary, metrics: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html`` into a result directory."""
    students = _students(summary)
    page = Page("Distillation", " ".join(_verdict(*student) for student in students), Origin.read(folder))
    page.text(f"{folder.name}: {summary['rounds']} rounds in {summary['seconds']:.0f} s")
    page.table(*(_compare_students(summary) if len(students) > 1 else _models(students[0][1])))
    page.text(*bos_lines(summary))
    page.heading("Loss")
    steps = [record for record in metrics if record["kind"] == "step"]
    names = list(dict.fromkeys(record["student"] for record in steps))
    lines = {name: [(r["step"], r["loss"]) for r in steps if r["student"] == name] for name in names}
    starts = {record["round"]: record["step"] for record in reversed(steps)}
    page.picture(curves(lines, "step", "loss per token", marks=sorted(starts.values())[1:]), "loss curves")
    page.text("Dotted lines: the students are averaged.")
    for name, student in students:
        page.heading(f"Held-out text, student '{name}'" if name else "Held-out text")
        if name:
            page.table(*_models(student))
        page.table(*_groups(student))
        groups = student["groups"]
        page.picture(
            grouped_bars(
                list(groups),
                {
                    "before": [plotted(group["student_ppl_before"]) for group in groups.values()],
                    "after": [plotted(group["student_ppl_after"]) for group in groups.values()],
                    "teacher": [plotted(group["teacher_ppl"]) for group in groups.values()],
                },
                "perplexity",
            ),
            "perplexity by group",
        )
        completions = [list(one.values()) for one in student["completions"]]
        page.table(["prompt", "teacher", "student"], completions, prose=True)
    page.heading("Diagnostics")
    page.table(*_diagnostics(summary))
    measured = [record for record in metrics if record["kind"] == "diagnostics" and record.get("shares")]
    shares = {
        f"{student}: {term}": [(r["step"], r["shares"][term]) for r in measured if r["student"] == student]
        for student, term in dict.fromkeys((r["student"], term) for r in measured for term in r["shares"])
    }
    if shares:
        page.picture(curves(shares, "step", "share of the gradient"), "gradient shares")
        page.text(
            "Norm of each term's gradient in the student's final hidden states, relative to the sum of the norms."
        )
    if warnings := _warnings(summary):
        page.table(["student", "warning"], warnings, prose=True)
    page.heading("Link")
    page.table(*_link(summary))
    page.text(
        "Ids and signals grow with the text. Every edge gets the weights once per round and the head once per run."
    )
    missed = [record for record in metrics if record["kind"] == "missed"]
    if missed:
        page.heading("Rounds that students missed")
        page.table(
            ["round", "student", "reason"], [[str(r["round"] + 1), r["student"], r["why"]] for r in missed], prose=True
        )
    page.save(folder / "report.html", recipe)


def render(folder: Path) -> Path:
    """Write the page of a finished run again; return its path."""
    write_page(folder, *run_files(folder))
    return folder / "report.html"
