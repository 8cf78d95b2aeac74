"""The description of the API at /openapi.json, and the fields of its forms."""

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.facts import LEVELS
from sightline.version import __version__

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _number(description: str, **more: Any) -> Schema:
    return {"type": "number", "description": description, **more}


def _whole(description: str, **more: Any) -> Schema:
    return {"type": "integer", "description": description, **more}


def _flag(description: str) -> Schema:
    return {"type": "boolean", "description": description}


def _list(items: Schema, description: str = "", **more: Any) -> Schema:
    return {"type": "array", "items": items, **({"description": description} if description else {}), **more}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _side(description: str) -> Schema:
    return _list(_whole("pixels or positions"), description, minItems=2, maxItems=2)


_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_IMAGES = _list(_FILE, "image files of any format that the command line reads")
_SAMPLE = _whole("index of one of /samples, instead of images", minimum=0)
_CHOICES: dict[str, Schema] = {
    "images": _IMAGES,
    "sample": _SAMPLE,
    "methods": _list(_text("names out of /methods, several with commas; name@layer too"), "grad_cam if left out"),
    "target": _text("class to explain, by name or index out of /classes; the predicted one if left out"),
    "layer": _text("layer to read, out of /layers or any other of the model; the last one if left out"),
}
FORMS: dict[str, dict[str, Schema]] = {
    "/explain": _CHOICES
    | {"response": _text("json, or npz: the raw maps of one image by method", enum=["json", "npz"], default="json")},
    "/predict": {
        "images": _IMAGES | {"maxItems": 1},
        "sample": _SAMPLE,
        "mask": {**_FILE, "description": "image as large as the image is shown (size), white where it is hidden"},
        "fill": _text("what replaces hidden pixels", enum=["blur", "mean"], default="blur"),
    },
    "/jobs": _CHOICES
    | {
        "kind": _text(
            "explain, or measure: insertion and deletion curve of one image for the methods and four controls",
            enum=["explain", "measure"],
            default="explain",
        )
    },
}
"""Path -> the fields of the form that is posted there."""


def is_file(field: Schema) -> bool:
    """Whether a field of a form is a file."""
    return "contentMediaType" in field.get("items", field)


