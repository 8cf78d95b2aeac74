"""The pages that a build of the documentation writes: from registries, docstrings, signatures and files outside docs/.

Nothing about a single method is written down here: a new explainer, metric or block has its page at the next build.
"""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import sightline
from sightline.arguments import needs
from sightline.attention import ATTENTION
from sightline.explainers import EXPLAINERS, Explainer
from sightline.facts import capitalized, current_name, words
from sightline.metrics import METRICS, MOSAIC_METRICS, PerImageMean

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "reference/generated"
OUTSIDE = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "benchmarks/README.md": "benchmarks"}
"""Pages of the repository that the site shows too."""
MEASURES = METRICS | MOSAIC_METRICS
ACRONYMS = ("AUC", "BAM", "BAP", "BR-NPA", "CBAM", "CNN", "ECA", "GAP", "GC", "GeM", "IoU", "LTPA", "MA", "MIL", "SE")
SPELLINGS = {word.lower().replace("-", ""): word for word in ACRONYMS}
"""How words are spelled in names that `facts.words` leaves as they are."""
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\](?:\([^)]*\))?)*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"^Elsewhere: (.+(?:\n.+)*)", re.MULTILINE)
NAME_ELSEWHERE = re.compile(r"`([^`]+)` \(([^)]+)\)")


def write(folder: Path = GENERATED) -> None:
    """Write all pages anew; files whose text is the same keep their date, so that Sphinx does not read them again."""
    pages = dict(all_pages())
    for path in [path for path in folder.rglob("*.md") if str(path.relative_to(folder)) not in pages]:
        path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def all_pages() -> Iterator[tuple[str, str]]:
    """Path below the folder and text of every page."""
    for name, explainer in EXPLAINERS.items():
        yield f"explainers/{name}.md", explainer_page(name, explainer)
    for name, measure in MEASURES.items():
        yield f"metrics/{name}.md", metric_page(name, measure)
    for name, block in ATTENTION.items():
        yield f"attention/{name}.md", block_page(name, block)
    yield (
        "explainers/index.md",
        overview("Explainers", EXPLAINER_HEAD, map(explainer_row, EXPLAINERS.items()), EXPLAINERS),
    )
    yield "metrics/index.md", overview("Metrics", METRIC_HEAD, map(metric_row, MEASURES.items()), MEASURES)
    yield "attention/index.md", overview("Attention blocks", BLOCK_HEAD, map(block_row, ATTENTION.items()), ATTENTION)
    yield "elsewhere.md", elsewhere_page()
    yield from api_pages()
    for source, name in OUTSIDE.items():
        yield f"{name}.md", relinked((ROOT / source).read_text(), ROOT / source, GENERATED / f"{name}.md")
    yield from file_pages()


# ------------------------------------------------------------------------------------------------------- one method


def explainer_page(name: str, explainer: Explainer) -> str:
    """What an explainer says, its formula, and the facts that its registry entry declares."""
    signature = inspect.signature(explainer.formula)
    asked = {current_name(parameter): parameter for parameter in signature.parameters if parameter in explainer.needs}
    needed = [f"`{parameter}`: {EVIDENCE[field]}" for field, parameter in asked.items()]
    facts = {
        "Needs": "; ".join(needed),
        "Layer": layer_of(explainer),
        "Cost": cost_of(explainer),
        "Values": "negative values speak against the class" if explainer.is_signed else "larger is more important",
        "Adds up": "the map should sum to the explained score; a gap is a verdict" if explainer.sums_to_score else "no",
        "Depends on the class": "no: the same map for every class" if explainer.is_blind_to_class else "yes",
    }
    picture = f"![{title_of(name)} of an image](../../../pictures/explainers/{name}.jpg)"
    parts = [
        f"# {title_of(name)}: `{name}`",
        picture if (DOCS / f"pictures/explainers/{name}.jpg").exists() else "",
        *around(markdown(explainer.formula, "explainers"), row_of("explanation/maps.md", name)),
        table(("", ""), *((f"**{fact}**", text) for fact, text in facts.items())),
        options_of(signature, explainer.options, "formula"),
        f"## How to call it\n\n```python\n{call_of(name, explainer)}\n```",
        f"## The formula in code\n\n```python\n{formula_in_code(explainer.formula)}\n```\n\n"
        f"From `{explainer.formula.__module__}`.",
        "[All explainers](index.md) · [What each map says](../../../explanation/maps.md)"
        " · [What a map costs](../../../explanation/cost.md)",
    ]
    return joined(parts)


