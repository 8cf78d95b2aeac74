"""The routes of the server, and who may use them."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from jaxtyping import Bool, Float
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from sightline import maps
from sightline.data.images import OR_RAISE, UnreadableImage
from sightline.facts import Progress, words
from sightline.notebook import uri
from sightline.report import pictures
from sightline.report.formats import template
from sightline.runs import plain
from sightline.serve.jobs import Full, Job, Jobs, Work
from sightline.serve.openapi import FORMS, description, is_file
from sightline.serve.service import FILLS, Answer, Answers, Asked, Drawn, Picture, Service, raw_maps
from sightline.serve.uploads import Form, Limits, Refused, form_of, shown_name
from sightline.version import __version__

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_STATIC = {
    "serve.js": ("sightline.serve", "static/serve.js", "text/javascript"),
    "serve.css": ("sightline.serve", "static/serve.css", "text/css"),
    "style.css": ("sightline.report", "templates/style.css", "text/css"),
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_DECODED = 2  # images that are decoded at a time
_DRAINED_BYTES, _DRAINED_SECONDS = 2**28, 5.0
_NOTE = "one image: no interval"


class Api:
    """The routes."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits = service, limits
        self.jobs = Jobs(limits.waiting, limits.seconds)
        self.decoding = ThreadPoolExecutor(_DECODED)
        self.reading = 0

    def routes(self) -> list[Route]:
        """All of them."""
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/", self.page),
            ("GET", "/static/{name}", self.static),
            ("GET", "/health", self.health),
            ("GET", "/methods", self.methods),
            ("GET", "/layers", self.layers),
            ("GET", "/classes", self.classes),
            ("GET", "/samples", self.samples),
            ("GET", "/samples/{index}", self.sample),
            ("POST", "/explain", self.explain),
            ("POST", "/predict", self.predict),
            ("POST", "/jobs", self.submit),
            ("GET", "/jobs/{id}", self.job),
            ("DELETE", "/jobs/{id}", self.cancel),
            ("GET", "/openapi.json", self.openapi),
        ]
        return [Route(path, _guarded(endpoint), methods=[method]) for method, path, endpoint in table]

    async def page(self, request: Request) -> Response:
        """The page."""
        text = template("page.html", "sightline.serve").render(
            model=self.service.network.name,
            device=self.service.device,
            version=__version__,
        )
        return Response(text, media_type="text/html")

    async def static(self, request: Request) -> Response:
        """A file of the package."""
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404)
        package, path, kind = _STATIC[name]
        content = files(package).joinpath(path).read_bytes()
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        """Whether the server answers, and its limits."""
        return _json(
            {
                "status": "ok",
                "model": self.service.network.name,
                "device": self.service.device,
                "version": __version__,
                "waiting": self.jobs.waiting,
                "limit": self.limits.waiting,
                "limits": self.limits.facts(),
            }
        )

    async def methods(self, request: Request) -> Response:
        """All explainers, and which of them work on the model."""
        listed = [
            {
                "name": method.name,
                "title": words(method.name),
                "summary": method.summary,
                "fast": not method.explainer.many_passes,
                "control": method.explainer.is_control,
                "works": method.reason is None,
                "reason": method.reason,
            }
            for method in self.service.methods.values()
        ]
        return _json({"methods": listed})

    async def layers(self, request: Request) -> Response:
        """Layers that maps can be read from."""
        listed = [{"name": layer.name, "shape": layer.shape} for layer in self.service.layers]
        return _json({"layers": listed, "default": self.service.default_layer})

    async def classes(self, request: Request) -> Response:
        """The names of the classes."""
        return _json({"classes": [self.service.class_name(index) for index in range(self.service.count)]})

    async def samples(self, request: Request) -> Response:
        """The run's test images."""
        listed = self.service.sample_names()
        return _json({"samples": [{"index": i, "name": name, "class": of} for i, (name, of) in enumerate(listed)]})

    async def sample(self, request: Request) -> Response:
        """One of them."""
        picture = await self._sample(request.path_params["index"], 404)
        return Response(maps.png(picture.image), media_type="image/png")

    async def explain(self, request: Request) -> Response:
        """Maps of images."""
        async with self._form(request) as form:
            response = form.text("response", "json")
            if response not in ("json", "npz"):
                raise Refused(400, f"expected response json or npz, got {response[:60]!r}; choose one of them")
            asked = await self._asked(form)
        if response == "npz" and len(asked.pictures) > 1:
            raise Refused(400, f"expected one image with response npz, got {len(asked.pictures)}; ask for each alone")
        answers = await self._result(request, partial(self.service.explain, asked))
        if response == "json":
            content = await self._in_thread(partial(self._answers, asked, answers))
            return Response(content, media_type="application/json")
        content = await self._in_thread(partial(raw_maps, answers.images[0].maps))
        return Response(content, media_type="application/octet-stream")

    async def predict(self, request: Request) -> Response:
        """The classes of an image before and after a part of it is hidden."""
        async with self._form(request) as form:
            fill, masks = form.text("fill", "blur"), form.files.get("mask", [])
            if fill not in FILLS:
                raise Refused(400, f"expected fill {' or '.join(FILLS)}, got {fill[:60]!r}; choose one of them")
            if len(masks) > 1:
                raise Refused(400, f"expected one mask, got {len(masks)}; send it once")
            (picture,) = await self._pictures(form, most=1)
            hidden = await self._in_thread(partial(self._mask, masks[0].file, picture)) if masks else None
        work = partial(self._predict, picture, hidden, fill)
        return _json(await self._result(request, work))

    async def submit(self, request: Request) -> Response:
        """Begin maps or curves."""
        async with self._form(request) as form:
            kind = form.text("kind", "explain")
            if kind not in ("explain", "measure"):
                raise Refused(400, f"expected kind explain or measure, got {kind[:60]!r}; choose one of them")
            asked = await self._asked(form, most=1 if kind == "measure" else self.limits.images)
        work = partial(self._measure if kind == "measure" else self._explain, asked)
        return _json({"id": self.jobs.submit(work, keep=True).id}, 202)

    async def job(self, request: Request) -> Response:
        """The state of a job, and its result."""
        job = self._known(request)
        facts = {
            "id": job.id,
            "state": job.state,
            "what": job.what,
            "done": job.done,
            "total": job.total,
            "seconds": job.seconds,
            "left": job.left,
            "error": None if job.error is None else refusal(job.error)[1],
        }
        head = json.dumps(plain(facts), ensure_ascii=False)
        result = job.result if job.state == "done" else b"null"
        return Response(head[:-1].encode() + b', "result": ' + result + b"}", media_type="application/json")

    async def cancel(self, request: Request) -> Response:
        """Cancel a job, or forget it if it is over."""
        job = self._known(request)
        self.jobs.cancel(job)
        return _json({"id": job.id, "state": job.state})

    def _known(self, request: Request) -> Job:
        job = self.jobs.get(request.path_params["id"])
        if job is None:
            raise Refused(404, "expected the id of a job of the last minutes, got another; begin it again")
        return job

    async def openapi(self, request: Request) -> Response:
        """This description."""
        return _json(description())

    @asynccontextmanager
    async def _form(self, request: Request) -> AsyncGenerator[Form]:
        """The fields of a request, if there is room for another one."""
        self.jobs.check_room()
        if self.reading >= self.limits.waiting:
            raise Full
        fields = {name: is_file(field) for name, field in FORMS[request.scope["path"]].items()}
        self.reading += 1
        try:
            async with form_of(request, self.limits, fields) as form:
                yield form
        finally:
            self.reading -= 1

    async def _asked(self, form: Form, most: int | None = None) -> Asked:
        names = [name.strip() for text in form.texts.get("methods", ["grad_cam"]) for name in text.split(",")]
        methods = self.service.chosen([name for name in names if name] or ["grad_cam"])
        target, layer = self.service.target(form.text("target")), form.text("layer") or None
        count = len(form.files.get("images", [])) or 1
        if count * len(methods) > self.limits.maps:
            raise Refused(
                413,
                f"expected at most {self.limits.maps:,} maps, images times methods, got {count * len(methods):,}; "
                "ask for fewer at a time",
            )
        return Asked(await self._pictures(form, most), methods, target, layer)

    async def _pictures(self, form: Form, most: int | None = None) -> Sequence[Picture]:
        images, sample = form.files.get("images", []), form.text("sample")
        if bool(images) == bool(sample):
            got = "both" if images else "neither"
            raise Refused(400, f"expected a file as images, or the index of a sample, got {got}; send one of them")
        if sample:
            return [await self._sample(sample, 400)]
        most = most or self.limits.images
        if len(images) > most:
            raise Refused(413, f"expected at most {most} image{'s' * (most > 1)}, got {len(images)}; send fewer")
        return [await self._in_thread(partial(self._read, image)) for image in images]

    def _read(self, image: UploadFile) -> Picture:
        name = shown_name(image.filename or "")
        try:
            return self.service.read(name, image.file.read(), self.limits.pixels)
        except UnreadableImage as error:
            reason = str(error).removesuffix(OR_RAISE)
            raise Refused(422, f"expected an image as {name}, got none that can be read: {reason}") from error

    def _mask(self, file: BinaryIO, picture: Picture) -> Bool[Tensor, "h w"]:
        try:
            return self.service.mask(file.read(), picture, self.limits.pixels)
        except UnreadableImage as error:
            reason = str(error).removesuffix(OR_RAISE)
            raise Refused(422, f"expected a mask as large as the image is shown, got another: {reason}") from error

    async def _sample(self, index: str, status: int) -> Picture:
        try:
            number = int(index) if index.isdecimal() and len(index) < 10 else -1
            return await self._in_thread(partial(self.service.sample, number))
        except IndexError as error:
            raise Refused(status, str(error)) from error

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.decoding, call)

    async def _result(self, request: Request, work: Work) -> Any:
        """The result of work, which is cancelled if the client has gone."""
        job = self.jobs.submit(work)
        over = asyncio.wrap_future(job.over)
        try:
            while not (await asyncio.wait({over}, timeout=1.0))[0]:
                if await request.is_disconnected():
                    self.jobs.cancel(job)
            if job.error is not None:
                raise job.error
            if job.state == "cancelled":
                raise Refused(503, "expected a server that goes on, got one that ends; ask again")
            return job.result
        except asyncio.CancelledError:
            self.jobs.cancel(job)
            raise
        finally:
            del job  # else its error and this frame would hold each other, and the images

    def _explain(self, asked: Asked, progress: Progress) -> bytes:
        return self._answers(asked, self.service.explain(asked, progress))

    def _measure(self, asked: Asked, progress: Progress) -> bytes:
        curves = [
            {
                "metric": curve.metric,
                "method": curve.method,
                "title": words(curve.method),
                "control": curve.is_control,
                "shares": curve.shares,
                "scores": curve.scores,
                "area": curve.area,
            }
            for curve in self.service.measure(asked, progress)
        ]
        return _dumped({"curves": curves, "note": _NOTE})

    def _predict(
        self, picture: Picture, hidden: Bool[Tensor, "h w"] | None, fill: str, progress: Progress
    ) -> dict[str, Any]:
        before, after = self.service.predict(picture, hidden, fill)
        share = 0.0 if hidden is None else float(hidden.float().mean())
        return {"before": self._best(before), "after": self._best(after), "hidden": share}

    def _answers(self, asked: Asked, answers: Answers) -> bytes:
        return _dumped(
            {
                "images": [self._answer(answer) for answer in answers.images],
                "notices": answers.notices,
                "code": self.service.code(asked),
                "scale": {"colors": pictures.color_stops(), "signed": pictures.color_stops(signed=True)},
            }
        )

    def _answer(self, answer: Answer) -> dict[str, Any]:
        return {
            "name": answer.picture.name,
            "size": answer.picture.shown.shape[1:],
            "shown": uri("png", maps.png(answer.picture.shown)),
            "prediction": self._best(self.service.best(answer.probabilities)),
            "target": self._best([(answer.target, float(answer.probabilities[answer.target]))])[0],
            "maps": [_map(drawn) for drawn in answer.maps],
        }

    def _best(self, classes: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [
            {"class": self.service.class_name(index), "index": index, "probability": probability}
            for index, probability in classes
        ]


def _map(drawn: Drawn) -> dict[str, Any]:
    low, high = drawn.ends or (None, None)
    return {
        "method": drawn.method,
        "title": words(drawn.method),
        "layer": drawn.layer.name,
        "positions": drawn.values.shape,
        "signed": drawn.is_signed,
        "low": low,
        "high": high,
        "color": uri("png", pictures.png(drawn.colored)),
        "values": _encoded(drawn.values),
        "shape": drawn.values.shape,
        "parts": None if drawn.parts is None else {"values": _encoded(drawn.parts), "shape": drawn.parts.shape},
        "text": pictures.in_words(drawn.values),
        "verdicts": [{"level": verdict.level, "text": str(verdict)} for verdict in drawn.verdicts],
        "unchecked": drawn.is_unchecked,
        "seconds": drawn.seconds,
    }


def _encoded(values: Float[np.ndarray, "..."]) -> str:
    """As base64 of float32, the lowest byte first."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _dumped(content: Any) -> bytes:
    return json.dumps(plain(content), ensure_ascii=False, allow_nan=False).encode()


def _json(content: Any, status: int = 200) -> Response:
    return Response(_dumped(content), status, media_type="application/json")


def refusal(error: BaseException) -> tuple[int, str]:
    """The status and the line that an error is answered with."""
    text = " ".join(str(error).split())
    if isinstance(error, Refused):
        return error.status, text
    if isinstance(error, HTTPException):
        return error.status_code, f"expected a path and method out of /openapi.json, got {error.detail.lower()}"
    if isinstance(error, Full):
        return 503, "expected room in the queue, got a full one; ask again in a few seconds"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return 503, "expected enough memory, got too little; send fewer images, or ask again later"
    if isinstance(error, TimeoutError):
        return 413, text
    if isinstance(error, UnreadableImage):
        return 422, text
    if isinstance(error, ValueError | RuntimeError):
        return 400, text
    return 500, f"{type(error).__name__}: {text}"


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, whose errors are answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return _answered(request, error)

    return answer


def _answered(request: Request, error: Exception) -> Response:
    status, line = refusal(error)
    if status == 500:
        print(f"sightline: error in {request.method} {request.scope['path']}: {line}", file=sys.stderr)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Full):
        headers["Retry-After"] = "2"
    response = _json({"error": line}, status)
    response.headers.update(headers)
    return response


class _Body:
    """The rest of a body that nobody wanted is read and dropped, else its client would not come to read the answer."""

    def __init__(self, request: Request, receive: Receive) -> None:
        self._receive = receive
        headers = request.headers
        is_sent = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.is_coming = is_sent and "expect" not in headers

    async def receive(self) -> Message:
        """The next part."""
        message = await self._receive()
        self.is_coming = self.is_coming and message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Drop the rest, as far as it comes soon."""
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAINED_SECONDS):
                while self.is_coming and dropped < _DRAINED_BYTES:
                    dropped += len((await self.receive()).get("body", b""))


