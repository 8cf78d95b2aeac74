"""Every route of the server: what it answers, by its own description, and that its maps are those of `sl.explain`."""

import base64
import gc
import io
import json
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from starlette.testclient import TestClient
from tests.serve.conftest import HERE, png

import sightline as sl
from sightline import data, runs
from sightline.facts import Notice
from sightline.metrics.perturbed import substitute
from sightline.report import pages
from sightline.serve import Service, create_app, open_service
from sightline.serve.app import Api
from sightline.serve.jobs import Job, Jobs
from sightline.serve.openapi import FORMS, description
from sightline.serve.service import CONTROLS
from sightline.serve.uploads import Limits

METHODS = ["grad_cam", "saliency", "lrp_epsilon_plus_flat", "random_map"]
PHOTO = png()


def valid(answer: Any, name: str) -> Any:
    """The JSON of an answer, if it is as described."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": description()["components"]}
    content = answer.json()
    Draft202012Validator(schema).validate(content)
    return content


def error_of(answer: Any, status: int) -> str:
    """The line that a request was refused with."""
    assert answer.status_code == status, answer.text
    line = valid(answer, "Error")["error"]
    assert "\n" not in line and re.match(r"expected .+, got .+", line), line
    return line


def send(client: TestClient, path: str = "/explain", image: bytes = PHOTO, name: str = "a.png", **fields: Any) -> Any:
    return client.post(path, files={"images": (name, image)}, data=fields)


def finished(client: TestClient, id: str) -> dict[str, Any]:
    """A job when it is over."""
    for _ in range(600):
        job = valid(client.get(f"/jobs/{id}"), "Job")
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.02)
    raise AssertionError("the job does not end")


def values_of(one: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(one["values"]), "<f4").reshape(one["shape"])


def picture_of(uri: str) -> np.ndarray:
    file = io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    return np.asarray(Image.open(file).convert("RGB"))


def inputs_of(service: Service, content: bytes, folder: Path) -> torch.Tensor:
    """The model's input, read as a user of the library would."""
    (folder / "a.png").write_bytes(content)
    images = data.read_images([folder / "a.png"], service.preprocess)
    return data.normalize(images.batch([0]).images, service.preprocess)


def test_description_has_every_route_and_every_field(service: Service) -> None:
    api = Api(service, Limits())
    routes = {
        (route.path, method.lower()) for route in api.routes() for method in route.methods or () if method != "HEAD"
    }
    api.jobs.close()
    paths = description()["paths"]
    assert {(path, method) for path, operations in paths.items() for method in operations} == routes
    for path, fields in FORMS.items():
        form = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["properties"] == fields
    Draft202012Validator.check_schema({"components": description()["components"]["schemas"]})


def test_facts_are_as_described(client: TestClient, service: Service) -> None:
    health = valid(client.get("/health"), "Health")
    assert health["model"] == "vgg_gap" and health["limits"] == Limits().facts()
    methods = {method["name"]: method for method in valid(client.get("/methods"), "Methods")["methods"]}
    assert methods.keys() == sl.explainers.EXPLAINERS.keys()
    assert methods["grad_cam"] | {"summary": ""} == {
        "name": "grad_cam",
        "title": "Grad-CAM",
        "summary": "",
        "fast": True,
        "control": False,
        "works": True,
        "reason": None,
    }
    assert not methods["attention_rollout"]["works"] and "transformer" in methods["attention_rollout"]["reason"]
    assert not methods["rise"]["fast"] and methods["random_map"]["control"]
    assert valid(client.get("/classes"), "Classes") == {"classes": list("0123456789")}
    assert client.get("/openapi.json").json() == json.loads(json.dumps(description()))


def test_layers_can_be_explained(client: TestClient, service: Service) -> None:
    layers = valid(client.get("/layers"), "Layers")
    assert len(layers["layers"]) > 1 and layers["default"] in [layer["name"] for layer in layers["layers"]]
    for layer in layers["layers"]:
        (one,) = valid(send(client, layer=layer["name"]), "Explanation")["images"][0]["maps"]
        assert one["layer"] == layer["name"] and one["positions"] == layer["shape"][1:]