def metric_page(name: str, measure: type[PerImageMean]) -> str:
    """What a metric measures, its definition, and the facts that its declaration holds."""
    function: Any = measure.function
    formula = getattr(function, "formula", function)
    better = {True: "higher", False: "lower", None: "neither: a test or a description"}[measure.higher_is_better]
    facts = {
        "Needs": ", ".join(f"`{need}`" for need in sorted(needs(function))),
        "Better": better,
        "Chance": chance_of(measure),
        "Cost": cost_of_metric(measure),
        "In a report": measure.meaning.format(methods="*methods*"),
        "torchmetrics class": f"`sl.metrics.{measure.__name__}`",
    }
    signature = inspect.signature(function)
    parts = [
        f"# {title_of(name)}: `{name}`",
        *around(markdown(function, "metrics"), row_of("explanation/measures.md", name)),
        table(("", ""), *((f"**{fact}**", text) for fact, text in facts.items() if text)),
        options_of(signature, [each for each in signature.parameters if each not in needs(function)], "function"),
        f"## The formula in code\n\n```python\n{formula_in_code(formula)}\n```\n\nFrom `{formula.__module__}`.",
        "[All metrics](index.md) · [What each number means](../../../explanation/measures.md)"
        " · [How methods are compared](../../../explanation/comparing.md)",
    ]
    return joined(parts)


def block_page(name: str, block: Callable[..., Any]) -> str:
    """What an attention block computes, its size, its options and its source."""
    cls = class_of(block)
    built = block(256)
    pools = hasattr(built, "out_channels")
    parameters = sum(parameter.numel() for parameter in built.parameters())
    signature = inspect.signature(block)
    facts = {
        "Kind": "pooling: replaces global average pooling" if pools else "gating: weights features, keeps their shape",
        "Shape": f"`(b, c, h, w)` to `{'(b, k * c)' if pools else '(b, c, h, w)'}`",
        "Parameters": f"{parameters:,} for 256 channels",
        "Class": f"`sl.attention.{cls.__name__}`",
    }
    use = f'model = sl.create_model("resnet18", num_classes=5, attention="{name}")'
    use += "" if pools else f'\nmodel = sl.insert(model_of_yours, "{name}")'
    parts = [
        f"# {title_of(name)}: `{name}`",
        markdown(cls, "attention"),
        table(("", ""), *((f"**{fact}**", text) for fact, text in facts.items())),
        options_of(signature, [each for each in signature.parameters if each != "channels"], "block"),
        f"## How to use it\n\n```python\n{use}\n```",
        f"## The block in code\n\n```python\n{code_of(cls)}\n```\n\nFrom `{cls.__module__}`.",
        "[All attention blocks](index.md) · [Attention blocks explained](../../../explanation/attention.md)"
        " · [Insert attention](../../../howto/insert-attention.md)",
    ]
    return joined(parts)


def layer_of(explainer: Explainer) -> str:
    if explainer.needs & {"gate", "gates"}:
        return "an attention block"
    if explainer.needs & {"activations", "gradients", "mean_gradients", "runner_up_gradients", "head"}:
        return "reads one, the last feature map by default; the map has its resolution"
    return "reads none"


def cost_of(explainer: Explainer) -> str:
    if explainer.is_control:
        return "nothing: it never looks at the model"
    if explainer.many_passes:
        return "many passes per image, in batches of bounded memory; `--methods fast` leaves it out"
    if explainer.needs & {"input_gradients", "guided_gradients", "deconvolved_gradients"}:
        return "few passes: a forward and a backward through the whole network, shared with other methods"
    if explainer.needs & {"gradients", "mean_gradients", "runner_up_gradients"}:
        return "few passes: a forward, and a backward through the part after the layer, shared with other methods"
    if "score" in explainer.needs:
        return "few passes of its own"
    return "one forward pass, shared with other methods"


def cost_of_metric(measure: type[PerImageMean]) -> str:
    if measure.explanations:
        return f"each image is explained {measure.explanations} times"
    return "runs the model on changed images" if "model" in needs(measure.function) else "reads the map only"


def chance_of(measure: type[PerImageMean]) -> str:
    if measure.chance is None:
        return ""
    return "the mask's area" if callable(measure.chance) else f"{measure.chance:g}"


