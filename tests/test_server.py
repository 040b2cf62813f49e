"""The server: OpenAI's own client, and everybody who should be refused."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import socket
import threading
from urllib.parse import urlencode

import pytest
from bomb import bomb
from needs import need
from PIL import Image

import imagegen
from imagegen.engine import Engine, Refused
from imagegen.model import Step
from imagegen.receipt import open_picture
from imagegen.server import Rules, build_app, find_safety, launch

TOKEN = "a-token-of-the-tests"
MIB = 2**20

need("gradio", "openai", "schemathesis")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "pictures"
    with launch(model, port=0, output_dir=folder, background=True, max_waiting=2) as running:
        running.folder = folder
        yield running


@pytest.fixture(scope="module")
def public(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public") / "pictures"
    settings = {"public": True, "token": TOKEN, "allow_hosts": ["pictures.example.org"], "safety": no_apples}
    with launch(model, "127.0.0.1", 0, folder, background=True, **settings) as running:
        running.folder = folder
        yield running


@pytest.fixture
def client(served):
    return client_of(served)


def no_apples(prompt, picture):
    assert picture.size == (128, 128)
    return "no apples here" if "apple" in prompt else None


def client_of(served, key="any"):
    import openai

    return openai.OpenAI(api_key=key, base_url=f"{served.url}/v1", max_retries=0)


def ask(served, method, path, body=None, **headers):
    """Ask as no library would; return the status, the headers and the text of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def opened(data):
    content = base64.b64decode(data)
    return content, *open_picture(io.BytesIO(content))


def png(picture):
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def test_the_openai_client_makes_pictures_with_receipts(client, served, model):
    made = client.images.generate(
        prompt="a red apple", n=2, size="128x64", model="emoji", user="somebody", extra_body={"seed": 7, "num_steps": 3}
    )
    assert made.size == "128x64"
    alone = model.generate("a red apple", seed=7, num_images=2, num_steps=3, width=128, height=64)
    for data, own, seed in zip(made.data, alone.pictures, (7, 8), strict=True):
        content, picture, receipt = opened(data.b64_json)
        assert picture.tobytes() == own.image.tobytes()
        assert receipt.request == own.receipt.request
        assert (served.folder / "programs" / f"{seed}-a-red-apple.png").read_bytes() == content
        assert data.seed == seed
    assert [one.id for one in client.models.list()] == ["emoji"]


def test_settings_reach_the_model(client):
    extra = {"seed": 1, "num_steps": 2, "guidance": 1.5, "negative_prompt": "green", "scheduler": "euler"}
    made = client.images.generate(prompt="a leaf", extra_body=extra, response_format="b64_json", quality="auto", size="auto")
    request = opened(made.data[0].b64_json)[2].request
    assert {name: request[name] for name in extra} == extra


WRONG = [
    ({"prompt": " "}, "prompt", "the prompt is empty"),
    ({"n": 11}, "n", "less than or equal to 10"),
    ({"n": "many"}, "n", "valid integer"),
    ({"size": "huge"}, "size", "size must be auto or WIDTHxHEIGHT"),
    ({"size": "130x128"}, None, "width must be a multiple of 8"),
    ({"size": "9999x9999"}, None, "width must be from 64 to 512, got 9999"),
    ({"model": "../../etc/passwd"}, "model", "is not served here: it is 'emoji'"),
    ({"response_format": "url"}, "response_format", "ask for b64_json"),
    ({"background": "transparent"}, "background", "every picture is opaque"),
    ({"output_format": "webp"}, "output_format", "PNG"),
    ({"quality": "hd"}, "quality", "set num_steps instead"),
    ({"style": "vivid"}, "style", "say it in the prompt"),
    ({"steps": 3}, None, "unknown parameter 'steps'"),
    ({"enhance_url": "http://127.0.0.1:1/v1"}, None, "unknown parameter 'enhance_url'"),
    ({"seed": 2**60}, "seed", "seed must be from 0"),
    ({"num_steps": 101}, "num_steps", "less than or equal to 100"),
    ({"scheduler": "warp"}, "scheduler", "unknown scheduler 'warp'"),
    ({"stream": True, "n": 2}, "n", "n must be 1 where stream is true"),
]


@pytest.mark.parametrize(("given", "param", "says"), WRONG, ids=[next(iter(given)) for given, *_ in WRONG])
def test_a_bad_request_is_a_400_in_openais_words(client, given, param, says):
    import openai

    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.post("/images/generations", cast_to=object, body={"prompt": "a red apple"} | given)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": 3}', b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_a_broken_body_is_a_400(served, body):
    for path in ("generations", "edits"):
        status, _, text = ask(served, "POST", f"/v1/images/{path}", body, content_type="application/json")
        assert status == 400
        assert json.loads(text)["error"]["message"]