def test_samples_are_the_test_images(client: TestClient, run_folder: Path) -> None:
    listed = valid(client.get("/samples"), "Samples")["samples"]
    images = data.load(runs.open_run(run_folder).recipe.data)["test"]
    assert [one["name"] for one in listed] == images.names and len(listed) == 5
    assert [one["class"] for one in listed] == [images.classes[label] for label in images.labels]
    shown = np.asarray(Image.open(io.BytesIO(client.get("/samples/3").content)))
    assert (shown == images[3].images[0].movedim(0, -1).numpy()).all()
    answer = valid(client.post("/explain", files={"sample": (None, "3")}), "Explanation")
    assert answer["images"][0]["name"] == images.names[3]


def test_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "vgg_gap" in page.text
    linked = {f"/{name}" for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)}
    assert linked >= {"/static/serve.js", "/static/serve.css", "/static/style.css"}
    for path in linked:
        assert client.get(path).status_code == 200
    assert "<style" not in page.text and not re.search(r"<script(?![^>]*src=)", page.text)


@pytest.mark.parametrize("target", [None, 3])
def test_maps_are_those_of_explain(client: TestClient, service: Service, tmp_path: Path, target: int | None) -> None:
    given = {} if target is None else {"target": str(target)}
    answer = valid(send(client, methods=",".join(METHODS), **given), "Explanation")
    model, inputs = service.network.model, inputs_of(service, PHOTO, tmp_path)
    explanation = sl.explain(model, inputs, target, METHODS)
    (image,) = answer["images"]
    assert image["target"]["index"] == int(explanation.targets[0, 0])
    best = explanation.probabilities[0].topk(5)
    assert [one["index"] for one in image["prediction"]] == best.indices.tolist()
    assert [one["probability"] for one in image["prediction"]] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert [one["method"] for one in image["maps"]] == METHODS
    for one in image["maps"]:
        expected = explanation[one["method"]][0, 0].numpy()
        assert np.abs(values_of(one) - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())
        assert [verdict["text"] for verdict in one["verdicts"]] == [*explanation.verdicts[one["method"]][0]]
    assert picture_of(image["shown"]).shape == (*image["size"], 3)


def test_color_is_the_map_at_the_size_shown(client: TestClient, service: Service, tmp_path: Path) -> None:
    (image,) = send(client, methods="input_x_gradient").json()["images"]
    (one,) = image["maps"]
    raw = torch.from_numpy(values_of(one).copy())[None, None]
    colored = sl.maps.overlay(torch.zeros(1, 3, *image["size"], dtype=torch.uint8), raw, 1.0, signed=True)
    assert (picture_of(one["color"]) == colored[0, 0].movedim(0, -1).numpy()).all()
    assert (one["low"], one["high"]) == sl.maps.ends(raw[0, 0], signed=True)