def call_of(name: str, explainer: Explainer) -> str:
    """The shortest call, and one with the first option at its default value."""
    lines = [f'explanation = sl.explain(model, images, methods=["{name}"])', f'explanation["{name}"]']
    for parameter in inspect.signature(explainer.formula).parameters.values():
        if isinstance(parameter.default, int | float | str):
            option = f"{parameter.name}={parameter.default!r}".replace("'", '"')
            lines.append(f"sl.explain(model, images, methods=[partial(sl.explainers.{name}, {option})])")
            break
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- overviews

EXPLAINER_HEAD = ("name", "in one sentence", "passes", "layer", "signed", "sums to the score", "ignores the class")
METRIC_HEAD = ("name", "in one sentence", "needs", "better", "chance")
BLOCK_HEAD = ("name", "in one sentence", "kind")


def explainer_row(item: tuple[str, Explainer]) -> tuple[str, ...]:
    name, explainer = item
    yes = {True: "yes", False: ""}
    return (
        f"[`{name}`]({name}.md)",
        sentence_of(explainer.formula),
        "none" if explainer.is_control else "many" if explainer.many_passes else "few",
        yes[not layer_of(explainer).endswith("none")],
        yes[explainer.is_signed],
        yes[explainer.sums_to_score],
        yes[explainer.is_blind_to_class],
    )


def metric_row(item: tuple[str, type[PerImageMean]]) -> tuple[str, ...]:
    name, measure = item
    better = {True: "higher", False: "lower", None: "neither"}[measure.higher_is_better]
    needed = ", ".join(sorted(needs(measure.function)))
    return f"[`{name}`]({name}.md)", sentence_of(measure.function), needed, better, chance_of(measure)


def block_row(item: tuple[str, Callable[..., Any]]) -> tuple[str, ...]:
    name, block = item
    kind = "pooling" if hasattr(block(16), "out_channels") else "gating"
    return f"[`{name}`]({name}.md)", sentence_of(class_of(block)), kind


def overview(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]], names: Iterable[str]) -> str:
    """All entries of a registry in one table."""
    tree = "\n".join(f"{title_of(name)} <{name}>" for name in names)
    return joined([f"# {title}", table(head, *rows), f"```{{toctree}}\n:hidden:\n\n{tree}\n```"])


def elsewhere_page() -> str:
    """The names that other libraries have for explainers, metrics and blocks."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for kind, registry in (("explainers", EXPLAINERS), ("metrics", MEASURES), ("attention", ATTENTION)):
        for name, entry in registry.items():
            for theirs, library in NAME_ELSEWHERE.findall(elsewhere(docstring_of(entry))):
                rows.setdefault(library, []).append((f"`{theirs}`", f"[`{name}`]({kind}/{name}.md)"))
    parts = [
        "# Names in other libraries",
        "Where another library has the same method under another name. "
        "[Maps](../../peers/maps.md) and [scores](../../peers/scores.md) were compared number by number.",
    ]
    for library, names in sorted(rows.items(), key=lambda item: item[0].lower()):
        parts.append(f"## {library}\n\n{table((library, 'sightline'), *sorted(names))}")
    return joined(parts)


def docstring_of(entry: Any) -> str:
    entry = class_of(entry)
    return inspect.getdoc(entry.function if entry in MEASURES.values() else entry) or ""


def elsewhere(docstring: str) -> str:
    found = ELSEWHERE.search(docstring)
    return found[1] if found else ""


# ---------------------------------------------------------------------------------------------------------------- API


def api_pages() -> Iterator[tuple[str, str]]:
    """A page for the functions of the package itself, one for each public module, and their list."""
    names = {name: getattr(sightline, name) for name in sightline.__all__}
    functions = {name: value for name, value in names.items() if not inspect.ismodule(value)}
    modules = {f"sl.{name}": value for name, value in names.items() if inspect.ismodule(value)}
    modules["sightline.evaluation"] = import_module("sightline.evaluation")
    rows = [("[`sl`](sightline.md)", ", ".join(f"`sl.{name}`" for name in functions))]
    for title, module in modules.items():
        name = title.rpartition(".")[2]
        rows.append((f"[`{title}`]({name}.md)", first_sentence(inspect.getdoc(module) or "")))
        yield f"api/{name}.md", module_page(title, module, functions)
    entries = [f"## sl.{name}\n\n{entry_of('sl', name, value)}" for name, value in functions.items()]
    yield "api/sightline.md", joined(["# sl", "`import sightline as sl` loads nothing heavy.", *entries])
    tree = "\n".join(f"{title} <{title.rpartition('.')[2]}>" for title in modules)
    tree = f"```{{toctree}}\n:hidden:\n\nsl <sightline>\n{tree}\n```"
    yield "api/index.md", joined(["# Public names", table(("module", "what is in it"), *rows), tree])


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or what the module and its parts define, without underscore."""
    if listed := getattr(module, "__all__", None):
        return sorted(listed)
    homes = {name: str(getattr(value, "__module__", "")) for name, value in vars(module).items() if name[0] != "_"}
    return sorted(name for name, home in homes.items() if f"{home}.".startswith(f"{module.__name__}."))


