"""Multipart bodies, read with limits. What a client calls a file is a text and never a path."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from sightline.data.images import MAX_PIXELS

_FIELD_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may bring, and how many may wait."""

    bytes: int = 32 * 10**6
    """Of a request."""
    pixels: int = MAX_PIXELS
    """Of an image that is decoded."""
    images: int = 16
    fields: int = 64
    """Fields of a request, images among them."""
    upload_seconds: float = 60.0
    seconds: float = 600.0
    """Of a job."""
    waiting: int = 32
    """Jobs in the queue."""

    def facts(self) -> dict[str, Any]:
        """The limits by name."""
        return asdict(self)


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Form:
    """The fields of a request."""

    texts: dict[str, list[str]]
    files: dict[str, list[tuple[str, bytes]]]
    """Name and content."""

    def text(self, name: str, default: str = "") -> str:
        """The only value of a field.

        Raises:
            Refused: it has several.
        """
        values = self.texts.get(name, [])
        if len(values) > 1:
            raise Refused(400, f"expected one value for {name}, got {len(values)}; send it once")
        return values[0].strip() if values else default


class _Parser(MultiPartParser):
    """Starlette's, which counts all parts."""

    def __init__(self, request: Request, stream: AsyncGenerator[bytes, None], limits: Limits) -> None:
        super().__init__(request.headers, stream, max_part_size=_FIELD_BYTES)
        self.parts, self.limits = 0, limits

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > self.limits.fields:
            raise Refused(413, f"expected at most {self.limits.fields} fields, got more; send fewer")
        super().on_part_begin()


async def read_form(request: Request, limits: Limits, allowed: dict[str, bool]) -> Form:
    """The fields of a request; `allowed`: their names, and whether they are files.

    Raises:
        Refused: no multipart body, a broken one, one beyond a limit, or another field.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        got = kind.partition(";")[0][:60] or "none"
        raise Refused(415, f"expected the content type multipart/form-data, got {got}; send the image as a form field")
    too_large = Refused(413, f"expected at most {limits.bytes:,} bytes, got more; send fewer or smaller images")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.bytes:
        raise too_large

    async def stream() -> AsyncGenerator[bytes, None]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > limits.bytes:
                raise too_large
            yield chunk

    texts: dict[str, list[str]] = {}
    files: dict[str, list[tuple[str, bytes]]] = {}
    try:
        async with asyncio.timeout(limits.upload_seconds):
            form = await _Parser(request, stream(), limits).parse()
    except TimeoutError as error:
        late = f"expected the whole request within {limits.upload_seconds:g} s, got a part; send smaller images"
        raise Refused(408, late) from error
    except MultiPartException as error:
        reason = f"expected a multipart body with names and a boundary, got a broken one: {error.message}"
        raise Refused(400, f"{reason.rstrip('.')}; use an HTTP library to write it") from error
    except ClientDisconnect as error:
        raise Refused(400, "expected a whole request, got a part; send it again") from error
    try:
        for name, value in form.multi_items():
            if name not in allowed:
                raise Refused(400, f"expected fields out of {', '.join(allowed)}; got {name[:60]!r}")
            if allowed[name] != isinstance(value, UploadFile):
                what = ("a text", "a file") if allowed[name] else ("a file", "a text")
                raise Refused(400, f"expected {what[1]} as {name}, got {what[0]}; {_advice(allowed[name])}")
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append((_shown(value.filename or ""), await value.read()))
            else:
                texts.setdefault(name, []).append(value)
    finally:
        await form.close()
    return Form(texts=texts, files=files)


def _advice(is_file: bool) -> str:
    return "send it with a filename" if is_file else "send it without a filename"


def _shown(name: str) -> str:
    r"""A file's name as a text of bounded length: its last part, printable.

    >>> _shown("../../etc/passwd"), _shown("C:\\photos\\cat.jpg"), _shown("a\x00b"), len(_shown(10**4 * "x"))
    ('passwd', 'cat.jpg', 'a_b', 120)
    """
    last = name.replace("\\", "/").rpartition("/")[2][-120:]
    return "".join(letter if letter.isprintable() else "_" for letter in last) or "image"
