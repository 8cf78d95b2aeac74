"""How sightline is compared with other libraries, case by case; a difference counts as explained only with a proof."""

import json
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).parents[1]
TEXTS = yaml.safe_load((ROOT / "benchmarks/reasons.yaml").read_text())
VERDICTS = ("equal", "differs", "peer is wrong", "unexplained")
Proof = Callable[..., float]
"""Takes the peer's result, ours and the inputs of the case; returns how much of the difference is left unexplained."""


class Reason(NamedTuple):
    """Why two results differ, with a proof, or with a part of the peer's error message."""

    verdict: str
    key: str
    """Of its text in reasons.yaml."""
    evidence: Proof | str
    shows: Callable[[float], bool] | None
    """Whether the remainder proves the reason; None: it does up to the tolerance."""


@dataclass
class Case:
    """One result of a peer beside ours, both functions of the same inputs."""

    name: str
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    label: str = ""
    """Our call as the page shows it; by default a partial function with its options."""
    truth: Sequence[float] | None = None
    """Worked out by hand."""
    reasons: list[Reason] = field(default_factory=list[Reason])

    def __post_init__(self) -> None:
        if not self.label and isinstance(self.ours, partial):
            options = (f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in self.ours.keywords.items())
            self.label = f"{getattr(self.ours.func, '__name__', '')}({', '.join(options)})"

    def differs(self, key: str, evidence: Proof | str, shows: Callable[[float], bool] | None = None) -> Self:
        """Both results can be defended."""
        self.reasons.append(Reason("differs", key, evidence, shows))
        return self

    def wrong(self, key: str, evidence: Proof | str) -> Self:
        """The peer fails, contradicts itself, or gives something else than its paper says."""
        self.reasons.append(Reason("peer is wrong", key, evidence, None))
        return self


def distance(values: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; NaN equals only NaN."""
    values, reference = values.double().reshape(-1), reference.double().reshape(-1)
    if values.shape != reference.shape or (values.isnan() != reference.isnan()).any():
        return inf
    same = (values == reference) | values.isnan()
    return (values - reference).abs().masked_fill(same, 0.0).max().item()


def is_theirs(formula: Callable[..., Tensor], measure: Callable[[Tensor, Tensor], float] = distance) -> Proof:
    """The formula, written out, gives the peer's result."""
    return lambda theirs, ours, *inputs: measure(formula(*inputs), theirs)


def is_ours(changed: Callable[..., Tensor], measure: Callable[[Tensor, Tensor], float] = distance) -> Proof:
    """The peer without the cause gives our result."""
    return lambda theirs, ours, *inputs: measure(changed(*inputs), ours)


def differ(first: Callable[[], Tensor], second: Callable[[], Tensor] | None = None) -> Proof:
    """Two runs of the peer that should agree do not."""
    return lambda *_: 0.0 if distance(first(), (second or first)()) > 1e-6 else inf


def both(*proofs: Proof) -> Proof:
    return lambda *results: max(proof(*results) for proof in proofs)


@contextmanager
def silence() -> Generator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def compare(
    case: Case, *inputs: Any, tolerance: float, measure: Callable[[Tensor, Tensor], float] = distance
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """The row of the JSON file, the peer's result and ours; None for a result that is an error or a refusal."""
    row: dict[str, Any] = {}

    def attempt(name: str, call: Callable[..., Any], errors: type[Exception] = Exception) -> Any:
        try:
            with silence():
                return call(*inputs)
        except errors as error:
            row[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160] or 'no message'}"

    def number(value: float) -> float | None:
        return value if isfinite(value) else None

    ours, theirs = attempt("refusal", case.ours, ValueError), attempt("error", case.theirs)
    right = case.truth is None or (ours is not None and distance(ours, torch.tensor(case.truth)) <= tolerance)
    difference = inf if theirs is None or ours is None else measure(theirs, ours)
    if theirs is not None and ours is not None:
        row["difference"] = number(difference)
    if right and difference <= tolerance:
        return row | {"verdict": "equal"}, theirs, ours
    for reason in case.reasons if right else []:
        left, evidence = None, reason.evidence
        if isinstance(evidence, str):
            proven = bool(evidence) and evidence in row.get("error", "")
        else:
            left = attempt("failed proof", partial(evidence, theirs, ours)) if theirs is not None else None
            proven = left is not None and (reason.shows(left) if reason.shows else left <= tolerance)
        if proven:
            proof = {} if left is None else {"left": number(left)}
            return row | proof | {"verdict": reason.verdict, "reason": reason.key}, theirs, ours
        row.setdefault("rejected", {})[reason.key] = row.pop("failed proof", left if left is None else number(left))
    return row | {"verdict": "unexplained"}, theirs, ours


def files(name: str) -> tuple[Path, dict[str, str]]:
    """The JSON file of a script, and the texts of its reasons."""
    return ROOT / f"benchmarks/results/{name}.json", TEXTS[name]


def save(
    name: str, pages: Callable[[dict[str, Any]], dict[Path, str]], packages: Iterable[str], **results: Any
) -> None:
    """Write the pages and the JSON file; packages that are not installed have no version."""
    installed = {each.name: each.version for each in distributions()}
    document: dict[str, Any] = {"script": f"benchmarks/{name}.py", "date": datetime.now(UTC).date().isoformat()}
    document |= {"versions": {package: installed.get(package) for package in packages}, **results}
    files(name)[0].write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    for path, text in pages(document).items():
        path.write_text(text)


def written(
    name: str, document: dict[str, Any], counts: dict[str, dict[str, int]], bodies: dict[str, str], **values: Any
) -> dict[Path, str]:
    """The pages of a script: one from its text in reasons.yaml with the counts, and one with the body of each peer."""
    stem = TEXTS["pages"][name]["stem"]
    paths = {peer: ROOT / f"docs/peers/{stem}-{peer}.md" for peer in bodies}
    versions = ", ".join(f"{package} {number}" for package, number in document["versions"].items() if number)
    origin = f"Written by `python {document['script']}` on {document['date']}, not by hand; {versions}."
    kinds = list(next(iter(counts.values())))
    rows = [[f"[{peer}]({paths[peer].name})", *(str(counts[peer][kind]) for kind in kinds)] for peer in bodies]
    total = ["all", *(str(sum(each[kind] for each in counts.values())) for kind in kinds)]
    summary = table(["library", *kinds], *rows, total)
    pages = {
        ROOT / f"docs/peers/{stem}.md": TEXTS["pages"][name]["text"].format(origin=origin, summary=summary, **values)
    }
    for peer, body in bodies.items():
        title = f"{TEXTS['pages'][name]['title']} {peer}"
        version = document["versions"].get(peer)
        about = f"sightline beside {peer}{f' {version}' if version else ''}; [how to read the table]({stem}.md)."
        pages[paths[peer]] = f"# {title}\n\n{about}\n\n{body}\n"
    return pages


def table(*rows: Iterable[str]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * (lines[0].count(" | ") + 1) + "|", *lines[1:]])