def module_page(title: str, module: ModuleType, functions: Mapping[str, Any]) -> str:
    """Everything that a module exports; what has a page of its own is a link."""
    pages = {name: "sightline.md" for name, value in functions.items() if getattr(module, name, None) is value}
    if module is sightline.explainers:
        pages |= {name: f"../explainers/{name}.md" for name in EXPLAINERS}
    elif module is sightline.metrics:
        for name, measure in MEASURES.items():
            pages |= dict.fromkeys((name, measure.__name__), f"../metrics/{name}.md")
    elif module is sightline.attention:
        pages |= {class_of(block).__name__: f"../attention/{name}.md" for name, block in ATTENTION.items()}
    entries: list[str] = []
    for name in public_names(module):
        value = getattr(module, name)
        home = getattr(value, "__module__", "").split(".")[1:2]
        if name not in pages and (inspect.isfunction(value) or inspect.isclass(value)):
            if home == module.__name__.split(".")[1:]:
                entries.append(entry_of(title, name, value))
            elif home and home[0] in sightline.__all__:
                pages[name] = f"{home[0]}.md"
    links = [f"[`{name}`]({pages[name]})" for name in public_names(module) if name in pages]
    listed = f"On pages of their own: {', '.join(links)}." if links else ""
    return joined([f"# {title}", inspect.getdoc(module) or "", listed, *entries])


def class_of(block: Any) -> Any:
    """The class of a block, which may be registered with options."""
    return block.func if isinstance(block, partial) else block


def entry_of(prefix: str, name: str, value: Any) -> str:
    """A function or a class, with its signature and its docstring."""
    fence = "`" * 7
    kind, members = ("class", members_of(prefix, name, value)) if inspect.isclass(value) else ("function", ())
    body = joined([markdown(value, "api"), *members])
    return f"{fence}{{py:{kind}}} {prefix}.{name}{signature_of(value)}\n\n{body}{fence}"


def members_of(prefix: str, name: str, cls: type) -> Iterator[str]:
    """The documented fields, properties and methods that a class itself defines."""
    fence = "`" * 5
    declared = {field.name: field for field in fields(cls)} if is_dataclass(cls) else {}
    for field, (annotation, text) in fields_of(cls).items():
        facts = f":type: {annotation}"
        if field in declared:
            text = text or declared[field].metadata.get("help", "")
            facts += f"\n:value: {declared[field].default!r}" if declared[field].default is not MISSING else ""
        yield f"{fence}{{py:attribute}} {prefix}.{name}.{field}\n{facts}\n\n{text}\n{fence}"
    for member, value in vars(cls).items():
        function = next(
            (getattr(value, inner) for inner in ("fget", "func", "__func__") if hasattr(value, inner)), value
        )
        if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        is_method = inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)
        kind, signature = ("method", signature_of(function)) if is_method else ("property", "")
        yield f"{fence}{{py:{kind}}} {prefix}.{name}.{member}{signature}\n\n{markdown(function, 'api')}\n{fence}"


