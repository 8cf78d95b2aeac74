"""Multipart bodies, read with limits. What a client calls a file is a text and never a path."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from sightline.data.images import MAX_PIXELS
from sightline.facts import did_you_mean

_FIELD_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may bring, and how many may wait."""

    bytes: int = 32 * 10**6
    """Of a request."""
    pixels: int = MAX_PIXELS
    """Of an image that is decoded."""
    images: int = 16
    maps: int = 1000
    """Images of a request times its methods."""
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
    files: dict[str, list[UploadFile]]
    """In memory, or from 1 MB on in a temporary file without a name."""

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
    """Starlette's, which counts all parts, and knows whether the body came to its end."""

    def __init__(self, request: Request, stream: AsyncGenerator[bytes, None], most: int) -> None:
        super().__init__(request.headers, stream, max_part_size=_FIELD_BYTES)
        self.parts, self.most, self.has_ended = 0, most, False

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > self.most:
            raise Refused(413, f"expected at most {self.most} fields, got more; send fewer")
        super().on_part_begin()

    def on_end(self) -> None:
        self.has_ended = True

    def close(self) -> None:
        """Close all files, those of a part that did not end too."""
        for file in self._files_to_close_on_error:
            file.close()


@asynccontextmanager
async def form_of(request: Request, limits: Limits, fields: Mapping[str, bool]) -> AsyncGenerator[Form]:
    """The fields of a request; `fields`: the names that are known, and whether they are files.

    Raises:
        Refused: no multipart body, a broken one, one beyond a limit, or another field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        got = repr(kind[:60]) if kind else "none"
        raise Refused(415, f"expected the content type multipart/form-data, got {got}; send the image as a form field")
    too_large = f"expected at most {limits.bytes:,} bytes, got more; send fewer or smaller images"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.bytes:
        raise Refused(413, too_large)

    async def stream() -> AsyncGenerator[bytes, None]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > limits.bytes:
                raise Refused(413, too_large)
            yield chunk

    parser = _Parser(request, stream(), limits.fields)
    try:
        try:
            async with asyncio.timeout(limits.upload_seconds):
                data = await parser.parse()
        except TimeoutError as error:
            late = f"expected the whole request within {limits.upload_seconds:g} s, got a part of it; send less"
            raise Refused(408, late) from error
        except MultiPartException as error:
            broken = error.message.rstrip(".").lower()
            reason = f"expected a multipart body, got a broken one ({broken}); let an HTTP library write it"
            raise Refused(400, reason) from error
        except ClientDisconnect as error:
            raise Refused(400, "expected a whole request, got a part of it; send it again") from error
        if not parser.has_ended:
            raise Refused(400, "expected a multipart body with its last boundary, got a part of it; send it again")
        form = Form(texts={}, files={})
        for name, value in data.multi_items():
            if name not in fields:
                hint = did_you_mean(name[:60], fields, f"known are {', '.join(fields)}")
                raise Refused(400, f"expected a known field, got {name[:60]!r}{hint}")
            if isinstance(value, UploadFile) != fields[name]:
                which = ("a file", "with") if fields[name] else ("a text", "without")
                raise Refused(400, f"expected {which[0]} as {name}, got none; send it {which[1]} a filename")
            if isinstance(value, UploadFile):
                form.files.setdefault(name, []).append(value)
            else:
                form.texts.setdefault(name, []).append(value)
        yield form
    finally:
        parser.close()


def shown_name(name: str) -> str:
    r"""A file's name as a text of bounded length: its last part, printable.

    >>> shown_name("../../etc/passwd"), shown_name("C:\\photos\\cat.jpg"), shown_name("a\x00b"), shown_name("")
    ('passwd', 'cat.jpg', 'a_b', 'image')
    """
    last = name.replace("\\", "/").rpartition("/")[2][-120:]
    return "".join(letter if letter.isprintable() else "_" for letter in last) or "image"