class Guard:
    """Lets a request in if its Host, Origin and token are right, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, token: str | None, is_local: bool) -> None:
        self.app, self.token, self.is_local = app, token, is_local
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        self.cookie = f"sightline-{digest[:12]}"  # servers on other ports of a host share its cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        request = Request(scope)
        body = _Body(request, receive)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400 and message["status"] != 408:
                    await body.drain()
            await send(message)

        try:
            response = self._checked(request)
        except Refused as error:
            response = _answered(request, error)
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        if response is None:
            await self.app(scope, body.receive, secured)
        else:
            await response(scope, body.receive, secured)

    def _checked(self, request: Request) -> Response | None:
        """None if the request may go on, or the answer that sets the cookie.

        Raises:
            Refused: it may not.
        """
        headers = request.headers
        host = headers.get("host", "")
        if self.is_local and _name(host) not in LOOPBACK:
            raise Refused(421, f"expected the host {' or '.join(LOOPBACK[:2])}, got {host[:60]!r}; use that address")
        if request.method not in ("GET", "HEAD", "OPTIONS") and _is_of_another_site(headers, host):
            raise Refused(403, "expected a request of this server's own page, got one of another site; ask it directly")
        if self.token is None:
            return None
        given = parse_qs(request.scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if request.scope["path"] == "/" and request.method == "GET" and given and self._is_token(given):
            response = RedirectResponse("/", 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return response
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if (kind.lower() == "bearer" and self._is_token(bearer.strip())) or self._is_token(
            request.cookies.get(self.cookie, "")
        ):
            return None
        raise Refused(401, "expected the server's token, got none or a wrong one; open /?token=TOKEN once, or send it")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())


def _name(host: str) -> str:
    """The name in a Host header, without the port.

    >>> _name("localhost:8000"), _name("[::1]:80"), _name("evil.example")
    ('localhost', '::1', 'evil.example')
    """
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_of_another_site(headers: Headers, host: str) -> bool:
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2].lower() != host.lower() or not host
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


def check_token(token: str | None) -> None:
    """Refuse a token that headers, cookies and addresses would write in several ways.

    Raises:
        ValueError: it has other characters than letters, digits, and - . _ ~.

    >>> check_token("ab-1")
    """
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise ValueError("expected a token of letters, digits and - . _ ~ alone, got another; choose one")


def create_app(
    service: Service, *, token: str | None = None, is_local: bool = True, limits: Limits | None = None
) -> Starlette:
    """The server as an ASGI application.

    Args:
        service: what it serves.
        token: what a client must send; None: nothing.
        is_local: whether only this machine can ask, so that other names of the host are refused.
        limits: of requests.

    Raises:
        ValueError: as `check_token`.
    """
    check_token(token)
    api = Api(service, limits or Limits())
    guard = Middleware(Guard, token=token, is_local=is_local)
    app = Starlette(routes=api.routes(), middleware=[guard], exception_handlers={HTTPException: _answered})
    app.router.redirect_slashes = False
    app.state.jobs = api.jobs
    return app