def parsed(value: Any) -> ast.stmt | None:
    """The syntax tree of a function or class; None if its source is not in a file, as that of a dataclass's methods."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def fields_of(cls: type) -> dict[str, tuple[str, str]]:
    """Annotated fields of a class, each with its type and the docstring below it."""
    node = parsed(cls)
    body = node.body if isinstance(node, ast.ClassDef) else []
    found: dict[str, tuple[str, str]] = {}
    for statement, below in zip(body, [*body[1:], None], strict=False):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)) if name[0] != "_":
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                text = translated(inspect.cleandoc(str(below.value.value)), "api") if is_text else ""
                found[name] = (quoted(ast.unparse(statement.annotation)), text)
            case _:
                pass
    return found


def signature_of(value: Any) -> str:
    """Parameters and result as they are written, with the shapes of tensors: `Float[Tensor, "b c h w"]`."""
    node = parsed(vars(value).get("__init__") if inspect.isclass(value) else value)
    if not isinstance(node, ast.FunctionDef):
        return ""
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns and not inspect.isclass(value) else ""
    return quoted(f"({ast.unparse(node.args)}){result}")


# --------------------------------------------------------------------------------------------------------------- text


def quoted(code: str) -> str:
    return re.sub(r"'([^'\"]*)'", r'"\1"', code)


def joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def table(head: tuple[str, ...], *rows: Iterable[str]) -> str:
    lines = ["| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def title_of(name: str) -> str:
    """A name in words.

    >>> title_of("guided_grad_cam_plus_plus"), title_of("energy_in_mask")
    ('Guided Grad-CAM++', 'Energy in mask')
    """
    return capitalized(" ".join(SPELLINGS.get(word, word) for word in words(name).split()))


def first_sentence(text: str) -> str:
    return " ".join(re.split(r"(?<=[.:])\s*\n\s*\n|\n\s*\n", text.strip())[0].split())


def sentence_of(value: Any) -> str:
    return translated(first_sentence(inspect.getdoc(value) or ""), "").strip().replace("|", "\\|")


def markdown(value: Any, kind: str) -> str:
    """The docstring of something public as Markdown."""
    return translated(inspect.getdoc(value) or "", kind)


def translated(text: str, kind: str) -> str:
    """Google-style sections as lists, examples in fences, `Source:` and the like in bold, methods as links.

    >>> translated("Sum.\\n\\nArgs:\\n    x: a number,\\n        or two.\\n\\nSource: 2020.", "")
    'Sum.\\n\\n**Args**\\n\\n- `x`: a number, or two.\\n\\n**Source:** 2020.'
    """
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.splitlines()
        if lines and lines[0].startswith(">>>"):
            parts.append(f"```pycon\n{paragraph}\n```")
        elif lines and re.fullmatch(r"(Args|Raises|Returns|Options|Yields):", lines[0]):
            items = textwrap.dedent("\n".join(lines[1:]))
            items = re.sub(r"\n\s+", " ", items).splitlines()
            listed = [re.sub(r"^([^:`]+?): ", r"`\1`: ", item) for item in items]
            parts.append(f"**{lines[0][:-1]}**\n\n" + "\n".join(f"- {linked(item, kind)}" for item in listed))
        else:
            prose = re.sub(r"^(Source|Differs|Elsewhere|Raises|Example):", r"\n**\1:**", paragraph, flags=re.MULTILINE)
            parts += [linked(each, kind) for each in re.split(r"\n\n", re.sub(r"\n +(?![-*] )", "\n", prose).strip())]
    return "\n\n".join(parts)


def page_of(name: str) -> str:
    """The page of an explainer or metric, below the folder of generated pages; empty for other names."""
    folders = {"explainers": EXPLAINERS, "metrics": MEASURES}
    return next((f"{folder}/{name}.md" for folder, registry in folders.items() if name in registry), "")


def linked(text: str, kind: str) -> str:
    """Names of explainers and metrics as links, arXiv numbers too."""
    up = "" if kind in ("", "api") else "../"
    base = "../" if kind == "api" else up

    def link(match: re.Match[str]) -> str:
        page = page_of(match[1]) if kind else ""
        return f"[`{match[1]}`]({base}{page})" if page else match[0]

    text = re.sub(r"(?<!\[)`(\w+)`(?!\])", link, text)
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def code_of(value: Any) -> str:
    """Source of a function or a class, without decorators and docstring."""
    lines = textwrap.dedent(inspect.getsource(inspect.unwrap(value))).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    hidden = set(range(1, node.lineno))
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1:
        hidden |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kept = [line for number, line in enumerate(lines, start=1) if number not in hidden]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r":\n\n(\s+)", r":\n\1", "\n".join(kept), count=1))


def formula_in_code(function: Callable[..., Any]) -> str:
    """Source of a formula and of the private functions of its module that it calls."""
    module = inspect.getmodule(function)
    shown, waiting = dict[str, str](), [function]
    while waiting:
        code = code_of(called := waiting.pop(0))
        shown[called.__name__] = code
        names = dict.fromkeys(re.findall(r"\b(_\w+)\(", code))
        helpers = [getattr(module, name, None) for name in names if name not in shown]
        waiting += [helper for helper in helpers if inspect.isfunction(helper) and helper not in waiting]
    return "\n\n\n".join(shown.values())


def options_of(signature: inspect.Signature, names: Iterable[str], what: str) -> str:
    """A table of parameters with their defaults."""
    rows = [
        (f"`{name}`", f"`{default_of(parameter)}`")
        for name, parameter in signature.parameters.items()
        if name in {*names} and parameter.default is not parameter.empty
    ]
    return f"## Options\n\n{table(('option of the ' + what, 'default'), *rows)}" if rows else ""


def default_of(parameter: inspect.Parameter) -> str:
    text = repr(parameter.default)
    return type(parameter.default).__name__ + "()" if text.startswith("<") else text.replace("|", "/")


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """Rows of the tables of a page by the names in their first cells, each with the heads of its columns."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line, below in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif re.fullmatch(r"[|\- ]+", below):
            head = cells
        elif head:
            for name in re.findall(r"`(\w+)`", cells[0]):
                found.setdefault(name, dict(zip(head[1:], cells[1:], strict=False)))
    return found