def test_code_makes_the_same_maps(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for fields in ({"images": ("a.png", PHOTO)}, {"sample": (None, "2")}):
        (tmp_path / "a.png").write_bytes(PHOTO)
        form = {"methods": (None, "grad_cam,saliency"), "target": (None, "1"), "layer": (None, "features.conv7")}
        answer = client.post("/explain", files=fields | form).json()
        names: dict[str, Any] = {}
        exec(answer["code"], names)
        for one in answer["images"][0]["maps"]:
            assert np.abs(names["explanation"][one["method"]][0, 0].numpy() - values_of(one)).max() <= 1e-6


def test_npz_is_what_the_command_line_writes(client: TestClient, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PHOTO)
    pages(run_folder, [tmp_path / "a.png"], tmp_path / "out", METHODS)
    answer = send(client, methods=",".join(METHODS), response="npz")
    with np.load(io.BytesIO(answer.content)) as ours, np.load(tmp_path / "out" / "a.npz") as theirs:
        assert sorted(ours) == sorted(theirs) == sorted(METHODS)
        for name in METHODS:
            assert np.abs(ours[name] - theirs[name]).max() <= 1e-6 * max(1.0, np.abs(theirs[name]).max())


def test_many_images_and_repeated_methods(client: TestClient) -> None:
    contents = [png(seed=seed) for seed in range(3)]
    parts = [("images", (f"{i}.png", content)) for i, content in enumerate(contents)]
    more = [("methods", (None, "saliency")), ("methods", (None, "grad_cam, saliency"))]
    answer = valid(client.post("/explain", files=[*parts, *more]), "Explanation")
    assert [image["name"] for image in answer["images"]] == ["0.png", "1.png", "2.png"]
    for image, content in zip(answer["images"], contents, strict=True):
        assert [one["method"] for one in image["maps"]] == ["saliency", "grad_cam"]
        alone = send(client, image=content, methods="saliency").json()["images"][0]["maps"][0]
        assert np.abs(values_of(image["maps"][0]) - values_of(alone)).max() <= 1e-6 * values_of(alone).max()


def test_prediction_with_a_part_hidden(client: TestClient, service: Service, tmp_path: Path) -> None:
    height, width = send(client).json()["images"][0]["size"]
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    files = {"images": ("a.png", PHOTO), "mask": ("mask.png", file.getvalue())}
    inputs = inputs_of(service, PHOTO, tmp_path)
    for fill in ("blur", "mean"):
        answer = valid(client.post("/predict", files=files, data={"fill": fill}), "Prediction")
        hidden = inputs.clone()
        hidden[..., :12] = substitute(inputs, fill)[..., :12]
        for part, images in (("before", inputs), ("after", hidden)):
            with torch.no_grad():
                best = service.network.model(images).softmax(1)[0].topk(5)
            assert [one["index"] for one in answer[part]] == best.indices.tolist()
            assert [one["probability"] for one in answer[part]] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert answer["hidden"] == 0.5
    without = valid(send(client, "/predict"), "Prediction")
    for before, after in zip(without["before"], without["after"], strict=True):
        assert before["index"] == after["index"] and after["probability"] == pytest.approx(before["probability"])
    assert without["hidden"] == 0


def test_job_makes_what_explain_answers(client: TestClient) -> None:
    begun = send(client, "/jobs", methods="grad_cam,occlusion")
    assert begun.status_code == 202
    job = finished(client, valid(begun, "Begun")["id"])
    assert job["state"] == "done" and job["error"] is None and job["seconds"] > 0
    at_once = send(client, methods="grad_cam,occlusion").json()
    for result in (job["result"], at_once):
        for one in result["images"][0]["maps"]:
            one["seconds"] = 0
    assert job["result"] == at_once


def test_measure_job_has_the_curves_of_the_metrics(client: TestClient, service: Service, tmp_path: Path) -> None:
    job = finished(client, send(client, "/jobs", kind="measure", methods="grad_cam").json()["id"])
    assert job["state"] == "done" and job["done"] == job["total"] > 0
    inputs = inputs_of(service, PHOTO, tmp_path)
    names = ["grad_cam", *CONTROLS]
    explanation = sl.explain(service.network.model, inputs, methods=names)
    curves = {(one["metric"], one["method"]): one for one in job["result"]["curves"]}
    assert [*curves] == [(metric, name) for metric in ("insertion", "deletion") for name in names]
    for (metric, name), one in curves.items():
        function = getattr(sl.metrics, f"{metric}_auc")
        expected = function(service.network.model, inputs, explanation.targets, explanation[name])
        assert one["area"] == pytest.approx(float(expected), abs=1e-6)
        assert one["area"] == pytest.approx(np.trapezoid(one["scores"], one["shares"]), abs=1e-6)
        assert one["control"] == (name != "grad_cam") and one["shares"][0] == 0 and one["shares"][-1] == 1


class Held:
    """Work that goes on until it is let go, and tells its progress."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        plain = type(service).explain

        def explain(of: Service, asked: Any, progress: Any = None) -> Any:
            self.begun.set()
            for step in range(1000):
                progress("holding", step, 1000)
                if self.go.wait(0.01):
                    return plain(of, asked, progress)
            raise AssertionError("nobody let it go")

        monkeypatch.setattr(type(service), "explain", explain)


@pytest.fixture
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(service, monkeypatch)


def test_jobs_can_be_cancelled(client: TestClient, held: Held) -> None:
    running, waiting = (send(client, "/jobs").json()["id"] for _ in range(2))
    assert held.begun.wait(5)
    assert valid(client.get(f"/jobs/{waiting}"), "Job")["state"] == "waiting"
    assert client.get("/health").json()["waiting"] == 1
    assert valid(client.delete(f"/jobs/{waiting}"), "Cancelled")["state"] == "cancelled"
    time.sleep(0.05)
    job = valid(client.get(f"/jobs/{running}"), "Job")
    assert job["state"] == "running" and job["what"] == "holding" and job["total"] == 1000 and job["left"] > 0
    valid(client.delete(f"/jobs/{running}"), "Cancelled")
    job = finished(client, running)
    assert job["state"] == "cancelled" and job["result"] is None and job["error"] is None
    held.go.set()
    assert send(client).status_code == 200
    assert valid(client.delete(f"/jobs/{running}"), "Cancelled")["state"] == "cancelled"


def test_full_queue_is_told_at_once(client_of: Callable[..., TestClient], held: Held) -> None:
    client = client_of(waiting=1)
    first = send(client, "/jobs").json()["id"]
    assert held.begun.wait(5)
    second = send(client, "/jobs").json()["id"]
    for path in FORMS:
        answer = send(client, path)
        assert "queue" in error_of(answer, 503) and int(answer.headers["retry-after"]) > 0
    held.go.set()
    assert finished(client, first)["state"] == finished(client, second)["state"] == "done"
    assert send(client).status_code == 200


def test_too_little_memory_is_not_taken_for_a_full_queue(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Service, "explain", explain)
    answer = send(client)
    assert (
        "enough memory" in error_of(answer, 503) and "retry-after" not in answer.headers
    )  # the page would ask for ever


def test_job_beyond_its_time_fails(client_of: Callable[..., TestClient], held: Held) -> None:
    client = client_of(seconds=0.05)
    job = finished(client, send(client, "/jobs").json()["id"])
    assert job["state"] == "failed" and "faster methods" in job["error"]
    assert "faster methods" in error_of(send(client), 413)


def test_finished_jobs_are_forgotten(client: TestClient) -> None:
    jobs = client.app.state.jobs
    jobs.kept = 2
    ids = [send(client, "/jobs").json()["id"] for _ in range(4)]
    finished(client, ids[-1])
    states = [client.get(f"/jobs/{id}").status_code for id in ids]
    assert states == [404, 404, 200, 200]
    jobs.kept_bytes = 0
    assert [client.get(f"/jobs/{id}").status_code for id in ids[-2:]] == [404, 200]  # the last one, whatever its size
    jobs.kept_bytes, jobs.kept_seconds = 2**28, 0.0
    id = send(client, "/jobs").json()["id"]
    for _ in range(500):
        if client.get(f"/jobs/{id}").status_code == 404:
            break
        time.sleep(0.01)
    assert "job" in error_of(client.get(f"/jobs/{id}"), 404)


def soon(condition: Callable[[], Any]) -> bool:
    """Whether it holds within two seconds."""
    return any(condition() or time.sleep(0.01) for _ in range(200))


def test_a_job_is_forgotten_on_demand(client: TestClient) -> None:
    id = send(client, "/jobs").json()["id"]
    finished(client, id)
    assert valid(client.delete(f"/jobs/{id}"), "Cancelled")["state"] == "done"
    error_of(client.get(f"/jobs/{id}"), 404)


def test_a_result_that_comes_after_its_cancel_is_not_kept() -> None:
    jobs = Jobs()
    begun, go = threading.Event(), threading.Event()
    job = jobs.submit(lambda progress: begun.set() or (go.wait(5) and b"result"), keep=True)
    assert begun.wait(5)
    jobs.cancel(job)
    go.set()
    assert soon(job.over.done) and job.state == "cancelled" and job.result is None
    jobs.close()


def test_finished_jobs_are_forgotten_though_nobody_asks() -> None:
    jobs = Jobs(kept_seconds=0.1)
    job = jobs.submit(lambda progress: b"result", keep=True)
    assert soon(job.over.done) and job.id in jobs.known
    assert soon(lambda: not jobs.known)
    jobs.close()


@pytest.mark.parametrize("path", ["/explain", "/jobs"])
@pytest.mark.parametrize("error", [None, ValueError("expected nothing, got an image")], ids=["done", "failed"])
def test_images_are_gone_with_their_request(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, path: str, error: Exception | None
) -> None:
    images: list[weakref.ref[torch.Tensor]] = []
    plain = type(service).explain

    def explain(of: Service, asked: Any, progress: Any = None) -> Any:
        images.append(weakref.ref(asked.pictures[0].image))
        if error is not None:
            raise ValueError(str(error)) from error
        return plain(of, asked, progress)

    monkeypatch.setattr(type(service), "explain", explain)
    send(client).raise_for_status() if error is None else send(client)  # the first request fills caches
    gc.collect()
    gc.disable()  # a cycle of references would be found too late
    try:
        send(client, path)
        assert soon(lambda: len(images) == 2 and images[1]() is None)
    finally:
        gc.enable()


def test_time_left_while_the_job_begins_to_count_anew() -> None:
    class Counting(Job):
        reads = iter([5, 0])
        done = property(lambda self: next(self.reads), lambda self, value: None)

    job = Counting(lambda progress: None)
    job.state, job.total = "running", 10
    left = job.left
    assert left is not None and left > 0


def test_threads_get_their_own_answers(client: TestClient) -> None:
    contents = [png(seed=seed) for seed in range(12)]
    alone = [values_of(send(client, image=content).json()["images"][0]["maps"][0]) for content in contents]
    with ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda content: send(client, image=content), contents)]
    for answer, expected in zip(answers, alone, strict=True):
        assert np.abs(values_of(answer.json()["images"][0]["maps"][0]) - expected).max() <= 1e-6


def test_model_is_left_alone(client: TestClient, service: Service) -> None:
    model = service.network.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    send(client, methods="grad_cam,rise,smooth_grad")
    finished(client, send(client, "/jobs", kind="measure").json()["id"])
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert (torch.get_rng_state() == state).all()


def test_run_without_its_images_has_no_samples(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(run_folder, tmp_path / "run")
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace("source: clutter", f"source: {tmp_path}/gone"))
    monkeypatch.setattr(Service, "try_out", lambda self, progress: None)
    with pytest.warns(Notice, match="no test images are offered: .*gone"):
        service = open_service(moved)
    assert service.samples is None and service.sample_names() == []


def test_module_with_a_block_of_several_maps() -> None:
    torch.manual_seed(0)
    model = sl.create_model("cifar_resnet", num_classes=3, depth=8, attention="brnpa").eval()
    preprocess = data.Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
    app = create_app(open_service(model, classes=["cat", "dog", "newt"], preprocess=preprocess))
    client = TestClient(app, base_url=HERE)
    assert valid(client.get("/samples"), "Samples") == {"samples": []}
    (image,) = valid(send(client, target="newt", methods="attention"), "Explanation")["images"]
    assert image["target"]["class"] == "newt" and image["target"]["index"] == 2
    (one,) = image["maps"]
    assert one["parts"]["shape"] == [3, *one["shape"]]
    arrays = np.load(io.BytesIO(send(client, methods="attention", response="npz").content))
    parts = np.frombuffer(base64.b64decode(one["parts"]["values"]), "<f4").reshape(one["parts"]["shape"])
    assert (arrays["attention parts"] == parts).all()
    app.state.jobs.close()
