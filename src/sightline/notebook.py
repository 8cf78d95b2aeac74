"""How results show themselves: in a notebook as pictures, tables and sentences, elsewhere in a few lines."""

import base64
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from html import escape
from reprlib import Repr
from typing import Any
from warnings import catch_warnings, simplefilter

from sightline.facts import Progress, capitalized


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, where HTML is shown."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def uri(kind: str, content: bytes) -> str:
    """A picture as a data URI.

    >>> uri("png", b"abc")
    'data:image/png;base64,YWJj'
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(jpeg: bytes, text: str, width: int) -> str:
    """A picture as HTML, as wide as it is: shrunk to two thirds where there is less room, and then scrolled.

    >>> 'alt="a &lt;cat&gt;"' in picture(b"abc", "a <cat>", 300)
    True
    """
    style = f"max-width:100%;min-width:{round(width / 1.5)}px;height:auto;margin:0"
    image = f'<img style="{style}" width="{width}" src="{uri("jpeg", jpeg)}" alt="{escape(text)}">'
    return f'<div style="overflow-x:auto">{image}</div>'


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as HTML; the first column names the lines.

    >>> table(["map", "score"], [["<own>", "0.5"]]).count("<td"), "&lt;own&gt;" in table(["map"], [["<own>"]])
    (1, True)
    """

    def row(tag: str, cells: Sequence[str]) -> str:
        first, *rest = (escape(cell) for cell in cells)
        others = "".join(f'<{tag} style="text-align:right">{cell}</{tag}>' for cell in rest)
        return f'<tr><th style="text-align:left;white-space:nowrap">{first}</th>{others}</tr>'

    head, body = row("th", columns), "".join(row("td", line) for line in lines)
    return f'<div style="overflow-x:auto"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def sentences(texts: Iterable[str]) -> str:
    """Sentences as an HTML list; nothing where there are none.

    >>> sentences(["a < b"]), sentences([])
    ('<ul><li>A &lt; b</li></ul>', '')
    """
    items = "".join(f"<li>{escape(capitalized(text))}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def heading(text: str) -> str:
    """A line above a table.

    >>> heading("a & b")
    '<p><b>a &amp; b</b></p>'
    """
    return f"<p><b>{escape(text)}</b></p>"


def bar_of(progress: Progress | bool | None) -> Progress | None:
    """What to call with (what, done, total): `progress` itself, or for True a bar of tqdm.

    It is a single bar that also says what else has begun: notebooks without ipywidgets cannot show one below another.
    """
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return None
    with catch_warnings():
        simplefilter("ignore")  # without ipywidgets its bars are letters
        from tqdm.auto import tqdm
    bars: list[Any] = []
    begun: dict[str, str] = {}

    def update(what: str, done: int, total: int) -> None:
        is_new = what not in begun
        begun[what] = f"{what} ({done} of {total})"
        if not bars:
            bars.append(tqdm(total=total, leave=False))
        elif is_new or bars[0].total != total:
            bars[0].reset(total)
        bars[0].set_description(
            "; ".join([*(text for name, text in begun.items() if name != what), what]), refresh=False
        )
        bars[0].update(done - bars[0].n)
        if done >= total:
            del begun[what]
        if not begun:
            bars.pop().close()

    return update


class _Brief(Repr):
    """Values in few letters: tensors and arrays by type and shape, the first items of long collections."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxtuple = self.maxlist = self.maxdict = self.maxset = 3
        self.maxstring = self.maxother = 60

    def repr_Tensor(self, value: Any, level: int) -> str:
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

    repr_ndarray = repr_Tensor


def brief(self: Any) -> str:
    """A dataclass in few letters, as its `__repr__`: fields with their default values are left out.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Found:
    ...     names: list[str]
    ...     reason: str = ""
    ...     __repr__ = brief
    >>> Found(["a"] * 500)
    Found(names=['a', 'a', 'a', ...])
    """
    shown = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
    for each in fields(self):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if default is not MISSING and type(default) is type(shown.get(each.name)) and default == shown[each.name]:
            del shown[each.name]
    return f"{type(self).__name__}({', '.join(f'{name}={_BRIEF.repr(value)}' for name, value in shown.items())})"


_BRIEF = _Brief()