def around(text: str, row: str) -> tuple[str, str, str]:
    """The first paragraph, the row, and the other paragraphs."""
    first, _, others = text.partition("\n\n")
    return first, row, others


def row_of(page: str, name: str) -> str:
    """What the hand-written page says about a method, one line for each column."""
    row = rows_of((DOCS / page).read_text()).get(name, {})
    text = "\n".join(f"- *{head}:* {cell}" for head, cell in row.items() if head and cell not in ("", "-"))
    return relinked(text, DOCS / page, GENERATED / "explainers/any.md")


EVIDENCE = {
    name: " ".join(f"{row['shape']} {row['what it is']}".split())
    for name, row in rows_of((ROOT / "CONTRIBUTING.md").read_text()).items()
    if "what it is" in row
}
"""What a formula may ask for, from the table in CONTRIBUTING.md."""


# -------------------------------------------------------------------------------------------------- links and files


def site_page(path: Path) -> Path | None:
    """The page of the site for a file of the repository; None if it has none."""
    name = os.path.relpath(path, ROOT)
    if name.startswith("docs/") and path.exists():
        return path
    if name in OUTSIDE:
        return GENERATED / f"{OUTSIDE[name]}.md"
    return GENERATED / f"files/{name}.md" if path.exists() and not name.startswith("..") else None


def with_linked_rows(text: str) -> str:
    """Names in the first cells of tables as links to their pages."""

    def link(match: re.Match[str]) -> str:
        page = page_of(match[2])
        return f"{match[1]}[`{match[2]}`](../reference/generated/{page})" if page else match[0]

    return re.sub(r"^(\| (?:`\w+`, )?)`(\w+)`(?= \||,)", link, text, flags=re.MULTILINE)


def relinked(text: str, source: Path, target: Path) -> str:
    """Links of a page, written for the repository, as links of the site for a page at another place."""
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    def relink(match: re.Match[str]) -> str:
        label, link = match[1], match[2]
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link) or (not path and source == target):
            return match[0]
        page = site_page(Path(os.path.normpath(source.parent / path)) if path else source)
        if page is None:
            return match[0]
        return f"[{label}]({os.path.relpath(page, target.parent)}{'#' + anchor if anchor else ''})"

    return re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], LINK.sub(relink, FENCED.sub(keep, text)))


def linked_files() -> set[Path]:
    """Files and folders outside docs/ that pages link to."""
    pages = [path for path in DOCS.rglob("*.md") if GENERATED not in path.parents] + [ROOT / name for name in OUTSIDE]
    found: set[Path] = set()
    for page in pages:
        for _, link in LINK.findall(FENCED.sub("", page.read_text())):
            path = Path(os.path.normpath(page.parent / link.partition("#")[0]))
            name = os.path.relpath(path, ROOT)
            if (
                not re.match(r"\w+:|#", link)
                and not name.startswith(("docs", ".."))
                and name not in OUTSIDE
                and path.exists()
            ):
                found |= {path, *(path.iterdir() if path.is_dir() else ())}
    return {path for path in found if path.is_dir() or path.suffix in LANGUAGES}


LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}


def file_pages() -> Iterator[tuple[str, str]]:
    """A page for every linked file or folder of the repository."""
    for path in sorted(linked_files()):
        name = os.path.relpath(path, ROOT)
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.suffix in LANGUAGES)
            text = "\n".join(f"- [{each.name}]({path.name}/{each.name}.md)" for each in inside)
        else:
            text = f"```{LANGUAGES[path.suffix]}\n{path.read_text().strip()}\n```"
        yield f"files/{name}.md", f"---\norphan: true\n---\n\n# {name}\n\n{text}\n"