def test_unknown_addresses_are_json(served):
    status, _, text = ask(served, "GET", "/v1/nothing")
    assert (status, json.loads(text)["error"]["code"]) == (404, "unknown_url")


def test_an_edit_repaints_what_is_transparent(client, model):
    picture = model.generate("a red apple", seed=1, num_steps=4).images[0]
    theirs, ours = Image.new("RGBA", picture.size, "black"), Image.new("L", picture.size)
    theirs.paste((0, 0, 0, 0), (0, 0, 64, 128))
    ours.paste(255, (0, 0, 64, 128))
    extra = {"seed": 7, "num_steps": 3}
    made = client.images.edit(image=("p.png", png(picture)), mask=("../../m.png", png(theirs)), prompt="a worm", extra_body=extra)
    own = model.generate("a worm", image=picture, mask=ours, **extra).images[0]
    assert opened(made.data[0].b64_json)[1].tobytes() == own.tobytes()
    clear = picture.convert("RGBA")  # a picture's own transparency is a mask as well
    clear.putalpha(theirs.getchannel("A"))
    made = client.images.edit(image=("p.png", png(clear)), prompt="a worm", extra_body=extra)
    assert opened(made.data[0].b64_json)[1].tobytes() == own.tobytes()


def test_an_edit_without_a_mask_repaints_the_whole(client, model):
    picture = model.generate("a red apple", seed=1, num_steps=4).images[0]
    extra = {"seed": 7, "num_steps": 4, "strength": 0.5}
    made = client.images.edit(image=[("p.png", png(picture))], prompt="a worm", size="64x64", extra_body=extra)
    own = model.generate("a worm", image=picture, width=64, height=64, **extra).images[0]
    assert opened(made.data[0].b64_json)[1].tobytes() == own.tobytes()