_SCHEMAS: dict[str, Schema] = {
    "Error": _object(error=_text("what was expected, what came, and what to do")),
    "Limits": _object(
        bytes=_whole("most bytes of a request"),
        pixels=_whole("most pixels of an image that is decoded"),
        images=_whole("most images of a request"),
        maps=_whole("most maps of a request: images times methods"),
        fields=_whole("most fields of a request, images among them"),
        upload_seconds=_number("longest time in which a request may arrive"),
        seconds=_number("longest time that a job may run"),
        waiting=_whole("most jobs that wait"),
    ),
    "Health": _object(
        status=_text("that the server answers", const="ok"),
        model=_text("name of the network"),
        device=_text("where it runs, such as cpu or cuda:0"),
        version=_text("of sightline"),
        waiting=_whole("jobs that wait now"),
        limit=_whole("most jobs that wait"),
        limits=_named("Limits"),
    ),
    "Methods": _object(
        methods=_list(
            _object(
                name=_text("as in sightline.explain"),
                title=_text("for reading"),
                summary=_text("what it does, in a line"),
                fast=_flag("whether it takes a few passes per image, not many"),
                control=_flag("whether it ignores the model"),
                works=_flag("whether it works on this model"),
                reason=_or_null(_text("why it does not")),
            )
        )
    ),
    "Layers": _object(
        layers=_list(
            _object(
                name=_text("dotted name in the model"),
                shape=_list(_whole("channels, height, width"), "of its output for one image"),
            ),
            "blocks of the model with positions, in the order in which they run",
        ),
        default=_text("the layer that is read if none is named; empty if there is none"),
    ),
    "Classes": _object(classes=_list(_text("name, or number where it has none"), "in the order of their indices")),
    "Samples": _object(
        samples=_list(
            _object(index=_whole("for sample="), name=_text("of the file"), **{"class": _text("true class")}),
            "the first test images of a run; empty for a model by name",
        )
    ),
    "Class": _object(
        **{"class": _text("name")}, index=_whole("of the class"), probability=_number("0 to 1", minimum=0, maximum=1)
    ),
    "Map": _object(
        method=_text("as asked for"),
        title=_text("for reading"),
        layer=_text("that was read; empty if none was"),
        positions=_side("rows and columns of the raw map"),
        signed=_flag("whether negative values speak against the class, so that the colors go from blue to red"),
        low=_or_null(_number("what the first color stands for; null if no value is finite")),
        high=_or_null(_number("what the last color stands for")),
        color=_text("data URI of a PNG of the colored map, as large as the image is shown"),
        values=_text("the raw map: base64 of 32-bit little-endian floats, row by row"),
        shape=_side("height and width of the raw map"),
        parts=_or_null(
            _object(
                values=_text("as base64 of 32-bit little-endian floats"),
                shape=_list(_whole("maps, height, width"), minItems=3, maxItems=3),
            )
            | {"description": "the maps of a block with several, which the color shows together; null for others"}
        ),
        text=_text("the map in words"),
        verdicts=_list(
            _object(level=_text("how severe", enum=[*LEVELS]), text=_text("what speaks against the map")),
            "reasons to distrust the map",
        ),
        unchecked=_flag("whether it was not compared with the map of another class"),
        seconds=_number("of the call that made it, with all methods and images that shared it"),
    ),
    "Explained": _object(
        name=_text("of the file"),
        size=_side("height and width of the image as it is shown"),
        shown=_text("data URI of a PNG of the part of the image that the model sees"),
        prediction=_list(_named("Class"), "the most probable classes, at most five"),
        target=_named("Class"),
        maps=_list(_named("Map"), "in the order in which they were asked for"),
    ),
    "Explanation": _object(
        images=_list(_named("Explained")),
        notices=_list(_text("decision about images or model that you may want to change")),
        code=_text("Python that makes the same maps"),
        scale=_object(
            colors=_list(_text("color, such as #000004"), "of maps from low to high, in equal steps"),
            signed=_list(_text("color"), "of signed maps from low to high, in equal steps"),
        ),
    ),
    "Prediction": _object(
        before=_list(_named("Class"), "the most probable classes of the image, at most five"),
        after=_list(_named("Class"), "those of the image with the mask hidden"),
        hidden=_number("share of the pixels that is hidden", minimum=0, maximum=1),
    ),
    "Curves": _object(
        curves=_list(
            _object(
                metric=_text("which curve", enum=["insertion", "deletion"]),
                method=_text("as asked for, or a control"),
                title=_text("for reading"),
                control=_flag("whether it ignores the model"),
                shares=_list(_number("0 to 1"), "of the pixels that are inserted or deleted"),
                scores=_list(_or_null(_number("0 to 1")), "probability of the target; null if the map is not finite"),
                area=_or_null(_number("under the curve")),
            )
        ),
        note=_text("what to keep in mind"),
    ),
    "Begun": _object(id=_text("of the job")),
    "Cancelled": _object(id=_text("of the job"), state=_text("its state now")),
    "Job": _object(
        id=_text("of the job"),
        state=_text("where it is", enum=["waiting", "running", "done", "failed", "cancelled"]),
        what=_text("what it does now"),
        done=_whole("how many of these are done"),
        total=_whole("how many there are"),
        seconds=_number("how long it runs, or ran"),
        left=_or_null(_number("seconds that what it does now will still take")),
        error=_or_null(_text("why it failed")),
        result={
            "anyOf": [_named("Explanation"), _named("Curves"), {"type": "null"}],
            "description": "what it made, once it is done",
        },
    ),
}
_OF_FORMS = (400, 408, 413, 415, 422, 503)
_OPERATIONS: Sequence[tuple[str, str, str, int, str, Sequence[int]]] = (
    ("get", "/", "The page.", 200, "text/html", ()),
    ("get", "/static/{name}", "A file of the page.", 200, "text/css", (404,)),
    ("get", "/health", "Whether the server answers, and its limits.", 200, "Health", ()),
    ("get", "/methods", "All explainers, and which of them work on the model.", 200, "Methods", ()),
    ("get", "/layers", "Layers that maps can be read from.", 200, "Layers", ()),
    ("get", "/classes", "The names of the classes.", 200, "Classes", ()),
    ("get", "/samples", "The first test images of the run.", 200, "Samples", ()),
    ("get", "/samples/{index}", "One of them.", 200, "image/png", (404,)),
    ("post", "/explain", "Maps of images, at once.", 200, "Explanation", _OF_FORMS),
    ("post", "/predict", "Classes before and after a part is hidden.", 200, "Prediction", _OF_FORMS),
    ("post", "/jobs", "Begin maps, or curves of one image.", 202, "Begun", _OF_FORMS),
    ("get", "/jobs/{id}", "The state of a job, and its result.", 200, "Job", (404,)),
    ("delete", "/jobs/{id}", "Cancel a job, or forget it if it is over.", 200, "Cancelled", (404,)),
    ("get", "/openapi.json", "This description.", 200, "application/json", ()),
)
_REASONS = {
    400: "a wrong field or a broken body",
    401: "no token, or a wrong one",
    403: "a request of another site",
    404: "there is no such thing",
    408: "the request did not arrive in time",
    413: "beyond a limit",
    415: "no multipart body",
    421: "another Host than this server's",
    422: "an image that cannot be read",
    503: "the queue is full, and Retry-After says when to ask again; or there is too little memory",
}


def description() -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary, status, answer, errors in _OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": f"{method} {path}",
            "responses": {str(status): {"description": summary, "content": _content(path, answer)}},
        }
        changes = () if method == "get" else (403,)
        for code in sorted({401, 421, *changes, *errors}):
            error: dict[str, Any] = {"application/json": {"schema": _named("Error")}}
            operation["responses"][str(code)] = {"description": _REASONS[code], "content": error}
        if "{" in path:
            name = path.partition("{")[2].rstrip("}")
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        if method == "post":
            form = {"type": "object", "properties": FORMS[path], "additionalProperties": False}
            operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sightline serve",
            "version": __version__,
            "description": "Where an image classifier looks: predictions, maps and what speaks against them.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _content(path: str, answer: str) -> Mapping[str, Any]:
    if answer not in _SCHEMAS:
        return {answer: {}}
    content: dict[str, Any] = {"application/json": {"schema": _named(answer)}}
    return content | {"application/octet-stream": {}} if "response" in FORMS.get(path, {}) else content