def test_what_is_no_usable_picture_is_a_400(client, model):
    import openai

    whole = png(Image.new("RGB", (128, 128)))
    cases = [
        ({"image": ("b.png", bomb(8_000))}, "image is 8000x8000 pixels, more than"),
        ({"image": ("b.png", bomb(30_000))}, "image cannot be read as a picture .DecompressionBombError"),
        ({"image": ("b.png", b"no picture")}, "image cannot be read as a picture"),
        ({"image": ("b.png", whole[:60])}, "image cannot be read as a picture"),
        ({"image": ("b.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, "cannot be read"),
        ({"image": ("p.png", whole), "mask": ("m.png", whole)}, "mask has no transparent part"),
        ({"image": ("p.png", whole), "mask": ("m.png", png(Image.new("RGBA", (64, 64))))}, "mask is 64x64 and image 128x128"),
        ({"image": [("p.png", whole), ("q.png", whole)]}, "image is given twice"),
    ]
    for given, says in cases:
        with pytest.raises(openai.BadRequestError, match=says):
            client.images.edit(prompt="a worm", extra_body={"num_steps": 1}, **given)
    with pytest.raises(openai.BadRequestError, match="image must be sent as a file"):
        form = {"headers": {"Content-Type": "multipart/form-data"}}
        client.post("/images/edits", cast_to=object, files={"other": b"x"}, body={"prompt": "a worm"}, options=form)


def test_a_picture_is_sent_as_it_becomes(client, model):
    extra = {"num_steps": 4, "seed": 7}
    events = list(client.images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body=extra))
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    own = model.generate("a red apple", **extra).images[0]
    assert opened(events[-1].b64_json)[1].tobytes() == own.tobytes()
    picture = [("p.png", png(own))]
    (event,) = client.images.edit(image=picture, prompt="a worm", stream=True, extra_body={"num_steps": 2, "strength": 1})
    assert event.type == "image_edit.completed"


def test_a_full_queue_is_a_429(served, client):
    import openai

    with served.engine.alone():
        waiting = [served.engine.stream("a red apple", num_steps=1) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="requests wait already") as busy:
            client.images.generate(prompt="a red apple")
        assert busy.value.code == "busy"
        assert busy.value.response.headers["retry-after"]
        state = json.loads(ask(served, "GET", "/healthz")[2])
        assert state == {
            **{"status": "ok", "model": "emoji", "plan": "exact", "version": imagegen.__version__},
            **{"waiting": 2, "running": 1},
        }
    for stream in waiting:
        stream.close()
    client.images.generate(prompt="a red apple", extra_body={"num_steps": 1})


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_who_leaves_ends_the_work(served, steps_run, streamed):
    body = json.dumps({"prompt": "a blue heart", "num_steps": 100, "size": "256x256", "stream": streamed, "partial_images": 3})
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("POST", "/v1/images/generations", body)
    while not steps_run:
        threading.Event().wait(0.02)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    served.engine.generate("a red apple", num_steps=1)
    assert len(steps_run) < 100


def test_schemathesis_finds_no_server_error(model, tmp_path, monkeypatch):
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    run = model.run_together

    def quick(requests, on_step=None, noise=None):
        cheap = [
            dataclasses.replace(one, num_steps=1, width=64, height=64, image=None, mask=None, strength=None) for one in requests
        ]
        return run(cheap, on_step, noise)

    monkeypatch.setattr(model, "run_together", quick)
    with Engine(model) as engine:
        app = build_app(engine, tmp_path, None, Rules(hosts=frozenset({"localhost", "testserver"})))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        paths = []
        for found in schema.get_all_operations():
            operation = found.ok()
            paths.append(operation.path)

            @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.as_strategy())
            def holds(case):
                case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

            holds()
    assert paths == ["/healthz", "/v1/models", "/v1/images/generations", "/v1/images/edits"]


FOREIGN = ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example", "", "[::1", "192.168.0.9"]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_refused(served, host):
    for path in ("/", "/healthz", "/v1/models", "/config", "/gradio_api/info"):
        status, _, text = ask(served, "GET", path, host=host)
        assert (status, "this server is not" in text) == (403, True)


def test_this_machines_own_names_are_known(served):
    for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}", f"[::1]:{served.port}", "LOCALHOST"):
        assert ask(served, "GET", "/healthz", host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example", "file://"]
)
def test_a_foreign_origin_is_refused(served, origin, steps_run):
    for path in (
        "/v1/images/generations",
        "/v1/images/edits",
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/gradio_api/call/generate",
    ):
        status, headers, _ = ask(served, "POST", path, "{}", origin=origin, content_type="text/plain")
        assert status == 403
        assert "access-control-allow-origin" not in headers
    assert ask(served, "GET", "/v1/models", origin=origin)[0] == 403
    assert ask(served, "POST", "/v1/images/generations", "{}", sec_fetch_site="cross-site")[0] == 403
    assert not steps_run


def test_its_own_origin_may_ask(served):
    assert ask(served, "GET", "/v1/models", origin=served.url)[0] == 200
    assert ask(served, "GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200  # a link to it


def test_a_large_body_is_refused_before_it_is_read(served):
    for path, length in (("/v1/images/edits", 33 * MIB), ("/v1/images/generations", 1 + MIB), ("/gradio_api/upload", 513 * MIB)):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(length))
        connection.endheaders()  # and no byte of it
        assert connection.getresponse().status == 413
        connection.close()


def test_a_large_body_of_unknown_length_is_cut_off(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(200):
            sent += MIB
            yield bytes(MIB)

    with contextlib.suppress(OSError):  # the server stops listening
        connection.request(
            "POST", "/v1/images/generations", pieces(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert connection.getresponse().status == 413
    connection.close()
    assert sent < 50 * MIB
    assert ask(served, "GET", "/healthz")[0] == 200


TRAVERSALS = [
    "/v1/../../etc/passwd",
    "/v1/images/..%2f..%2f..%2fetc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%2f..%2fpyproject.toml",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_out(served, path):
    status, _, text = ask(served, "GET", path)
    assert status in (400, 403, 404) or "<html" in text.lower()
    assert "root:" not in text
    assert "[project]" not in text


def test_what_programs_made_is_handed_out_to_nobody(served, client):
    client.images.generate(prompt="../../../../tmp/secret <script>", extra_body={"seed": 5, "num_steps": 1})
    (file,) = (served.folder / "programs").glob("5-*.png")
    assert file.name == "5-tmp-secret-script.png"
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/gradio_api/stream/"):
        assert ask(served, "GET", f"{route}{file}")[0] in (403, 404, 405)


def test_scripts_come_back_as_data_only(served):
    script = "<script>alert(1)</script>"
    for body in ({"prompt": "x", "size": script}, {"prompt": "x", script: 1}, {"prompt": "x", "model": script}):
        status, headers, text = ask(served, "POST", "/v1/images/generations", json.dumps(body))
        assert status == 400
        assert headers["content-type"].startswith("application/json")
        assert headers["x-content-type-options"] == "nosniff"
        assert script in json.loads(text)["error"]["message"]
    status, headers, text = ask(served, "GET", f"/v1/{script.replace(' ', '')}")
    assert headers["content-type"].startswith("application/json")


def test_a_public_server_demands_its_token(public):
    import openai

    for path in ("/v1/models", "/openapi.json", "/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
        assert ask(public, "GET", path)[0] == 401
        assert ask(public, "GET", path, authorization=f"Bearer {TOKEN}x")[0] == 401
    with pytest.raises(openai.AuthenticationError) as refused:
        client_of(public, "wrong").images.generate(prompt="a leaf")
    assert refused.value.code == "invalid_api_key"
    assert TOKEN not in str(refused.value)
    assert len(client_of(public, TOKEN).images.generate(prompt="a leaf", extra_body={"num_steps": 1}).data) == 1
    status, _, text = ask(public, "GET", "/healthz")
    assert status == 200
    assert TOKEN not in text


def test_a_public_page_has_a_login(public):
    status, _, text = ask(public, "GET", "/", accept="text/html")
    assert (status, "asks for its token" in text) == (401, True)
    form = {"content_type": "application/x-www-form-urlencoded"}
    assert ask(public, "POST", "/login", urlencode({"token": "wrong"}), **form)[0] == 401
    assert ask(public, "POST", "/login", urlencode({"token": TOKEN}), origin="https://evil.example", **form)[0] == 403
    status, headers, _ = ask(public, "POST", "/login", urlencode({"token": TOKEN}), **form)
    assert (status, headers["location"]) == (303, "/")
    cookie, *marks = headers["set-cookie"].split("; ")
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=Lax"} <= set(marks)
    assert ask(public, "GET", "/config", cookie=cookie)[0] == 200
    assert ask(public, "GET", "/config", cookie=cookie + "0")[0] == 401


def test_a_public_server_knows_its_names_and_addresses(public):
    key = {"authorization": f"Bearer {TOKEN}"}
    for host in ("pictures.example.org", "192.168.0.9:7860", "[2001:db8::1]:80", "localhost"):
        assert ask(public, "GET", "/v1/models", host=host, **key)[0] == 200
    assert ask(public, "GET", "/v1/models", host="evil.example", **key)[0] == 403


def test_a_refused_picture_is_never_sent(public):
    import openai

    client = client_of(public, TOKEN)
    with pytest.raises(openai.BadRequestError, match="the picture was refused: no apples here") as refused:
        client.images.generate(prompt="a red apple", extra_body={"num_steps": 2, "seed": 77})
    assert refused.value.code == "refused"
    events = client.images.generate(prompt="a red apple", stream=True, partial_images=1, extra_body={"num_steps": 4, "seed": 77})
    first = next(events)
    assert len(Image.open(io.BytesIO(base64.b64decode(first.b64_json))).getcolors()) == 1
    with pytest.raises(openai.APIError, match="no apples here"):
        list(events)
    assert not list(public.folder.rglob("77-*"))


def test_a_safety_check_that_fails_allows_nothing(model):
    def broken(prompt, picture):
        raise KeyError("weights")

    with Engine(model, safety=broken) as engine:
        with pytest.raises(Refused, match=r"the safety check itself failed \(KeyError\)"):
            engine.generate("a red apple", num_steps=1)
        stream = engine.stream("a red apple", num_steps=3)
        step = next(state for state in stream if isinstance(state, Step))
        assert not step.latents.any()
        assert len(step.preview(0).getcolors()) == 1


def test_safety_checks_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text("def look(prompt, picture):\n    return None\nword = 'x'\n")
    monkeypatch.chdir(tmp_path)
    assert find_safety("own_checks:look")("a", None) is None
    for name in ("own_checks", "own_checks:word", "nothing_there:look", "own_checks:missing", ""):
        with pytest.raises(imagegen.RequestError, match="--safety"):
            find_safety(name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"public": True}, "a public server needs a token.*IMAGEGEN_TOKEN, for example"),
        ({"public": True, "token": "short"}, "16 plain letters or more"),
        ({"token": "sixteen letters ä"}, "16 plain letters"),
        ({"host": "0.0.0.0"}, "others could come by '0.0.0.0': pass --public"),
        ({"host": "192.168.0.9"}, "others could come"),
        ({"allow_hosts": ["pictures.example.org"]}, "others could come"),
    ],
)
def test_nobody_else_comes_without_a_token(model, given, says):
    with pytest.raises(imagegen.RequestError, match=says):
        launch(model, port=0, background=True, **given)


def test_a_port_that_is_taken_is_named(model, served):
    with pytest.raises(imagegen.RequestError, match=f"cannot listen on 127.0.0.1:{served.port}"):
        launch(model, port=served.port, background=True)


def test_serve_says_in_one_line_what_is_wrong(monkeypatch, capsys):
    from imagegen import cli

    monkeypatch.delenv("IMAGEGEN_TOKEN", raising=False)
    assert cli.run(["serve", "--public", "--port", "0"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "needs a token" in said
    assert cli.run(["serve", "--help"]) == 0
    assert "Example: imagegen serve" in capsys.readouterr().out
